"""A model's ``scaled_dot_product_attention`` by a recipe, for as long as you like: `sdpa_enabled`, `enable_sdpa`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..api import Training
from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .call_report import REPLACEMENT, CallKind, CallReport
from .intercept import intercepted
from .rerouting import Rerouter


class Caught(Rerouter):
    """The handler of one block (`integrations.scope.Handler`)."""

    def __call__(self, original: Callable[..., Tensor], name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(TorchCall.of(*args, **kwargs), original)

    def with_lse(self, name: str | None, call: TorchCall) -> tuple[Tensor, Tensor]:
        """Output and lse of a call that was made to the block (`intercept.ask_with_lse`)."""
        return self.answer_with_lse(call)

    skipped = Rerouter.declined

    def passed_by(self, function: Callable[..., Tensor]) -> None:
        """What somebody else put in the place of torch's function ran a call by itself."""
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        named = f"{module}.{name}" if module and name else repr(function)
        reason = f"F.scaled_dot_product_attention had been replaced before by {named}, which ran the call itself"
        if self.strict:
            raise UnsupportedError(f"{reason}; undo that, or enable with strict=False")
        self.report.add(CallKind(REPLACEMENT, "-", reason))


class sdpa_enabled(intercepted):
    """Within the block, ``torch.nn.functional.scaled_dot_product_attention`` runs ``recipe``.

    Args:
        model: only the calls made while a forward of this module runs; ``None``: every call of the process. May be
            compiled by `torch.compile`, before the block or inside.
        recipe: ``"auto"`` (a kernel where it is faster than torch, torch elsewhere), a recipe's name, or a `Recipe`,
            which runs always, emulated where no kernel can.
        like: as in `attention`.
        training: calls whose gradients autograd records run torch's own function (``"exact"``) or are an error
            (``"refuse"``).
        strict: a call that the recipe cannot run is an error, and does not go to torch's own function.
        on_emulation: as in `attention`; ``"error"`` raises whatever ``strict`` is.
    Returns:
        A `CallReport` that counts every call by implementation and reason, in the block and after it.

    Calls mean what they mean in torch (``is_causal`` is top-left). To torch's own function go, counted by reason:
    gradients, dropout, float64, head dimensions above 256, tensor subclasses, what runs inside `torch.func.vmap`, wrong
    arguments (torch's error is raised), and with ``"auto"`` whatever is not worth it. See `integrations.intercept` for
    which calls are reached, and which not (`torch.nn.MultiheadAttention` with ``need_weights=True``).

    >>> import torch
    >>> import torch.nn.functional as F
    >>> q = k = v = torch.randn(1, 2, 64, 32)
    >>> with sdpa_enabled(recipe="sage2_8b") as report:
    ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> report.by_implementation()
    {'emulation': 1}

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """

    def __init__(
        self,
        model: Any = None,
        recipe: str | Recipe = "auto",
        *,
        like: str | Machine | None = None,
        training: Training = "exact",
        strict: bool = False,
        on_emulation: OnEmulation = "warn",
    ) -> None:
        caught = Caught(recipe, like=like, training=training, strict=strict, on_emulation=on_emulation)
        self.report = caught.report
        self._again = partial(
            type(self), model, recipe, like=like, training=training, strict=strict, on_emulation=on_emulation
        )
        super().__init__(caught, model)
        self.report.of = _described(model, self.block.subjects)

    def _recreate_cm(self) -> sdpa_enabled:  # (as a decorator: a block of its own for every call)
        return self._again()

    def __enter__(self) -> CallReport:
        super().__enter__()
        return self.report


def _described(model: Any, subjects: dict[str, nn.Module]) -> str:
    """Which part of a pipeline a report is of; empty for a module and for the process."""
    return "" if isinstance(model, nn.Module | None) else f"{', '.join(subjects)} of {type(model).__name__}"


_enabled: dict[int, tuple[Any, sdpa_enabled]] = {}


def enable_sdpa(
    model: Any = None,
    recipe: str | Recipe = "auto",
    *,
    like: str | Machine | None = None,
    training: Training = "exact",
    strict: bool = False,
    on_emulation: OnEmulation = "warn",
) -> CallReport:
    """`sdpa_enabled` until `disable_sdpa`. Another call for the same model (or ``None``) replaces the first.

    >>> import torch
    >>> report = enable_sdpa(recipe="sage2_8b")
    >>> q = torch.randn(1, 2, 64, 32)
    >>> out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> disable_sdpa()
    >>> report.ran
    1
    """
    block = sdpa_enabled(model, recipe, like=like, training=training, strict=strict, on_emulation=on_emulation)
    report = block.__enter__()
    _, previous = _enabled.get(id(model), (None, None))
    _enabled[id(model)] = model, block
    if previous is not None:
        previous.__exit__()
    return report


def disable_sdpa(model: Any = None) -> None:
    """End what `enable_sdpa` began: for ``model``, or all of it. Where nothing was begun, nothing happens."""
    for key in list(_enabled) if model is None else [id(model)]:
        if key in _enabled:
            _enabled[key][1].__exit__()  # (before it is forgotten: an interrupt in between can be made up for)
            _enabled.pop(key, None)
