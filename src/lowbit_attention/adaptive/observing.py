"""`observe`: a model runs as it always does, and every attention call is scored on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends.base import call_torch
from ..bench.shapes import Shape
from ..call.torch_call import TorchCall
from ..errors import InvalidArgumentError, UnsupportedError
from ..integrations.intercept import intercepted
from ..output.console import console, visible
from ..recipes.definition import Recipe
from ..recipes.machine import Machine, resolve_machine
from ..recipes.named import recipe as find_recipe
from .clock import CallKey, Clock, driven
from .distributions import add_call, new_distribution
from .fingerprint import Fingerprint
from .records import Observations, Record, Score
from .scoring import Sample, ScoredCall, query_tile, score, take

DEFAULT_CANDIDATES = ("sage2_8b", "sage2pp_8b", "sage2_4b", "rotated_4b")
_MOST_CALLS = 200_000
"""Different calls that are kept: about 1 kB each. More means that timesteps never repeat."""
_DISTRIBUTION_CALLS = 64
"""How often a name's distributions are looked at: more calls of the same layer change them little."""


class Observer:
    """What `observe` gives: `observations`, and the clock's two hands."""

    def __init__(self, observations: Observations, sample: Sample, machine: Machine | None) -> None:
        self.observations = observations
        self.clock = Clock()
        self._sample, self._machine = sample, machine
        self._tile = query_tile(machine)
        self._progress: Any = None
        self._task: Any = None
        self._looked: dict[str, int] = {}

    def step(self, timestep: float | None = None) -> None:
        """Begin a step (before its calls): the timestep's value, or none to number them."""
        self.clock.step(timestep)

    def restart(self) -> None:
        """Begin a new run (prompt): the next step is the first again."""
        self.clock.restart()

    watches_gradients = True
    """Also in code that torch.compile made: such calls leave it (`integrations.scope.Handler`)."""

    def __call__(self, original: Any, name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        """One call: exact attention's output goes back to the model."""
        key = self.clock.key(name)
        begin = _now(args)
        out = call_torch(original, *args, **kwargs)
        middle = _now(args)
        try:
            given = TorchCall.of(*args, **kwargs)
            call = ScoredCall.of(given)
        except InvalidArgumentError:  # (nested, traced, transformed: what no recipe could run is not scored)
            return out
        if call.q.is_meta:
            return out
        self._score(key, call, given.dropout_p)
        self.observations.attention_seconds += middle - begin
        self.observations.scoring_seconds += _now(args) - middle
        return out

    def _score(self, key: CallKey, call: ScoredCall, dropout: float) -> None:
        if 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape:
            return
        seen = self.observations
        record = seen.records.get(key)
        if record is None:
            if len(seen.records) >= _MOST_CALLS:
                raise InvalidArgumentError(
                    f"{len(seen.records)} different calls were observed, and {key} is one more: do the timesteps never "
                    "repeat? Call restart() before each run"
                )
            record = Record(key, _shape(call), str(call.q.dtype).removeprefix("torch."), _mask_kind(call))
            record.scores = {name: Score() for name in seen.candidates}
            seen.records[key] = record
        turn = record.count + key.index + round(key.timestep)
        sampled = take(call, self._sample, self._tile, turn)
        record.count += 1
        if not record.problem:
            try:
                if dropout:
                    raise UnsupportedError(f"it has dropout ({dropout}), as a model in training has")
                for name, metrics in score(sampled, list(seen.candidates.values()), self._machine).items():
                    record.scores[name].add(metrics)
            except UnsupportedError as error:  # float64, a head dimension above 256: such a call stays exact
                record.problem = str(error)
        if (shape := _shape(call)).flops > record.shape.flops:
            record.shape = shape
        looked = self._looked.get(key.name, 0)
        if looked < _DISTRIBUTION_CALLS:
            self._looked[key.name] = looked + 1
            distribution = seen.distributions.setdefault(key.name, new_distribution())
            add_call(distribution, sampled.call, self._tile, self._sample.tokens, turn)
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=f"observing {visible(key)}")


@contextmanager
def observe(
    model: torch.nn.Module | None = None,
    candidates: Sequence[str | Recipe] = DEFAULT_CANDIDATES,
    *,
    timesteps: Any = None,
    sample: Sample = Sample(),
    like: str | Machine | None = None,
    resume: Observations | None = None,
    progress: bool | Any = False,
) -> Iterator[Observer]:
    """Within the block, every ``scaled_dot_product_attention`` of ``model`` is scored with every candidate.

    The model's own output stays exact attention's. Kept are statistics, never tensors.

    Args:
        model: whose calls, named by their module's dotted path; ``None``: every call of the process, by its number.
        candidates: recipes, or their names with changes (`lowbit_attention.recipe`).
        timesteps: ``None`` (call `Observer.step` yourself, or there is one step, begun anew by every forward of the
            model), ``"forwards"`` (every forward of the model is the next step), or a scheduler with a ``step`` method.
        sample: how much of each call is scored.
        like: whose numbers an emulation gives (``"sm_89"``, …); ``None``: what `attention` runs on this device.
        resume: observations to go on with: the same model, candidates and ``like``.
        progress: ``True``, or a `rich.progress.Progress` to show a line in.

    >>> import torch.nn.functional as F
    >>> q = k = v = torch.randn(1, 2, 64, 32)
    >>> with observe(candidates=["sage2_8b", "sage2_4b"]) as watch:
    ...     out = F.scaled_dot_product_attention(q, k, v)
    >>> found = watch.observations
    >>> found.names, found.mean("sage2_8b") < found.mean("sage2_4b")
    (['call 0'], True)

    Raises:
        InvalidArgumentError: no candidate, one named twice or exact; timesteps as `driven` says; observations to resume
            of another kind.
    """
    recipes = [find_recipe(c) for c in candidates]
    by_name = {r.name: r for r in recipes}
    if not recipes or len(by_name) < len(recipes) or any(r.is_exact for r in recipes):
        raise InvalidArgumentError(
            f"candidates must be different recipes that quantise, got {', '.join(r.name for r in recipes) or 'none'}"
        )
    machine = None if like is None else resolve_machine(like)
    for r in recipes:
        if machine is not None:
            r.check_geometry(machine.geometry)
    fingerprint = None if model is None else Fingerprint.of(model)
    if resume is not None:
        if problems := resume.conflicts(by_name, machine.name if machine else None, fingerprint):
            raise InvalidArgumentError(f"these observations cannot be resumed: {'; '.join(problems)}")
        observations = resume
    else:
        observations = Observations(by_name, machine.name if machine else None, fingerprint)
    observer = Observer(observations, sample, machine)
    with ExitStack() as stack:
        if progress is not False:
            observer._progress = stack.enter_context(_bar()) if progress is True else progress
            observer._task = observer._progress.add_task("observing", total=None)
        stack.enter_context(driven(observer.clock, timesteps, model))
        stack.enter_context(intercepted(observer, model))
        try:
            yield observer
        finally:
            observations.runs += observer.clock.runs


def _bar() -> Any:
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    # (names of modules are shown as they are, not read as markup)
    what = TextColumn("{task.description}", markup=False)
    columns = what, TextColumn("{task.completed:g} calls"), TimeElapsedColumn()
    return Progress(*columns, console=console(stderr=True), transient=True)


def _now(args: tuple[Any, ...]) -> float:
    """Seconds, once a GPU has done what it was asked."""
    if args and isinstance(args[0], Tensor) and args[0].is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(args[0].device).synchronize()
    return time.perf_counter()


def _shape(call: ScoredCall) -> Shape:
    batch, heads, rows, dim = call.q.shape
    found = Shape("call", batch, heads, call.k.shape[1], rows, call.k.shape[2], dim, call.is_causal)
    return replace(found, name=found.label)


def _mask_kind(call: ScoredCall) -> str:
    if call.mask is None:
        return "none"
    return "bool" if call.mask.dtype == torch.bool else "float"
