"""Which implementation runs a request, and why not the others.

A *named* recipe runs that recipe, on the first implementation that can. ``auto`` runs a kernel where one stays in the
default error budget and is not slower than what torch would run, and otherwise exact attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..call.mask_types import Mask, as_tensor, size_reasons
from ..call.memo import IdentityMemo
from ..call.request import Request, device_name
from ..errors import EmulationRefusedError, UnsupportedError
from ..output.console import fitting
from ..recipes.definition import Recipe
from ..recipes.named import EXACT
from . import emulated, failures
from .base import Emulation, Implementation, Output, TiledExact, TorchSDPA
from .budget import outside_reasons
from .registry import IMPLEMENTATIONS

AUTO_MIN_LENGTH = 8192
"""From how many queries and keys ``auto`` trusts a kernel on a card nobody has timed. On an H100 a whole call of
quantised attention breaks even with cuDNN between 2048 (128 heads in all) and 8192 tokens (8 heads)."""


@dataclass(frozen=True)
class Verdict:
    """One implementation with one recipe: whether it was chosen, and what speaks for or against it."""

    implementation: str
    recipe: str
    chosen: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """What runs a request."""

    implementation: Implementation
    recipe: Recipe

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, sm_scale: float, request: Request) -> Output:
        """Run it, with autocast off: it would round what an implementation computes on purpose."""
        given: Any = mask if mask is None or self.implementation.reads(request) else as_tensor(mask, q, k)
        if torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return self.implementation.run(q, k, v, given, sm_scale, request, self.recipe)
        return self.implementation.run(q, k, v, given, sm_scale, request, self.recipe)


Answer = TypeVar("Answer")


def attempt(choice: Chosen, request: Request, run: Callable[..., Answer], *arguments: Any) -> Answer | str:
    """What ``run`` gives; or, where the choice is a kernel that failed now or before, why, in one line."""
    if not choice.implementation.is_kernel:
        return run(*arguments)
    name = choice.implementation.name
    if (failed := failures.known(name, choice.recipe, request, count=True)) is not None:
        return failed
    try:
        return run(*arguments)
    except Exception as error:
        if not failures.can_go_round(error):
            raise
        _known.clear()
        return failures.note(name, choice.recipe, request, error)


def run_request(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, sm_scale: float, request: Request) -> Ran:
    """Run a request by what `choose` says; with ``auto`` a kernel that fails is gone round, with one warning.

    Returns:
        What it gave, and the choice that did.

    Raises:
        UnsupportedError: as `choose`.
    """
    choice = choose(request)
    if request.recipe is not None or not choice.implementation.is_kernel:
        return choice.run(q, k, v, mask, sm_scale, request), choice
    answer = attempt(choice, request, choice.run, q, k, v, mask, sm_scale, request)
    if not isinstance(answer, str):
        return answer, choice
    if (again := choose(request)) != choice:
        return run_request(q, k, v, mask, sm_scale, request)
    exact = _without_kernels(request, again, answer)  # (it failed for want of memory, and may be tried the next time)
    return exact.run(q, k, v, mask, sm_scale, request), exact


def _without_kernels(request: Request, failed: Chosen, why: str) -> Chosen:
    for implementation in IMPLEMENTATIONS:
        if not implementation.is_kernel and not _reasons(implementation, request, EXACT):
            return Chosen(implementation, EXACT)
    raise UnsupportedError(
        f"{failed.implementation.name} failed ({why}), and nothing else can run the call ({request})"
    )


Ran = tuple[Output, Chosen]


@dataclass(frozen=True)
class Explanation:
    """What `lowbit_attention.explain` returns; ``print`` shows it."""

    request: str
    asked: str
    implementation: str | None
    recipe: str | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        runs = (
            f"{self.implementation} with recipe {self.recipe}" if self.implementation else "nothing: no one can run it"
        )
        lines = [f"request: {self.request}", f"recipe asked for: {self.asked}", f"runs: {runs}"]
        for verdict in self.verdicts:
            mark = "+" if verdict.chosen else "-"
            lines.append(f"  {mark} {verdict.implementation} [{verdict.recipe}]: " + "; ".join(verdict.reasons))
        return fitting("\n".join(lines))


def choose(request: Request) -> Chosen:
    """The implementation and recipe for ``request``.

    With an emulation that is to be warned of, the warning comes here, before it runs.

    Raises:
        UnsupportedError: with every implementation's every reason, if none can run it.
        EmulationRefusedError: the emulation could, and is refused.
    """
    if request.needs_grad and torch.compiler.is_compiling():
        check_possible(request)
        return Chosen(_TORCH, request.recipe or EXACT)
    known = _known.get(request)
    if known is not None and _same(known[0]):
        return known[1]
    choice, verdicts = _decide(request)
    if choice is None:
        reasons = _by_implementation(verdicts)
        refused = emulated.REFUSED in reasons.get(Emulation.name, ())
        raise (EmulationRefusedError if refused else UnsupportedError)(
            f"no implementation can run this call with recipe {request.recipe or 'auto'} ({request})", reasons
        )
    if isinstance(choice.implementation, Emulation) and request.warns_of_emulation:
        kernels = {i.name for i in IMPLEMENTATIONS if i.is_kernel}
        emulated.warn(request, _by_implementation([v for v in verdicts if v.implementation in kernels]))
    if all(i.decides_by_request for i in IMPLEMENTATIONS):
        _known.put((tuple(IMPLEMENTATIONS), choice), request)
    return choice


def check_possible(request: Request) -> None:
    """Refuse a call that nothing can run, without a look at its device: for tensors that hold no data.

    Kernels run only what `Emulation` or `TiledExact` can, too.

    Raises:
        UnsupportedError: with every reason.
    """
    recipe = request.recipe or EXACT
    reasons: dict[str, tuple[str, ...]] = {}
    for able in (_EXACT if recipe.is_exact else _EMULATION, _TORCH):
        if not (why := able.not_supported_reasons(request, recipe)):
            return
        reasons[able.name] = why
    raise UnsupportedError(f"no implementation can run this call with recipe {recipe} ({request})", reasons)


_TORCH, _EXACT, _EMULATION = TorchSDPA(), TiledExact(), Emulation()
_known: IdentityMemo[tuple[tuple[Implementation, ...], Chosen]] = IdentityMemo()
"""Choices, and among which implementations, by the identity of the request: calls that are alike have one."""


def _same(implementations: tuple[Implementation, ...]) -> bool:
    return len(implementations) == len(IMPLEMENTATIONS) and all(map(is_, implementations, IMPLEMENTATIONS))


def _by_implementation(verdicts: list[Verdict]) -> dict[str, tuple[str, ...]]:
    """Reasons by implementation; those of several recipes on one kernel are told apart."""
    names = [verdict.implementation for verdict in verdicts]
    reasons: dict[str, tuple[str, ...]] = {}
    for v in verdicts:
        told = v.reasons if names.count(v.implementation) == 1 else tuple(f"[{v.recipe}] {r}" for r in v.reasons)
        reasons[v.implementation] = reasons.get(v.implementation, ()) + told
    return reasons


def explain_request(request: Request) -> Explanation:
    """What would run ``request``, and why not the others."""
    choice, verdicts = _decide(request)
    return Explanation(
        request=str(request),
        asked=str(request.recipe or "auto"),
        implementation=choice.implementation.name if choice else None,
        recipe=choice.recipe.name if choice else None,
        verdicts=tuple(verdicts),
    )


def _reasons(implementation: Implementation, request: Request, recipe: Recipe) -> tuple[str, ...]:
    """Every reason why it cannot run ``request``, also for want of the memory that its mask would take as a tensor."""
    reasons = implementation.not_supported_reasons(request, recipe)
    if implementation.reads(request):
        return reasons
    return (*reasons, *size_reasons(request.mask_text, request.mask_shape))


def _decide(request: Request) -> tuple[Chosen | None, list[Verdict]]:
    """The choice, if any, and a verdict on every implementation."""
    found: Chosen | None = None
    verdicts: list[Verdict] = []
    if request.recipe is None:
        found, verdicts = _fastest_kernel(request)
    recipe = request.recipe or EXACT
    for implementation in IMPLEMENTATIONS:
        if request.recipe is None and implementation.is_kernel:
            continue  # already judged
        reasons = _reasons(implementation, request, recipe)
        chosen = False
        if not reasons:
            if found is not None:
                reasons = (f"{found.implementation.name} comes first",)
            elif request.refuses_emulation and isinstance(implementation, Emulation):
                reasons = (emulated.REFUSED,)
            else:
                found, chosen, reasons = Chosen(implementation, recipe), True, (implementation.remark(request),)
        verdicts.append(Verdict(implementation.name, recipe.name, chosen, reasons))
    return found, verdicts


def _fastest_kernel(request: Request) -> tuple[Chosen | None, list[Verdict]]:
    """The kernel and recipe ``auto`` picks, if any, and what speaks for and against each."""
    candidates: list[tuple[float, Implementation, Recipe, str]] = []
    against: list[Verdict] = []
    for kernel in IMPLEMENTATIONS:
        slower = ""  # a recipe of the kernel's that was timed and lost: those after it are no faster
        for recipe in kernel.auto_recipes_for(request) if kernel.is_kernel else ():
            if reasons := (
                *_reasons(kernel, request, recipe),
                *((failed,) if (failed := failures.known(kernel.name, recipe, request)) is not None else ()),
                *kernel.not_worth_reasons(request),
                *outside_reasons(recipe, request.kv_len),
            ):
                against.append(Verdict(kernel.name, recipe.name, False, reasons))
                continue
            speedup = kernel.expected_speedup(request, recipe)
            card = device_name(request.device)
            if speedup is None:
                why = f"not timed on this card ({card})"
                if slower:
                    against.append(
                        Verdict(kernel.name, recipe.name, False, (f"{why}, and {slower} is slower than torch",))
                    )
                    continue
                shortest = min(request.q_len, request.kv_len)
                if shortest < AUTO_MIN_LENGTH:
                    why += f", and {shortest} tokens are fewer than {AUTO_MIN_LENGTH}"
                    against.append(Verdict(kernel.name, recipe.name, False, (why,)))
                    continue
                candidates.append(
                    (1.0, kernel, recipe, why + f"; from {AUTO_MIN_LENGTH} tokens on it is expected to win")
                )
            elif speedup < 1.0:
                slower = recipe.name
                why = f"expected on {card}: {speedup:.2f} × torch's speed"
                against.append(Verdict(kernel.name, recipe.name, False, (why,)))
            else:
                candidates.append((speedup, kernel, recipe, f"expected on {card}: {speedup:.2f} × torch's speed"))
    if not candidates:
        return None, against
    best = max(candidates, key=lambda c: c[0])  # the first of equals: kernels list their fastest recipe first
    verdicts = [
        Verdict(c[1].name, c[2].name, c is best, (c[3],) if c is best else (c[3], "another is faster"))
        for c in candidates
    ]
    return Chosen(best[1], best[2]), verdicts + against
