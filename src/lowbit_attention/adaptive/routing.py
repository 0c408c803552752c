"""A policy at work: every attention call goes to its recipe."""

from __future__ import annotations

import itertools
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..implementations import call_torch
from ..integrations.intercept import intercepted
from ..machine import Machine
from ..ops import before_autograd, refuse_tangents
from ..sdpa import SDPA, as_autocast, leading, make_sdpa
from .clock import ROOT, Clock, driven

if TYPE_CHECKING:
    from .policy import Policy

_numbers = itertools.count()
_applied: weakref.WeakValueDictionary[int, Applied] = weakref.WeakValueDictionary()
"""Policies at work by number: what the operator in compiled code finds them by."""


class Applied:
    """A policy at work. `remove` ends it; `step` and `restart` move its clock as `Observer`'s do.

    A name whose recipe is the same wherever it was observed runs it at any index and timestep, and nothing is counted
    for it. Otherwise an unknown index runs the default, an unknown timestep the nearest known one's recipe.
    """

    def __init__(
        self, policy: Policy, model: torch.nn.Module | None, timesteps: Any, like: str | Machine | None
    ) -> None:
        self.policy = policy
        self.clock = Clock()
        self.number = next(_numbers)
        functions: dict[str, SDPA | None] = {
            name: None if recipe.is_exact else make_sdpa(recipe, like=like) for name, recipe in policy.recipes.items()
        }
        """``None`` is torch's own function."""
        self._default = functions[policy.default]
        by_name: dict[str, dict[int, dict[float, str]]] = {}
        for key, recipe in policy.routes.items():
            by_name.setdefault(key.name, {}).setdefault(key.index, {})[key.timestep] = recipe
        self._same: dict[str, SDPA | None] = {}
        self._varied: dict[str, dict[int, dict[float, SDPA | None]]] = {}
        for name, by_index in by_name.items():
            used = {recipe for by_timestep in by_index.values() for recipe in by_timestep.values()}
            if len(used) == 1:
                self._same[name] = functions[used.pop()]
            else:
                self._varied[name] = {
                    i: {t: functions[recipe] for t, recipe in by_timestep.items()}
                    for i, by_timestep in by_index.items()
                }
        numbered = model is None
        self._counted = {"": True} if numbered else dict.fromkeys(self._varied, True)
        self._stack = ExitStack()
        if self._counted or timesteps is not None:
            self._stack.enter_context(driven(self.clock, timesteps, model))
        self._stack.enter_context(intercepted(self._handle, model))
        _applied[self.number] = self

    def step(self, timestep: float | None = None) -> None:
        """Begin a step (before its calls): the timestep's value, or none to number them."""
        self.clock.step(timestep)

    def restart(self) -> None:
        """Begin a new run (prompt): the next step is the first again."""
        self.clock.restart()

    def remove(self) -> None:
        """Route nothing any more. A second time does nothing."""
        self._stack.close()
        _applied.pop(self.number, None)

    def _handle(self, original: Any, name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        path = "" if name is None else name or ROOT
        if torch.compiler.is_compiling():
            if path not in self._counted and self._same.get(path, self._default) is None:
                return original(*args, **kwargs)  # type: ignore[no-any-return]
            return _operator(self.number, path, *args, **kwargs)
        function = self.function(path)
        return call_torch(original, *args, **kwargs) if function is None else function(*args, **kwargs)

    def function(self, path: str) -> SDPA | None:
        """What runs the call that happens now; ``None``: torch's own. Counts it, if the count matters."""
        if path not in self._counted:
            return self._same.get(path, self._default)
        key = self.clock.key(path or None)
        if key.name in self._same:
            return self._same[key.name]
        by_timestep = self._varied.get(key.name, {}).get(key.index)
        if by_timestep is None:
            return self._default
        if key.timestep not in by_timestep:
            nearest = min(by_timestep, key=lambda t: (abs(t - key.timestep), t))
            by_timestep[key.timestep] = by_timestep[nearest]
        return by_timestep[key.timestep]


_LIBRARY: Any = torch.library.Library("lowbit_attention", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "routed(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa, int policy, str name) -> Tensor"
)


def _operator(
    number: int,
    path: str,
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
    """One call in compiled code: an operator, so that the recipe is looked up when the code runs."""
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    out: Tensor = torch.ops.lowbit_attention.routed(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, number, path
    )
    return out


def _routed(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    attn_mask, dropout_p, is_causal, scale, enable_gqa, number, path = options
    applied = _applied.get(number)
    function = applied.function(path) if applied is not None else None
    if function is None:
        out: Tensor = torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:
        out = function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    lead, _ = leading(query, key, value, options[4])
    return query.new_empty(*lead, query.shape[-2], value.shape[-1])


_LIBRARY.impl("routed", _routed, "CompositeExplicitAutograd")
before_autograd("routed", refuse_tangents)
torch.library.register_fake("lowbit_attention::routed", _fake, lib=_LIBRARY)
