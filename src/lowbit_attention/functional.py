"""``torch.nn.functional.scaled_dot_product_attention``, by any recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import ops
from .api import Training, goes_through_the_op, resolve_like
from .backends.dispatch import check_possible, run_request
from .call import checks
from .call.checked import CheckedCall, check_call
from .call.request import OnEmulation
from .call.torch_call import TorchCall
from .recipes.definition import Recipe
from .recipes.machine import Machine
from .recipes.named import EXACT
from .recipes.named import recipe as find_recipe

SDPA = Callable[..., Tensor]


def make_sdpa(
    recipe: str | Recipe = "auto",
    *,
    like: str | Machine | None = None,
    training: Training = "refuse",
    on_emulation: OnEmulation = "warn",
) -> SDPA:
    """A function with the signature of ``torch.nn.functional.scaled_dot_product_attention`` that runs ``recipe``.

    Args:
        recipe, like, training, on_emulation: as in `attention`.

    >>> import torch
    >>> sdpa_8b = make_sdpa("sage2_8b")
    >>> q = k = v = torch.randn(2, 4, 64, 32)
    >>> sdpa_8b(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 64, 32])

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """
    return RecipeSDPA(recipe, like, training, on_emulation)


class RecipeSDPA:
    """What `make_sdpa` makes: a function that can be copied, pickled and compared by what made it."""

    _made_of: tuple[Any, ...] = ()  # (torch.compile hashes objects that it has not filled yet)

    def __init__(
        self,
        recipe: str | Recipe,
        like: str | Machine | None,
        training: Training,
        on_emulation: OnEmulation = "warn",  # (pickles of before have none)
    ) -> None:
        self._made_of = recipe, like, training, on_emulation
        self._recipe = find_recipe_or_auto(recipe)
        self._like = like
        self._machine = resolve_like(self._recipe, like)
        checks.check_choice("training", training, checks.TRAINING)
        checks.check_choice("on_emulation", on_emulation, checks.ON_EMULATION)
        self._exact_training = training == "exact"
        self._on_emulation = on_emulation
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
        given = TorchCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if self._exact_training and given.wants_grad():
            call = check_call(given, EXACT, None)
        else:
            call = check_call(given, self._recipe, self._machine, on_emulation=self._on_emulation)
        if goes_through_the_op(call.q, call.k, call.v, call.mask) and not dropout_p:
            check_possible(call.request)
            return _by_operator(call, call.request.recipe, self._like)
        (out, _), _ = run_request(*call.arguments())
        return call.finish(out)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecipeSDPA) and self._made_of == other._made_of

    def __hash__(self) -> int:
        return hash(self._made_of)

    def __repr__(self) -> str:
        recipe, like, training, on_emulation = self._made_of
        options = "" if like is None else f", like={str(like)!r}"
        options += "" if training == "refuse" else f", training={training!r}"
        options += "" if on_emulation == "warn" else f", on_emulation={on_emulation!r}"
        return f"make_sdpa({str(recipe)!r}{options})"


def find_recipe_or_auto(recipe: str | Recipe) -> Recipe | None:
    """The recipe, ``None`` for "auto"."""
    return None if isinstance(recipe, str) and recipe == "auto" else find_recipe(recipe)


def recipe_text(recipe: Recipe | None) -> str:
    """How a recipe crosses to an operator."""
    return "auto" if recipe is None else recipe.to_json()


def _by_operator(call: CheckedCall, recipe: Recipe | None, like: str | Machine | None) -> Tensor:
    """The answer by the operator of `ops`, for what is traced or holds no data."""
    q, k, v, layout = call.q, call.k, call.v, call.request.layout
    if layout == "NHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    causal = call.request.is_causal
    out, _ = ops.attention(
        q, k, v, call.mask, recipe or "auto", causal, "top_left" if causal else None, call.sm_scale, layout, False,
        like, call.request.on_emulation,
    )  # fmt: skip
    return call.finish(out.transpose(1, 2) if layout == "NHD" else out)


sdpa = make_sdpa("auto")
