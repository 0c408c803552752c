"""One sampling run after another: where it is (the sigma), and the line that is logged at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import InvalidArgumentError
from ..call_report import TORCH, CallKind, CallReport

log = logging.getLogger("lowbit_attention.comfyui")

LARGEST_SIGMA = 10_000.0
"""No model's noise is larger: a window up to here is open."""
OUTSIDE = "the sigma is outside of the window"
SCORED = CallKind(TORCH, "-", "scored, and run as before")
_NO_SIGMA = "no sigma is known, and a window is set"
_SHOWN = 3
"""So many reasons stand in the line."""


class SigmaWindow:
    """The sigmas at which a recipe runs: from ``start`` down to ``end``, both included.

    Raises:
        InvalidArgumentError: no numbers, or the start is below the end.
    """

    def __init__(self, start: float = LARGEST_SIGMA, end: float = 0.0) -> None:
        for name, value in (("sigma_start", start), ("sigma_end", end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise InvalidArgumentError(f"{name}={value!r} is no number")
        if start < end:
            raise InvalidArgumentError(
                f"sigma_start={start} is below sigma_end={end}: sampling goes from large sigmas to small ones"
            )
        self.start, self.end = float(start), float(end)
        self._last: tuple[Any, float] | None = None

    @property
    def is_open(self) -> bool:
        """Whether every sigma is inside."""
        return self.start >= LARGEST_SIGMA and self.end <= 0

    def forget(self) -> None:
        """A forward of the model begins: its sigma is read anew, once."""
        self._last = None

    def why_not(self, options: Mapping[str, Any]) -> str:
        """Why a call with these ``transformer_options`` is outside; empty if it is inside."""
        if self.is_open:
            return ""
        sigmas = options.get("sigmas")
        if sigmas is None:
            return _NO_SIGMA
        last = self._last
        if last is None or last[0] is not sigmas:  # (reading it waits for the GPU)
            self._last = last = sigmas, sigma_of(sigmas)
        return "" if self.end <= last[1] <= self.start else OUTSIDE

    def __str__(self) -> str:
        return "" if self.is_open else f", sigma {self.start:g} to {self.end:g}"


def sigma_of(sigmas: Any) -> float:
    """The sigma of a step: the largest of a batch.

    Raises:
        InvalidArgumentError: it holds none.
    """
    if isinstance(sigmas, Tensor) and sigmas.numel():
        return float(sigmas.max())
    if isinstance(sigmas, int | float):
        return float(sigmas)
    raise InvalidArgumentError(f"no sigma in {type(sigmas).__name__}")


class Runs:
    """Wrappers of ComfyUI's around a sampling run and around each forward of the model.

    Args:
        what: what runs, for the line.
        report: what is counted in it, from zero in every run.
        verbose: log the whole table, too.
        begin_forward: called before each forward, with its sigma (a tensor).
        begin_run, end_run: called before and after each run; ``end_run`` with whether it came to its end.
    """

    def __init__(
        self,
        what: str,
        report: CallReport,
        verbose: bool,
        begin_forward: Callable[[Any], None],
        begin_run: Callable[[], None] = lambda: None,
        end_run: Callable[[bool], None] = lambda finished: None,
    ) -> None:
        self._what, self._report, self._verbose = what, report, verbose
        self._begin_forward, self._begin_run, self._end_run = begin_forward, begin_run, end_run
        self._inside = False

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a run. One within another (a sampler that samples, a wrapper that was added twice) is part of it."""
        if self._inside:
            return executor(*args, **kwargs)
        if self._report.calls:
            log.info("%s", self._line("outside of a run: "))
        self._report.clear()
        self._begin_run()
        finished, self._inside = False, True
        try:
            out = executor(*args, **kwargs)
            finished = True
            return out
        finally:
            self._inside = False
            self._say(finished)
            self._end_run(finished)

    def apply_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a forward: ``apply_model(x, t, …)``, and t is the sigma."""
        self._begin_forward(args[1] if len(args) > 1 else kwargs.get("t"))
        return executor(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Runs:
        return self  # (ComfyUI may copy the wrappers of a model that is cloned: the counts are the node's)

    def _say(self, finished: bool) -> None:
        useful = self._report.ran or SCORED in self._report.counts
        level = logging.INFO if useful else logging.WARNING
        log.log(level, "%s", self._line("" if finished else "stopped early: "))
        if self._verbose and self._report.calls:
            log.info("%s", str(self._report))
        self._report.clear()

    def _line(self, begin: str) -> str:
        report = self._report
        head = f"lowbit-attention ({self._what}): {begin}"
        if not report.calls:
            return (
                f"{head}no attention call arrived: a node behind this one has taken its place, or the model does not "
                "call ComfyUI's attention"
            )
        counts = report.counts
        scored = counts.pop(SCORED, 0)
        if scored:
            line = f"{head}{scored} of {report.calls} attention calls were scored"
        else:
            by = ", ".join(f"{n} by {k.implementation} [{k.recipe}]" for k, n in counts.items() if k.recipe != "-")
            line = f"{head}{report.ran} of {report.calls} attention calls ran in low precision"
            line += f" ({by})" if by else ""
        left = {kind.reason: n for kind, n in counts.items() if kind.recipe == "-"}
        if left:
            told = "; ".join(f"{n}: {reason}" for reason, n in list(left.items())[:_SHOWN])
            more = f"; and {len(left) - _SHOWN} more reasons" if len(left) > _SHOWN else ""
            line += f"; {sum(left.values())} were left to ComfyUI ({told}{more})"
        return line
