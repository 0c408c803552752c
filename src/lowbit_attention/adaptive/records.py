"""`Observations`: what was measured of every call. Scores and histograms, never tensors; JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..bench.shapes import Shape, parse_shape
from ..errors import InvalidArgumentError, shown
from ..evaluation.metrics import Metrics
from ..recipes.definition import Recipe
from .clock import CallKey
from .distributions import Distribution, Summary, new_distribution
from .documents import DAMAGE, count_of, list_of, number_of, object_of, read_document, text_of, write_lines
from .fingerprint import Fingerprint

SCHEMA = 1
FORMAT = "lowbit-attention observations"
METRICS = ("cos_sim", "l1", "rmse", "score")
_COLUMNS = ["count", *METRICS, "worst"]
_WORST = {"cos_sim": -1.0, "l1": math.inf, "rmse": math.inf, "score": -math.inf, "worst": math.inf}
"""What ``null`` stands for in a file: a number that was not finite."""


@dataclass
class Score:
    """One recipe on one call, averaged over the times the call was seen; ``worst`` is the largest L1."""

    count: int = 0
    cos_sim: float = 0.0
    l1: float = 0.0
    rmse: float = 0.0
    score: float = 0.0
    worst: float = 0.0

    def add(self, metrics: Metrics) -> None:
        """Take one more measurement into the averages; one without rows (NaN) counts nothing."""
        if not math.isnan(metrics.l1):
            self._join(1, metrics.cos_sim, metrics.l1, metrics.rmse, metrics.score, metrics.l1)

    def merge(self, other: Score) -> None:
        """Take another's measurements into the averages."""
        if other.count:
            self._join(other.count, other.cos_sim, other.l1, other.rmse, other.score, other.worst)

    def _join(self, count: int, cos_sim: float, l1: float, rmse: float, score: float, worst: float) -> None:
        total = self.count + count
        values = (("cos_sim", cos_sim), ("l1", l1), ("rmse", rmse), ("score", score))
        for name, value in values:
            mine: float = getattr(self, name)
            setattr(self, name, mine + (value - mine) * count / total)
        self.count, self.worst = total, max(self.worst, worst)


@dataclass
class Record:
    """Everything known of one call. ``shape``: of the largest one seen. ``problem``: why recipes cannot run it."""

    key: CallKey
    shape: Shape
    dtype: str
    mask: str
    count: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    problem: str = ""

    def merge(self, other: Record) -> None:
        """Add what was seen of the same call."""
        if other.shape.flops > self.shape.flops:
            self.shape = other.shape
        self.count += other.count
        self.problem = self.problem or other.problem
        for name, score in other.scores.items():
            self.scores.setdefault(name, Score()).merge(score)


@dataclass
class Observations:
    """Every observed call by its key, in the order of their first appearance.

    candidates: the recipes that were scored, by name. like: whose numbers (a machine's name, or ``None``: what
    `attention` ran there). distributions: of Q, K and V, by name. runs: how often step 0 was begun. seconds: spent in
    attention itself, and in scoring.
    """

    candidates: dict[str, Recipe]
    like: str | None = None
    model: Fingerprint | None = None
    records: dict[CallKey, Record] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(default_factory=dict)
    runs: int = 0
    attention_seconds: float = 0.0
    scoring_seconds: float = 0.0
    library: str = __version__

    @property
    def names(self) -> list[str]:
        """The calls' names, as first seen."""
        return list(dict.fromkeys(key.name for key in self.records))

    @property
    def timesteps(self) -> list[float]:
        """The timesteps, as first seen."""
        return list(dict.fromkeys(key.timestep for key in self.records))

    def mean(self, recipe: str, metric: str = "l1") -> float:
        """A recipe's metric averaged over all calls; ``exact`` has no error."""
        if recipe == "exact":
            return 1.0 if metric in ("cos_sim", "score") else 0.0
        values = [getattr(r.scores[recipe], metric) for r in self.records.values() if r.scores[recipe].count]
        return math.fsum(values) / len(values) if values else math.nan

    def merge(self, other: Observations) -> None:
        """Add other prompts' observations.

        Raises:
            InvalidArgumentError: of another model, with other recipes, or scored as another machine.
        """
        if problems := self.conflicts(other.candidates, other.like, other.model):
            raise InvalidArgumentError(f"these observations do not go together: {'; '.join(problems)}")
        for key, record in other.records.items():
            if key in self.records:
                self.records[key].merge(record)
            else:
                self.records[key] = _copy(record)
        for name, distribution in other.distributions.items():
            mine = self.distributions.setdefault(name, new_distribution())
            for tensor, stages in distribution.items():
                for stage, summary in stages.items():
                    mine[tensor][stage].merge(summary)
        self.runs += other.runs
        self.attention_seconds += other.attention_seconds
        self.scoring_seconds += other.scoring_seconds

    def conflicts(self, candidates: dict[str, Recipe], like: str | None, model: Fingerprint | None) -> list[str]:
        """Why measurements of this kind cannot be added to these."""
        found = []
        if candidates != self.candidates:
            found.append(f"recipes {', '.join(self.candidates)} and {', '.join(candidates)} (or their options) differ")
        if like != self.like:
            found.append(f"scored as {self.like} and as {like}")
        if (model is None) != (self.model is None):
            found.append("one of them with a model and the other without")
        if model is not None and self.model is not None:
            found += self.model.differences(model)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each call and recipe, for a CSV file."""
        return [
            {"name": key.name, "index": key.index, "timestep": key.timestep, "shape": r.shape.label, "dtype": r.dtype,
             "mask": r.mask, "recipe": name, "count": s.count, "cos_sim": s.cos_sim, "l1": s.l1, "rmse": s.rmse,
             "score": s.score, "worst_l1": s.worst}
            for key, r in self.records.items()
            for name, s in r.scores.items()
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The document that `save` writes."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "library": self.library,
            "model": None if self.model is None else self.model.to_json(),
            "like": self.like,
            "runs": self.runs,
            "attention_seconds": round(self.attention_seconds, 4),
            "scoring_seconds": round(self.scoring_seconds, 4),
            "recipes": [json.loads(r.to_json()) for r in self.candidates.values()],
            "columns": _COLUMNS,
            "calls": [
                {
                    **key.as_dict(), "shape": r.shape.label, "dtype": r.dtype, "mask": r.mask, "count": r.count,
                    "problem": r.problem,
                    "scores": {n: [s.count, *(getattr(s, m) for m in METRICS), s.worst] for n, s in r.scores.items()},
                }
                for key, r in self.records.items()
            ],
            "distributions": {
                name: {t: {stage: s.to_json() for stage, s in stages.items()} for t, stages in d.items()}
                for name, d in self.distributions.items()
            },
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write it as JSON, a line for each call; whole or not at all (`lowbit_attention.output.saving`).

        A number that is not finite, such as the error of a recipe that gave NaN, is ``null`` there.

        Raises:
            InvalidArgumentError: the path is no file's. SaveError: it cannot be written.
        """
        write_lines(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Observations:
        """What `save` wrote. It is read as plain data, every value of its type and within its bounds.

        Raises:
            InvalidArgumentError: no such file, or something else is in it.
        """
        data = read_document(path, FORMAT, SCHEMA)
        try:
            if data["columns"] != _COLUMNS:
                raise ValueError(f"its columns are {shown(data['columns'])}, not {', '.join(_COLUMNS)}")
            found = cls(
                candidates=recipes_of(data["recipes"]),
                like=None if data["like"] is None else text_of(data["like"], "like"),
                model=None if data["model"] is None else Fingerprint.from_json(data["model"]),
                runs=count_of(data["runs"], "runs"),
                attention_seconds=number_of(data["attention_seconds"], "attention_seconds", 0.0),
                scoring_seconds=number_of(data["scoring_seconds"], "scoring_seconds", 0.0),
                library=text_of(data["library"], "library"),
            )
            for call in list_of(data["calls"], "calls"):
                record = _record(object_of(call, "a call"), found.candidates)
                if record.key in found.records:
                    raise ValueError(f"{record.key} is there twice")
                found.records[record.key] = record
            for name, d in object_of(data["distributions"], "distributions").items():
                mine = found.distributions.setdefault(name, new_distribution())
                for tensor, stages in mine.items():
                    for stage in stages:
                        stages[stage] = Summary.from_json(d[tensor][stage])
        except DAMAGE as error:
            raise InvalidArgumentError(f"{path} is damaged: {_why(error)}") from None
        return found


def _why(error: BaseException) -> str:
    """A damage in one line; a missing key's text is the key alone."""
    return " ".join((str(error) if isinstance(error, ValueError) else repr(error)).split())


def recipes_of(entries: Any) -> dict[str, Recipe]:
    """The recipes of a document, by name. ValueError: something else, or a name defined twice."""
    found: dict[str, Recipe] = {}
    for entry in list_of(entries, "recipes"):
        recipe = Recipe.from_json(json.dumps(object_of(entry, "a recipe")))
        if recipe.name in found:
            raise ValueError(f"the recipe {shown(recipe.name)} is defined twice")
        found[recipe.name] = recipe
    return found


def key_of(call: dict[str, Any]) -> CallKey:
    """The key of a document's call. ValueError: something else."""
    index, timestep = count_of(call["index"], "index"), number_of(call["timestep"], "timestep")
    return CallKey(text_of(call["name"], "name"), index, timestep)


def _copy(record: Record) -> Record:
    fresh = Record(record.key, record.shape, record.dtype, record.mask)
    fresh.merge(record)
    return fresh


def _record(call: dict[str, Any], recipes: Iterable[str]) -> Record:
    key, shape = key_of(call), parse_shape(text_of(call["shape"], "shape"))
    if shape.mask:
        raise ValueError(f"the shape {shown(shape.name)} names a mask of the benchmark")
    dtype, mask = text_of(call["dtype"], "dtype"), text_of(call["mask"], "mask")
    record = Record(key, shape, dtype, mask, count_of(call["count"], "count"))
    record.problem = text_of(call.get("problem", ""), "problem")
    known = list(recipes)
    for name, numbers in object_of(call["scores"], "scores").items():
        if name not in known:
            raise ValueError(f"scores of {shown(name)}, which is none of its recipes")
        if len(list_of(numbers, f"the score of {name}")) != len(_COLUMNS):
            raise ValueError(f"{key} has {len(numbers)} numbers of {name}, not {len(_COLUMNS)}")
        count, *values = numbers
        worst = (_WORST[m] if v is None else number_of(v, m) for m, v in zip(_COLUMNS[1:], values, strict=True))
        record.scores[name] = Score(count_of(count, "count"), *worst)
    if missing := [name for name in known if name not in record.scores]:
        raise ValueError(f"{key} has no score of {', '.join(missing)}")
    return record
