"""`Policy`: which recipe each call runs, as a JSON file that people can read and nothing executes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from ..errors import InvalidArgumentError
from ..recipe import Recipe
from ..recipes import RECIPES
from ..recipes import recipe as find_recipe
from .clock import CallKey
from .fingerprint import Fingerprint
from .records import read_document, write_lines

if TYPE_CHECKING:
    from ..machine import Machine
    from .choosing import Choice
    from .routing import Applied

SCHEMA = 1
FORMAT = "lowbit-attention policy"


class PolicyMismatchError(InvalidArgumentError):
    """A policy was made for another model. ``differences`` says in what they differ."""

    def __init__(self, differences: list[str]) -> None:
        self.differences = tuple(differences)
        super().__init__(
            f"the policy was made for another model: {'; '.join(differences)}. Calibrate this one, or pass "
            "strict=False if you know that its calls are the same"
        )


class PolicyWarning(UserWarning):
    """A policy is applied to a model that it was not made for."""


@dataclass(frozen=True)
class Policy:
    """One recipe a call.

    routes: recipe names by call. recipes: what those names mean. default: what unknown calls run; a call known at other
    timesteps only runs the recipe of the nearest one. scores: of every candidate on every call (``CosSim · (1 − L1)``).
    about: how it was chosen, for people.
    """

    routes: Mapping[CallKey, str]
    recipes: Mapping[str, Recipe]
    default: str = "exact"
    model: Fingerprint | None = None
    scores: Mapping[CallKey, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    library: str = __version__

    def __post_init__(self) -> None:
        used = {*self.routes.values(), self.default}
        if missing := sorted(used - {*self.recipes}):
            raise InvalidArgumentError(f"the policy uses {', '.join(missing)}, which is none of its recipes")

    def apply(
        self,
        model: torch.nn.Module | None = None,
        *,
        timesteps: Any = None,
        like: str | Machine | None = None,
        strict: bool = True,
    ) -> Applied:
        """Route every call of ``model`` from now on, until ``remove()`` of what is returned.

        Args:
            model: whose calls; ``None`` for a policy that was made without one.
            timesteps: what moves the steps, as in `observe`.
            like: whose numbers an emulation gives; ``None``: a kernel where one runs, else emulation as ``sm_89``.
            strict: refuse another model than the policy was made for; ``False`` warns.

        Raises:
            PolicyMismatchError: another model.
        """
        from .routing import Applied

        self._check(model, strict)
        return Applied(self, model, timesteps, like)

    @contextmanager
    def applied(
        self,
        model: torch.nn.Module | None = None,
        *,
        timesteps: Any = None,
        like: str | Machine | None = None,
        strict: bool = True,
    ) -> Iterator[Applied]:
        """`apply` within a block."""
        handle = self.apply(model, timesteps=timesteps, like=like, strict=strict)
        try:
            yield handle
        finally:
            handle.remove()

    def _check(self, model: torch.nn.Module | None, strict: bool) -> None:
        if (model is None) != (self.model is None):
            made, given = (
                ("without a model", "one")
                if model is not None
                else (f"for {self.model.model}", "none")
                if self.model
                else ("", "")
            )
            differences = [f"it was made {made}, and {given} was given"]
        else:
            differences = [] if model is None or self.model is None else self.model.differences(Fingerprint.of(model))
        if not differences:
            return
        if strict:
            raise PolicyMismatchError(differences)
        warnings.warn(f"policy for another model: {'; '.join(differences)}", PolicyWarning, stacklevel=4)

    def to_json(self) -> dict[str, Any]:
        """The document that `save` writes."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "library": self.library,
            "model": None if self.model is None else self.model.to_json(),
            "default": self.default,
            "about": dict(self.about),
            "recipes": [json.loads(r.to_json()) for r in self.recipes.values()],
            "calls": [
                {
                    **key.as_dict(),
                    "recipe": name,
                    "scores": dict(self.scores.get(key, {})),
                }
                for key, name in self.routes.items()
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON, a line for each call. The same policy gives the same bytes."""
        write_lines(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """What `save` wrote. It is read as plain data: nothing in it is executed.

        Raises:
            InvalidArgumentError: no such file, another format or version, or something that is no policy.
        """
        data = read_document(Path(path), FORMAT, SCHEMA)
        try:
            recipes = [Recipe.from_json(json.dumps(r)) for r in data["recipes"]]
            routes: dict[CallKey, str] = {}
            scores: dict[CallKey, dict[str, float]] = {}
            for call in data["calls"]:
                key = CallKey(str(call["name"]), int(call["index"]), float(call["timestep"]))
                if key in routes:
                    raise ValueError(f"{key} is there twice")
                routes[key] = str(call["recipe"])
                scores[key] = {str(n): float(s) for n, s in call["scores"].items()}
            policy = cls(
                routes=routes,
                recipes={r.name: r for r in recipes},
                default=str(data["default"]),
                model=None if data["model"] is None else Fingerprint.from_json(data["model"]),
                scores=scores,
                about=dict(data["about"]),
                library=str(data["library"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"{path} is no policy: {error}") from None
        for name, recipe in policy.recipes.items():
            if name in RECIPES and RECIPES[name] != recipe:
                warnings.warn(
                    f"{path}: {name} meant something else in lowbit-attention {policy.library}; the policy's own "
                    "options are used",
                    PolicyWarning,
                    stacklevel=2,
                )
        return policy


def make_policy(choice: Choice, model: torch.nn.Module | None, default: str) -> Policy:
    """A choice as a policy for ``model``."""
    seen = choice.observations
    if model is not None:
        if seen.model is None:
            raise InvalidArgumentError(
                "the observations were made without a model: their calls have no names of modules"
            )
        if differences := seen.model.differences(Fingerprint.of(model)):
            raise PolicyMismatchError(differences)
    names = dict.fromkeys([*choice.recipes.values(), find_recipe(default).name])
    known = {**seen.candidates, "exact": RECIPES["exact"]}
    return Policy(
        routes=dict(choice.recipes),
        recipes={name: known.get(name) or find_recipe(name) for name in names},
        default=find_recipe(default).name,
        model=seen.model,
        scores={key: {n: round(s.score, 6) for n, s in seen.records[key].scores.items()} for key in choice.recipes},
        about={
            "rule": choice.rule, "mode": choice.mode, "metric": choice.metric, "mean error": _finite(choice.error),
            "cost": choice.cost.name, "cost table": choice.cost.summary, "modelled seconds": _finite(choice.seconds),
            "modelled seconds, all exact": _finite(choice.exact_seconds), "scored like": seen.like,
            "share": {n: round(s, 4) for n, s in choice.share().items()}, "notes": list(choice.notes),
        },
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
