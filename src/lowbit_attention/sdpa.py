"""``torch.nn.functional.scaled_dot_product_attention``, by any recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks
from .api import make_request, resolve_like
from .dispatch import choose
from .errors import InvalidArgumentError
from .machine import Machine
from .recipe import Recipe
from .recipes import recipe as find_recipe

SDPA = Callable[..., Tensor]


def make_sdpa(recipe: str | Recipe = "auto", *, like: str | Machine | None = None) -> SDPA:
    """A function with the signature of ``torch.nn.functional.scaled_dot_product_attention`` that runs ``recipe``.

    Args:
        recipe, like: as in `attention`.

    >>> sdpa_8b = make_sdpa("sage2_8b")
    >>> q = k = v = torch.randn(2, 4, 64, 32)
    >>> sdpa_8b(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 64, 32])

    Raises:
        InvalidRecipeError: an unknown recipe.
    """
    chosen = None if isinstance(recipe, str) and recipe == "auto" else find_recipe(recipe)
    machine = resolve_like(chosen, like)

    def sdpa(
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
        _check(query, key, value, dropout_p, is_causal, enable_gqa)
        lead, kv_lead = _leading(query, key, value, enable_gqa)
        q, k, v = _flatten(query, lead), _flatten(key, kv_lead), _flatten(value, kv_lead)
        checks.check_tensors(q, k, v, 4, "[B, H, N, D]")
        checks.check_hnd(q, k, v)
        sm_scale = checks.resolve_scale("scale", scale, q.shape[3])
        mask = _flatten_mask(attn_mask, lead, q, k)
        request = make_request(
            q, k, v, mask, chosen, machine, is_causal=is_causal, bottom_right=False, dropout_p=float(dropout_p)
        )
        choice = choose(request)
        out, _ = choice.implementation.run(q, k, v, mask, sm_scale, request, choice.recipe)
        return out.reshape(*lead, out.shape[2], out.shape[3])

    sdpa.__doc__ = f"""``torch.nn.functional.scaled_dot_product_attention`` by recipe {recipe}.

    Args:
        query: ``[..., Hq, L, E]``; key: ``[..., H, S, E]``; value: ``[..., H, S, Ev]``. Leading dimensions broadcast,
            heads too; a head count of key and value that divides Hq needs ``enable_gqa=True``.
        attn_mask: bool (True: may see) or floating (added), broadcastable to ``[..., Hq, L, S]``.
        dropout_p: applied by torch; a quantised recipe refuses it.
        is_causal: query i sees keys j ≤ i (top-left), as in torch. Together with ``attn_mask``, both hold.
        scale: ``1 / √E`` if None.
        enable_gqa: let groups of query heads share a head of key and value.
    Returns:
        ``[..., Hq, L, Ev]`` in query's dtype.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or value.
        UnsupportedError: nothing can run the call, with every reason.
    """
    return sdpa


def _check(query: object, key: object, value: object, dropout_p: object, is_causal: object, enable_gqa: object) -> None:
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("enable_gqa", enable_gqa)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
        checks.fail(f"dropout_p must be a probability, got {dropout_p!r}")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.dim() < 2:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            checks.fail(f"{name} must be a torch.Tensor of at least 2 dimensions [..., L, E], got {got}")


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[list[int], list[int]]:
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
    try:
        lead = list(torch.broadcast_shapes(*leads))  # type: ignore[no-untyped-call]
    except RuntimeError:
        hint = "" if enable_gqa else " (heads of key and value that divide the query's need enable_gqa=True)"
        raise InvalidArgumentError(f"leading dimensions do not broadcast: {shapes}{hint}") from None
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
