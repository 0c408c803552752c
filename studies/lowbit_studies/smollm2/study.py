"""The whole study: every text at every context by every way, and each layer's errors; kept as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_attention import LowbitError

from ..files import read_csv, write_csv
from . import policies, texts
from .measure import NotQuantisedError, Ran, Way, exact_way, judge, layer_errors, recipe_way, yardsticks
from .model import Witness

ENDS, LAYERS = "ends.csv", "layers.csv"
CALIBRATION_CONTEXT = 2048


@dataclass(frozen=True)
class Settings:
    """tokens: of each text. at_once: tokens of a forward, or one window. seconds: after which nothing new is begun.

    shuffles: random policies beside the adaptive one; ``None``: no policy at all.
    """

    texts: Sequence[str]
    contexts: Sequence[int]
    recipes: Sequence[str]
    tokens: int = 8192
    at_once: int = 8192
    like: str | None = None
    shuffles: int | None = 2
    layers: bool = True
    seconds: float = float("inf")


@dataclass
class Found:
    """What was measured so far. skipped: recipes that do not run here, and why."""

    folder: Path
    ends: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def resumed(cls, folder: Path) -> Found:
        """What an earlier run has left in the folder."""
        return cls(folder, read_csv(folder / ENDS), read_csv(folder / LAYERS))

    def has(self, text: str, context: int, way: str) -> bool:
        """Whether that was measured already."""
        return any((row["text"], int(row["context"]), row["way"]) == (text, context, way) for row in self.ends)

    def has_layers(self, text: str, context: int) -> bool:
        """Whether that was measured already."""
        return any((row["text"], int(row["context"])) == (text, context) for row in self.layers)

    def save(self) -> None:
        """Write both tables."""
        write_csv(self.folder / ENDS, self.ends)
        write_csv(self.folder / LAYERS, self.layers)


Advance = Callable[[str], None]


def steps(settings: Settings, layers: int) -> int:
    """How often `run` calls ``advance``, if nothing is resumed."""
    shuffles = settings.shuffles
    ways = 1 + len(yardsticks()) + len(settings.recipes) + (0 if shuffles is None else 1 + shuffles)
    calibration = 0 if shuffles is None else policies.runs(layers)
    return len(settings.texts) * len(settings.contexts) * (ways + settings.layers) + calibration


def run(witness: Witness, settings: Settings, found: Found, advance: Advance) -> None:
    """Measure what is missing in ``found``, which is saved after every text.

    Raises:
        NotQuantisedError: a call did not run what it should.
    """
    begun = time.perf_counter()
    tokens = {name: witness.tokenize(texts.read(name)) for name in settings.texts}
    ways = [*yardsticks(), *(recipe_way(name, settings.like) for name in settings.recipes)]
    ways += _policies(witness, settings, found.folder, advance)
    for context in settings.contexts:
        for text in settings.texts:
            windows = texts.windows(tokens[text], context, max(context, settings.tokens))
            place = {"text": text, "context": context}
            late = _late(begun, settings) or _all_ways(witness, ways, windows, place, settings, found, begun, advance)
            found.save()
            if late:
                found.complete = False
                return
    found.complete = True


def _late(begun: float, settings: Settings) -> bool:
    return time.perf_counter() - begun > settings.seconds


def _policies(witness: Witness, settings: Settings, folder: Path, advance: Advance) -> list[Way]:
    if settings.shuffles is None:
        return []
    if ways := policies.stored(folder, settings.like):
        return ways
    context = min(CALIBRATION_CONTEXT, *settings.contexts)
    windows = texts.windows(witness.tokenize(texts.read(texts.CALIBRATION)), context, 2 * context)
    return policies.calibrate(witness, windows, settings.like, settings.shuffles, folder, advance)


def _all_ways(
    witness: Witness,
    ways: Sequence[Way],
    windows: Tensor,
    place: dict[str, Any],
    settings: Settings,
    found: Found,
    begun: float,
    advance: Advance,
) -> bool:
    """One text at one context; whether time ran out on the way."""
    text, context = place["text"], place["context"]
    parts = torch.split(windows, max(1, settings.at_once // context))
    where = f"{text}, {context} tokens"
    missing = [way for way in ways if not found.has(text, context, way.name) and way.name not in found.skipped]
    rows: dict[str, list[dict[str, Any]]] = {}
    late = False
    for part in parts if missing else ():
        exact = None
        for way in [exact_way(), *missing]:
            if late := _late(begun, settings):
                break
            advance(f"{where}: {way.name}")
            done = _run(way, witness, part, found)
            if done is None:
                continue
            out, facts = done
            exact = out if exact is None else exact
            mine = rows.setdefault(way.name, [])
            for end in judge(exact, out, part):
                mine.append({**place, "window": len(mine), "way": way.name, "kind": way.kind, **asdict(end), **facts})
    for name, measured in rows.items():  # (whole texts only)
        if len(measured) == len(windows) and not found.has(text, context, name):
            found.ends += measured
    if settings.layers and not late and not found.has_layers(text, context):
        advance(f"{where}: layer by layer")
        recipes = [name for name in settings.recipes if name not in found.skipped]
        found.layers += [{**place, **row} for row in layer_errors(witness, parts[0], recipes, settings.like)]
    return late


def _run(way: Way, witness: Witness, part: Tensor, found: Found) -> tuple[Tensor, dict[str, Any]] | None:
    """Logits and what is to be said of the run; ``None``, and noted, if the recipe cannot run here."""
    start = time.perf_counter()
    try:
        out, ran = way.run(witness, part)
    except NotQuantisedError:
        raise
    except LowbitError as error:
        found.skipped[way.name] = " ".join(str(error).split())
        return None
    if out.is_cuda:
        torch.cuda.synchronize()
    facts = {
        "ran_on": _described(way, ran),
        "calls": sum(ran.values()) or witness.layers,
        "four_bits": way.four_bits,
        "seconds": (time.perf_counter() - start) / len(part),
    }
    return out, facts


def _described(way: Way, ran: Ran) -> str:
    if way.kind == "policy":
        return " + ".join(f"{n} {name}" for name, n in sorted(ran.items(), key=lambda item: -item[1]))
    return " + ".join(ran) or "torch, float32"
