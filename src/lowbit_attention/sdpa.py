"""``torch.nn.functional.scaled_dot_product_attention``, by any recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .api import Training, for_scale, goes_through_the_op, make_request, resolve_like
from .dispatch import Choice, check_possible, run_request
from .errors import InvalidArgumentError
from .machine import Machine
from .recipe import Recipe
from .recipes import EXACT
from .recipes import recipe as find_recipe
from .request import Request, wants_grad

SDPA = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """One call, checked: ``[B, H, N, D]`` views, and the leading dimensions of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sm_scale: float
    request: Request
    lead: list[int]

    def run(self, choice: Choice) -> Tensor:
        """The output, ``[*lead, L, Ev]``, contiguous in the layout of the request."""
        return self.run_with_lse(choice)[0]

    def run_with_lse(self, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """The same with lse, ``[B, Hq, L]``, if the request asks for it."""
        out, lse = choice.run(self.q, self.k, self.v, self.mask, self.sm_scale, self.request)
        return self.finish(out), lse

    def run_by_op(self, recipe: Recipe | None, like: str | Machine | None) -> Tensor:
        """The same by the operator, for what is traced or holds no data."""
        q, k, v, layout = self.q, self.k, self.v, self.request.layout
        if layout == "NHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = self.request.is_causal
        out, _ = ops.attention(
            q, k, v, self.mask, recipe or "auto", causal, "top_left" if causal else None, self.sm_scale, layout,
            False, like,
        )  # fmt: skip
        return self.finish(out.transpose(1, 2) if layout == "NHD" else out)

    def finish(self, out: Tensor) -> Tensor:
        out = out.transpose(1, 2).contiguous().transpose(1, 2) if self.request.layout == "NHD" else out.contiguous()
        return out if len(self.lead) == 2 else out.reshape(*self.lead, *out.shape[2:])


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    recipe: Recipe | None,
    machine: Machine | None,
    return_lse: bool = False,
) -> Call:
    """Check the arguments of ``scaled_dot_product_attention``.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or value.
    """
    memo = _memo_key(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, recipe, machine, return_lse)
    if memo is not None and (known := _calls.get(memo)) is not None:
        request, sm_scale = known
        return Call(query, key, value, None, sm_scale, request, [request.batch, request.q_heads])
    _check(query, key, value, dropout_p, is_causal, enable_gqa)
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    lead, kv_lead = leading(query, key, value, enable_gqa)
    # Memory in the order of a transposed [B, N, H, D] comes back in that order: what models do next is no copy then.
    by_token = is_by_token(query)
    q, k, v = _flatten(query, lead), _flatten(key, kv_lead), _flatten(value, kv_lead)
    checks.check_tensors(q, k, v, 4, "[B, H, N, D]")
    checks.check_hnd(q, k, v)
    mask = _flatten_mask(attn_mask, lead, q, k)
    sm_scale = checks.resolve_scale("scale", scale, q.shape[3])
    recipe = for_scale("scale", sm_scale, recipe)
    request = make_request(
        q, k, v, mask, recipe, machine, is_causal=is_causal, bottom_right=False, dropout_p=float(dropout_p),
        layout="NHD" if by_token else "HND", return_lse=return_lse,
    )  # fmt: skip
    if memo is not None and all(a.shape == b.shape for a, b in ((q, query), (k, key), (v, value))):
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[memo] = request, sm_scale
    return Call(q, k, v, mask, sm_scale, request, lead)


_MOST_CALLS = 4096
_calls: dict[tuple[object, ...], tuple[Request, float]] = {}
"""The request and scale of calls that passed every check, by all that those look at (as `api` has it)."""


def _memo_key(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, *options: Any
) -> tuple[object, ...] | None:
    """What identifies a plain call; ``None`` for one that is looked at each time."""
    if torch.compiler.is_compiling() or attn_mask is not None or type(dropout_p) is not float or dropout_p:
        return None
    tensors = (query, key, value)
    if not all(type(t) is Tensor and t.layout is torch.strided and not t.is_nested and t.dim() == 4 for t in tensors):
        return None
    if query.is_meta or torch._C._get_tracing_state() is not None:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.is_autocast_enabled(query.device.type):
        return None
    is_causal, scale, enable_gqa, recipe, machine, return_lse = options
    plain = type(is_causal) is bool and type(enable_gqa) is bool and type(scale) in (float, type(None))
    if not plain or wants_grad(*tensors):
        return None
    return (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
        query.device, key.device, value.device, is_by_token(query), is_causal, scale, enable_gqa,
        recipe, machine, return_lse,
    )  # fmt: skip


def make_sdpa(
    recipe: str | Recipe = "auto", *, like: str | Machine | None = None, training: Training = "refuse"
) -> SDPA:
    """A function with the signature of ``torch.nn.functional.scaled_dot_product_attention`` that runs ``recipe``.

    Args:
        recipe, like, training: as in `attention`.

    >>> sdpa_8b = make_sdpa("sage2_8b")
    >>> q = k = v = torch.randn(2, 4, 64, 32)
    >>> sdpa_8b(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 64, 32])

    Raises:
        InvalidRecipeError: an unknown recipe.
    """
    return RecipeSDPA(recipe, like, training)


class RecipeSDPA:
    """What `make_sdpa` makes: a function that can be copied, pickled and compared by what made it."""

    _made_of: tuple[Any, ...] = ()  # (torch.compile hashes objects that it has not filled yet)

    def __init__(self, recipe: str | Recipe, like: str | Machine | None, training: Training) -> None:
        self._made_of = recipe, like, training
        self._recipe = find_recipe_or_auto(recipe)
        self._like = like
        self._machine = resolve_like(self._recipe, like)
        checks.check_choice("training", training, checks.TRAINING)
        self._exact_training = training == "exact"
        self.__name__ = self.__qualname__ = "sdpa"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``torch.nn.functional.scaled_dot_product_attention`` by this function's recipe.

        Args:
            query: ``[..., Hq, L, E]``; key: ``[..., H, S, E]``; value: ``[..., H, S, Ev]``. Leading dimensions
                broadcast, heads too; a head count of key and value that divides Hq needs ``enable_gqa=True``.
            attn_mask: bool (True: may see) or floating (added), broadcastable to ``[..., Hq, L, S]``.
            dropout_p: applied by torch; a quantised recipe refuses it.
            is_causal: query i sees keys j ≤ i (top-left), as in torch. Together with ``attn_mask``, both hold.
            scale: ``1 / √E`` if None; also one of numpy's numbers, or a tensor without dimensions.
            enable_gqa: let groups of query heads share a head of key and value.
        Returns:
            ``[..., Hq, L, Ev]`` in query's dtype (under autocast in autocast's, as torch's own).

        Raises:
            InvalidArgumentError: a wrong shape, dtype, device or value.
            UnsupportedError: nothing can run the call, with every reason.
        """
        exact = self._exact_training and wants_grad(query, key, value, attn_mask)
        call = make_call(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            EXACT if exact else self._recipe, None if exact else self._machine,
        )  # fmt: skip
        if goes_through_the_op(call.q, call.k, call.v, call.mask) and not dropout_p:
            check_possible(call.request)
            return call.run_by_op(call.request.recipe, self._like)
        (out, _), _ = run_request(call.q, call.k, call.v, call.mask, call.sm_scale, call.request)
        return call.finish(out)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecipeSDPA) and self._made_of == other._made_of

    def __hash__(self) -> int:
        return hash(self._made_of)

    def __repr__(self) -> str:
        recipe, like, training = self._made_of
        options = ("" if like is None else f", like={str(like)!r}") + (
            "" if training == "refuse" else f", training={training!r}"
        )
        return f"make_sdpa({str(recipe)!r}{options})"


def find_recipe_or_auto(recipe: str | Recipe) -> Recipe | None:
    """The recipe, ``None`` for "auto"."""
    return None if isinstance(recipe, str) and recipe == "auto" else find_recipe(recipe)


def recipe_text(recipe: Recipe | None) -> str:
    """How a recipe crosses to an operator."""
    return "auto" if recipe is None else recipe.to_json()


def is_by_token(query: Tensor) -> bool:
    """Whether ``[B, H, N, D]`` lies in memory as ``[B, N, H, D]``."""
    return query.dim() == 4 and query.stride(1) < query.stride(2)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """What torch does to the arguments under autocast: everything but float64 in its dtype."""
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _check(query: object, key: object, value: object, dropout_p: object, is_causal: object, enable_gqa: object) -> None:
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("enable_gqa", enable_gqa)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        checks.fail(f"dropout_p must be a probability, got {checks.shown(dropout_p)}")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if isinstance(t, Tensor):
            checks.check_kind(name, t)
        if not isinstance(t, Tensor) or t.dim() < 2:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            checks.fail(f"{name} must be a torch.Tensor of at least 2 dimensions [..., L, E], got {got}")


def leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[list[int], list[int]]:
    """The broadcast leading dimensions, heads last, of query and of key and value."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    leads = [tuple(t.shape[:-2]) for t in (query, key, value)]
    heads: list[list[int]] = [[], []]
    if enable_gqa:
        if not all(leads) or leads[1][-1] != leads[2][-1]:
            checks.fail(f"enable_gqa needs a head dimension, of equal size for key and value: {shapes}")
        checks.check_heads(leads[0][-1], leads[1][-1], shapes)
        heads = [[leads[0][-1]], [leads[1][-1]]]
        leads = [lead[:-1] for lead in leads]
    lead: list[int] = []
    for number in range(max([len(lead) for lead in leads]), 0, -1):  # from the left
        sizes = [lead[-number] for lead in leads if len(lead) >= number]
        others = [size for size in sizes if size != 1]
        if any(size != others[0] for size in others):
            hint = "" if enable_gqa else " (heads of key and value that divide the query's need enable_gqa=True)"
            checks.fail(f"leading dimensions do not broadcast: {shapes}{hint}")
        lead.append(others[0] if others else 1)
    return lead + heads[0], lead + heads[1]


def _flatten(t: Tensor, lead: Sequence[int]) -> Tensor:
    """``t`` broadcast to ``[*lead, N, D]`` and seen as ``[B, H, N, D]``; H is the last of ``lead``, or 1."""
    heads = lead[-1] if lead else 1
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead[:-1]), heads, *t.shape[-2:])


def _flatten_mask(attn_mask: object, lead: Sequence[int], q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a ``[B, Hq, Nq, Nk]`` view."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if isinstance(attn_mask, Tensor) and len(lead) != 2:
        full = (*lead, *shape[2:])
        try:
            attn_mask = _flatten(attn_mask.expand(full), lead)
        except RuntimeError:
            raise InvalidArgumentError(
                f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to [..., Hq, L, S] = {list(full)}"
            ) from None
    return checks.check_mask(attn_mask, q, shape)


sdpa = make_sdpa("auto")
