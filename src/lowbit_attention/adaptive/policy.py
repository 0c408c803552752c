"""`Policy`: which recipe each call runs, as a JSON file that people can read and nothing executes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from ..call.checks import ON_EMULATION, check_choice, check_flag
from ..call.request import OnEmulation
from ..errors import InvalidArgumentError, shown
from ..recipes.definition import Recipe
from ..recipes.named import RECIPES
from .clock import CallKey
from .documents import DAMAGE, check_plain, list_of, number_of, object_of, read_document, text_of, write_lines
from .fingerprint import Fingerprint
from .records import key_of, recipes_of
from .routing import Applied

if TYPE_CHECKING:
    from ..recipes.machine import Machine

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
    about: how it was chosen, for people: what JSON can hold.

    Raises:
        InvalidArgumentError: a value of another type, a call's recipe or the default that is none of ``recipes``, or an
            ``about`` that JSON cannot hold (NaN, an object).
    """

    routes: Mapping[CallKey, str]
    recipes: Mapping[str, Recipe]
    default: str = "exact"
    model: Fingerprint | None = None
    scores: Mapping[CallKey, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    library: str = __version__

    def __post_init__(self) -> None:
        if reasons := _type_reasons(self):
            raise InvalidArgumentError(reasons[0])
        check_plain(self.about, "about")
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
        on_emulation: OnEmulation = "warn",
    ) -> Applied:
        """Route every call of ``model`` from now on, until ``remove()`` of what is returned.

        Args:
            model: whose calls; ``None`` for a policy that was made without one.
            timesteps: what moves the steps, as in `observe`.
            like: whose numbers an emulation gives; ``None``: a kernel where one runs, else emulation as ``sm_89``.
            strict: refuse another model than the policy was made for; ``False`` warns.
            on_emulation: as in `lowbit_attention.attention`.

        Raises:
            PolicyMismatchError: another model. InvalidArgumentError: no model at all, or an option of a wrong type.
        """
        check_flag("strict", strict)
        check_choice("on_emulation", on_emulation, ON_EMULATION)
        self.check(model, strict)
        return Applied(self, model, timesteps, like, on_emulation)

    @contextmanager
    def applied(
        self,
        model: torch.nn.Module | None = None,
        *,
        timesteps: Any = None,
        like: str | Machine | None = None,
        strict: bool = True,
        on_emulation: OnEmulation = "warn",
    ) -> Iterator[Applied]:
        """`apply` within a block."""
        handle = self.apply(model, timesteps=timesteps, like=like, strict=strict, on_emulation=on_emulation)
        try:
            yield handle
        finally:
            handle.remove()

    def check(self, model: torch.nn.Module | None, strict: bool = True) -> None:
        """Whether it was made for this model, as `apply` does.

        Raises:
            PolicyMismatchError: it was not; with ``strict=False`` it is a `PolicyWarning`.
        """
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
        """Write it as JSON, a line for each call. The same policy gives the same bytes.

        It is written whole or not at all, whoever else writes there (`lowbit_attention.output.saving`). A path that is
        a symbolic link is written at its target; another user's link, a folder, a device and a pipe are refused.

        Raises:
            InvalidArgumentError: the path is no file's. SaveError: it cannot be written.
        """
        write_lines(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """What `save` wrote. It is read as plain data: nothing in it is executed.

        Raises:
            InvalidArgumentError: no such file, another format or version, or something that is no policy.
        """
        data = read_document(path, FORMAT, SCHEMA)
        try:
            routes: dict[CallKey, str] = {}
            scores: dict[CallKey, dict[str, float]] = {}
            for entry in list_of(data["calls"], "calls"):
                call = object_of(entry, "a call")
                key = key_of(call)
                if key in routes:
                    raise ValueError(f"{key} is there twice")
                routes[key] = text_of(call["recipe"], "recipe")
                given = object_of(call["scores"], "scores")
                scores[key] = {
                    n: math.nan if s is None else number_of(s, f"the score of {n}") for n, s in given.items()
                }
            policy = cls(
                routes=routes,
                recipes=recipes_of(data["recipes"]),
                default=text_of(data["default"], "default"),
                model=None if data["model"] is None else Fingerprint.from_json(data["model"]),
                scores=scores,
                about=object_of(data["about"], "about"),
                library=text_of(data["library"], "library"),
            )
        except DAMAGE as error:
            raise InvalidArgumentError(f"{path} is no policy: {' '.join(str(error).split())}") from None
        for name, recipe in policy.recipes.items():
            if name in RECIPES and RECIPES[name] != recipe:
                warnings.warn(
                    f"{path}: {name} meant something else in lowbit-attention {policy.library}; the policy's own "
                    "options are used",
                    PolicyWarning,
                    stacklevel=2,
                )
        return policy


def _type_reasons(p: Policy) -> list[str]:
    """Values of another type than they should be, and numbers that no file could hold."""
    mappings = ("routes", "recipes", "scores", "about")
    if wrong := [name for name in mappings if not isinstance(getattr(p, name), Mapping)]:
        return [f"{name} is a {type(getattr(p, name)).__name__}, not a mapping" for name in wrong]
    reasons = [
        f"{name}={shown(getattr(p, name))} is no text"
        for name in ("default", "library")
        if not isinstance(getattr(p, name), str)
    ]
    model: Any = p.model
    if not isinstance(model, Fingerprint | None):
        reasons.append(f"model is a {type(model).__name__}, not a Fingerprint")
    for name, recipe in p.recipes.items():
        if not isinstance(recipe, Recipe) or recipe.name != name:
            reasons.append(f"recipes[{shown(name)}] is {shown(recipe)}, not the Recipe of that name")
    try:
        for key, route in p.routes.items():
            _check_key(key)
            text_of(route, f"the recipe of {key}")
        for key, scores in p.scores.items():
            _check_key(key)
            for name, score in scores.items():
                if not (isinstance(score, float) and not math.isfinite(score)):  # (``null`` in a file)
                    number_of(score, f"the score of {text_of(name, 'a name')}")
    except (ValueError, AttributeError) as error:
        reasons.append(str(error))
    return reasons


def _check_key(key: Any) -> None:
    """Whether a call's key can be written and read. ValueError: it cannot."""
    if not isinstance(key, CallKey):
        raise ValueError(f"{shown(key)} is no CallKey")
    key_of(key.as_dict())
