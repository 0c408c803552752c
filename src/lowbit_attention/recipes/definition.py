"""`Recipe`: the method, frozen and printable. What is rounded, smoothed, scaled and promoted, and how often.

The tiles and the machine's accumulators are not part of it: see `lowbit_attention.recipes.machine`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRecipeError, shown
from .fields import RecipeFields
from .granularity import (
    TOKEN_GRANULARITIES,
    VALUE_GRANULARITIES,
)
from .machine import Geometry
from .options import (
    RestartedMax,
    TileMax,
    parse_softmax_max,
    parse_token_sample,
)
from .rules import alone_bits, contradictions, range_reasons

SCHEMA_VERSION = 1
"""Version of the JSON form of a recipe."""
_MOST_JSON = 1 << 16
"""Characters of a recipe's JSON: some sixty times what one takes."""
_MOST_TEXT = 4096
"""Characters of a name, a summary or an option: eight times what changing every option makes of a recipe's name."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeFields):
    """A quantised attention method (SageAttention, SageAttention2, SageAttention2++ and variations).

    Its options are `RecipeFields`', each explained there; `lowbit recipes NAME` shows them.

    Raises:
        InvalidRecipeError: with every reason, if the options contradict each other.
    """

    def __post_init__(self) -> None:
        if reasons := _size_reasons(self) or contradictions(self):
            raise InvalidRecipeError(f"recipe {shown(self.name)}", reasons)
        # Written now, because torch.compile cannot trace the writing, and the operator takes text.
        data = {"schema": SCHEMA_VERSION, "name": self.name, "summary": self.summary, **self.options()}
        object.__setattr__(self, "_json", json.dumps(data))

    @property
    def qk_max(self) -> int:
        """The largest integer of Q̂ and K̂: 127 or 7."""
        if self.qk_bits is None:
            raise InvalidRecipeError(f"recipe {self.name!r}", ["Q·K is not quantised, so it has no largest integer"])
        return (1 << (self.qk_bits - 1)) - 1

    def promotion_keys(self, geometry: Geometry) -> int | None:
        """After how many keys the sums are promoted with these tiles; ``None`` for never."""
        if self.keys_per_promotion == "never":
            return None
        return geometry.b_k if self.keys_per_promotion == "tile" else self.keys_per_promotion

    def jump_bits(self, geometry: Geometry) -> int | None:
        """log2 of what a tile's P gains that jumps (`RestartedMax.jump`), at most ``jump``: else its equal would, too.

        ``None`` if none is looked for, as where every tile has an interval of its own anyway.
        """
        keys = self.promotion_keys(geometry) or 0
        jump = self.softmax_max.jump if isinstance(self.softmax_max, RestartedMax) else None
        if jump is None or keys <= geometry.b_k:
            return None
        return min(alone_bits(self, keys // geometry.b_k), int(jump))

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse tiles that this recipe's promotion interval or number range does not fit.

        Raises:
            InvalidRecipeError: with every reason.
        """
        keys = self.promotion_keys(geometry)
        reasons = range_reasons(self, keys)
        if keys is not None and keys % geometry.b_k and geometry.b_k % keys:
            reasons.append(f"keys_per_promotion={keys} and the key tile b_k={geometry.b_k} do not divide each other")
        if keys is not None and keys < geometry.b_k and isinstance(self.softmax_max, TileMax):
            reasons.append("softmax_max=tile needs one promotion a tile")
        if reasons:
            raise InvalidRecipeError(f"recipe {self.name!r} with geometry {geometry}", reasons)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some options changed, named after what changed unless ``name`` is given.

        >>> from lowbit_attention import recipe
        >>> print(recipe("sage2_4b").replace(smooth_q=False))
        sage2_4b:smooth_q=false
        """
        if changes and "name" not in changes:
            base, texts = _changes_in(self.name)
            texts |= {option: _encode_text(value) for option, value in changes.items()}
            changes |= {"name": f"{base}:" + ",".join(f"{k}={v}" for k, v in texts.items()), "summary": ""}
        return dataclasses.replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """Every option but name and summary, as JSON values."""
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self) if f.compare}

    def to_json(self, indent: int | None = None) -> str:
        """The recipe as a JSON object with its schema version."""
        text: str = self._json  # type: ignore[attr-defined]  # (no field: it says nothing that the fields do not)
        return text if indent is None else json.dumps(json.loads(text), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote. Missing options take their defaults; unknown ones are refused.

        Raises:
            InvalidRecipeError: if the text is no JSON object, of another schema, or holds an unknown or bad option.
        """
        if not isinstance(text, str) or len(text) > _MOST_JSON:
            what = f"{len(text)} characters, more than {_MOST_JSON}" if isinstance(text, str) else type(text).__name__
            raise InvalidRecipeError("recipe JSON", [f"expected a text, got {what}"])
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRecipeError("recipe JSON", [str(error)]) from None
        if not isinstance(data, dict):
            raise InvalidRecipeError("recipe JSON", [f"expected an object, got {type(data).__name__}"])
        schema = data.pop("schema", None)
        if type(schema) is not int or schema != SCHEMA_VERSION:
            raise InvalidRecipeError("recipe JSON", [f"schema {shown(schema)}; this version reads {SCHEMA_VERSION}"])
        return cls(**decode_options(data, "recipe JSON"))

    def __str__(self) -> str:
        return self.name


def decode_options(data: dict[str, Any], subject: str) -> dict[str, Any]:
    """JSON or command-line values to `Recipe` arguments; every unknown name and bad value is reported."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    reasons = [
        f"unknown option {shown(name)} (known: {', '.join(sorted(known))})" for name in data if name not in known
    ]
    decoded = {}
    for name, value in data.items():
        try:
            decoded[name] = _DECODERS[name](value) if name in _DECODERS else value
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        raise InvalidRecipeError(subject, reasons)
    return decoded


def _size_reasons(r: Recipe) -> list[str]:
    """Options that are too large to compute with, or even to show; before anything else looks at them."""
    reasons = []
    for f in dataclasses.fields(r):
        value = getattr(r, f.name)
        if isinstance(value, list | tuple | dict | set):
            reasons.append(f"{f.name}={shown(value)} has the wrong type")
        elif isinstance(value, int) and value.bit_length() > 31:
            reasons.append(f"{f.name}={shown(value)} is beyond ±2³¹")
        elif isinstance(value, str) and len(value) > _MOST_TEXT:
            reasons.append(f"{f.name} has {len(value)} characters, more than {_MOST_TEXT}")
    return reasons


def _changes_in(name: str) -> tuple[str, dict[str, str]]:
    """A recipe's name without the changes at its end, and these by option.

    A user's own name may hold a colon, too: only what is ``option=value,option=value`` behind the last one is changes.
    """
    base, colon, end = name.rpartition(":")
    pairs = [text.partition("=") for text in end.split(",")]
    known = {f.name for f in dataclasses.fields(Recipe)}
    if not colon or not base or any(option not in known or not value for option, _, value in pairs):
        return name, {}
    return base, {option: value for option, _, value in pairs}


def _encode(value: Any) -> Any:
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else str(value)


def _encode_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return shown(value) if isinstance(value, int) else str(_encode(value))


def _lookup(table: dict[str, Any]) -> Any:
    def decode(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in table:
            raise ValueError(f"{value!r} is not one of {', '.join(table)}")
        return table[value]

    return decode


def _option(parse: Any) -> Any:
    return lambda value: parse(value) if isinstance(value, str) else value


_DECODERS = {
    "q_granularity": _lookup(TOKEN_GRANULARITIES),
    "k_granularity": _lookup(TOKEN_GRANULARITIES),
    "v_granularity": _lookup(VALUE_GRANULARITIES),
    "k_sample": _option(parse_token_sample),
    "v_sample": _option(parse_token_sample),
    "softmax_max": _option(parse_softmax_max),
    "rotation": lambda value: "none" if value is None else value,
}
