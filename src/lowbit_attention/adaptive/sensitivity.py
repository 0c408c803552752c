"""What a recipe in one layer (or timestep) alone does to the end result, measured by running the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import InvalidArgumentError, shown
from ..evaluation.metrics import compare
from .clock import CallKey
from .documents import DAMAGE, list_of, number_of, object_of, read_document, text_of, write_lines
from .policy import Policy
from .records import Observations
from .routing import Applied

By = Literal["layer", "timestep"]
FORMAT, SCHEMA = "lowbit-attention sensitivity", 1
Run = Callable[[Applied], Any]
EffectOf = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Sensitivity:
    """effects: by group (a layer's name, or a timestep) and recipe, how far the result moves when that group alone runs
    the recipe. repeated: how far it moves when nothing is changed, the noise of the measurement."""

    by: By
    effects: dict[str | float, dict[str, float]]
    repeated: float

    def group(self, key: CallKey) -> str | float:
        """The group that a call belongs to."""
        return key.name if self.by == "layer" else key.timestep

    def effect(self, group: str | float, recipe: str) -> float:
        """A group's effect; ``exact`` has none.

        Raises:
            InvalidArgumentError: it was not measured.
        """
        if recipe == "exact":
            return 0.0
        try:
            return self.effects[group][recipe]
        except KeyError:
            raise InvalidArgumentError(f"no effect of {recipe} in {self.by} {group} was measured") from None

    def save(self, path: str | Path) -> None:
        """Write it as JSON; whole or not at all (`lowbit_attention.output.saving`).

        Raises:
            InvalidArgumentError: the path is no file's. SaveError: it cannot be written.
        """
        groups = [{"group": g, **recipes} for g, recipes in self.effects.items()]
        write_lines(
            path, {"format": FORMAT, "schema": SCHEMA, "by": self.by, "repeated": self.repeated, "effects": groups}
        )

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """What `save` wrote.

        Raises:
            InvalidArgumentError: no such file, or something else is in it.
        """
        data = read_document(path, FORMAT, SCHEMA)
        try:
            if data["by"] not in ("layer", "timestep"):
                raise ValueError(f"by is {shown(data['by'])}")
            effects: dict[str | float, dict[str, float]] = {}
            for entry in list_of(data["effects"], "effects"):
                given = object_of(entry, "an effect").pop("group")
                group = text_of(given, "group") if data["by"] == "layer" else number_of(given, "group")
                if group in effects:
                    raise ValueError(f"the group {shown(group)} is there twice")
                effects[group] = {name: number_of(x, f"the effect of {name}", 0.0) for name, x in entry.items()}
            return cls(data["by"], effects, number_of(data["repeated"], "repeated", 0.0))
        except DAMAGE as error:
            raise InvalidArgumentError(f"{path} is damaged: {' '.join(repr(error).split())}") from None


def relative_l1(exact: Any, other: Any) -> float:
    """How far a result moved: ``Σ|a − b| / Σ|a|`` of tensors, the distance of numbers."""
    if isinstance(exact, torch.Tensor) and exact.numel() > 1:
        return compare(exact, other).l1
    return abs(float(other) - float(exact))


def sensitivity(
    run: Run,
    observations: Observations,
    *,
    model: torch.nn.Module | None = None,
    by: By = "layer",
    recipes: Sequence[str] | None = None,
    metric: EffectOf = relative_l1,
    timesteps: Any = None,
    like: str | None = None,
    advance: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Run the model once for each layer (or timestep) and recipe, with everything else exact.

    Args:
        run: runs the model on the same inputs (and noise) each time and returns its output or loss; given the
            `Applied` policy, for ``step`` and ``restart`` where nothing else moves the clock.
        observations: which calls there are.
        recipes: of the candidates; all by default.
        metric: how far two results are apart, at least 0: ``metric(exact result, result)``.
        like: whose numbers; by default those the observations were scored as.
        advance: called before each of the ``1 + groups · recipes`` runs after the first.

    Raises:
        InvalidArgumentError: an unknown ``by`` or recipe, a metric that is negative or not finite.
    """
    if by not in ("layer", "timestep"):
        raise InvalidArgumentError(f"by={by!r} is neither 'layer' nor 'timestep'")
    names = list(recipes if recipes is not None else observations.candidates)
    if unknown := [name for name in names if name not in observations.candidates]:
        raise InvalidArgumentError(
            f"{', '.join(unknown)}: not observed; observed were {', '.join(observations.candidates)}"
        )
    machine = observations.like if like is None else like
    tell = advance or (lambda _: None)
    found = Sensitivity(by, {}, 0.0)
    groups: dict[str | float, list[CallKey]] = {}
    for key in observations.records:
        groups.setdefault(found.group(key), []).append(key)

    def result(recipe: str, keys: Sequence[CallKey]) -> Any:
        routes = dict.fromkeys(observations.records, "exact") | dict.fromkeys(keys, recipe)
        everything = {**observations.candidates, "exact": _exact()}
        policy = Policy(routes, everything, model=observations.model)
        with policy.applied(model, timesteps=timesteps, like=machine, on_emulation="allow") as applied:
            return run(applied)

    def distance(other: Any) -> float:
        value = float(metric(base, other))
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgumentError(f"metric gave {value}: a distance is finite and not negative")
        return value

    base = result("exact", ())
    tell("once more, unchanged")
    repeated = distance(result("exact", ()))
    for group, keys in groups.items():
        found.effects[group] = {}
        for name in names:
            tell(f"{by} {group}: {name}")
            found.effects[group][name] = distance(result(name, keys))
    return Sensitivity(by, found.effects, repeated)


def _exact() -> Any:
    from ..recipes.named import EXACT

    return EXACT
