"""A recipe as the operator of torch's ring attention, ``_templated_ring_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import UnsupportedError, shown
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .rerouting import Rerouter


class ring_op:
    """``op(query, key, value, is_causal=…) -> (output, lse)`` by a recipe, for ``_templated_ring_attention``.

    Args:
        recipe, like, on_emulation: as in `attention`.

    Attributes:
        report: a `CallReport` that counts the steps.

    Each step attends to the keys of one rank, and torch merges them. Tensors are ``[B, H, N, D]`` (HND), lse float32
    ``[B, Hq, N]``; a tensor that is still on its way from another rank is waited for. "auto" runs exact attention where
    no kernel is worth it.

    >>> import torch
    >>> op = ring_op("sage2_8b")
    >>> q = k = v = torch.randn(1, 2, 64, 32)
    >>> out, lse = op(q, k, v, is_causal=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 64, 32]), torch.Size([1, 2, 64]))

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """

    def __init__(
        self, recipe: str | Recipe = "auto", *, like: str | Machine | None = None, on_emulation: OnEmulation = "warn"
    ) -> None:
        self._rerouter = Rerouter(recipe, like=like, training="refuse", on_emulation=on_emulation)
        self.report = self._rerouter.report

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Raises:
            UnsupportedError: gradients, dropout, or a word of another operator's that asks for something.
        """
        if asked := [f"{name}={shown(option)}" for name, option in others.items() if option is not None and option]:
            raise UnsupportedError(f"{', '.join(asked)}: a recipe in torch's ring attention has no such option")
        query, key, value = (_arrived(t) for t in (query, key, value))
        call = TorchCall(query, key, value, None, dropout_p, is_causal, scale, query.shape[1] != key.shape[1])
        return self._rerouter.answer_with_lse(call)


def _arrived(t: Tensor) -> Tensor:
    """The plain tensor of one that collectives hand over before it is there."""
    wait = getattr(t, "wait", None)
    return t if wait is None else wait()
