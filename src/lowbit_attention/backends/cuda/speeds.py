"""How long whole calls take on a card, predicted: what ``auto`` compares our kernels and torch by.

A call's time is a sum over a few sizes of its work (`features`), each times a coefficient that is not negative. The
coefficients are fitted to calls that were measured on the card (`bench.cost_fit`): data/hopper_costs.json has an
H200's, and ``lowbit tune`` keeps those of the user's own card in the cache folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..._version import __version__
from ...call.request import Request, device_name
from ...env import cache_dir
from ...errors import LowbitError
from ...output.files import write_json
from ...recipes.definition import Recipe
from ...recipes.named import RECIPES
from .instances import padded_head_dim

CARDS = ("H100", "H200")
"""In the names of the cards that the shipped measurements hold for: the same processor with another memory."""
LEAST_TOKENS = 64
"""Fewer queries or keys than any that are measured."""
TORCH = "torch"
TORCH_ROWS, _TILE_KEYS = 128, 128
_LOG = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """What a call's time is taken to depend on. ``causal_offset``: row i sees key j if ``j ≤ i + causal_offset``."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    causal_offset: int | None = None

    @classmethod
    def of(cls, request: Request) -> Sizes:
        """Those of a request; a mask is taken to hide nothing."""
        return cls(
            request.batch, request.q_heads, request.kv_heads, request.q_len, request.kv_len, request.head_dim,
            request.v_head_dim, request.causal_offset if request.is_causal else None,
        )  # fmt: skip

    @property
    def padded(self) -> int | None:
        """The head dimension that kernels run, if any does."""
        return padded_head_dim(max(self.head_dim, self.v_head_dim))


def features(call: Sizes, rows: int, multiprocessors: int) -> tuple[float, ...]:
    """The sizes of a call's work, where a work tile is so many rows of a head.

    One; megabytes of K and V, and of Q and the output; key tiles, and those of all waves' work tiles, for each
    multiprocessor; work tiles for each, and waves; the key tiles of the longest work tile.
    """
    blocks, tiles, heads = -(-call.q_len // rows), -(-call.kv_len // _TILE_KEYS), call.batch * call.q_heads
    visited, longest = float(blocks * tiles), tiles
    if call.causal_offset is not None:
        ends = (min((b + 1) * rows, call.q_len) + call.causal_offset for b in range(blocks))
        seen = [min(tiles, max(0, -(-end // _TILE_KEYS))) for end in ends]
        visited, longest = float(sum(seen)), max(seen)
    items = heads * blocks
    waves = -(-items // multiprocessors)
    channels = 2e-6 * call.batch * (call.head_dim + call.v_head_dim)
    return (
        1.0, channels * call.kv_heads * call.kv_len, channels * call.q_heads * call.q_len,
        heads * visited / multiprocessors, waves * visited / blocks, items / multiprocessors, float(waves),
        float(longest),
    )  # fmt: skip


_MULTIPLICATIONS = (3, 4, 7)
"""Which features grow with the channels."""


@dataclass(frozen=True)
class CardModel:
    """What is known of a card.

    about: where it comes from. multiprocessors: of the card. kernels: which of our kernels ran a recipe. rows: of a
    work tile, by recipe (or `TORCH`) and padded head dimension. coefficients: by these and by causality.
    """

    about: Mapping[str, Any]
    multiprocessors: int
    kernels: Mapping[str, str]
    rows: Mapping[str, Mapping[str, int]]
    coefficients: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]

    def microseconds(self, call: Sizes, name: str) -> float | None:
        """The predicted device time of a whole call by a recipe or torch; ``None`` where nothing alike was measured."""
        dim = call.padded
        causal = str(call.causal_offset is not None)
        coefficients = self.coefficients.get(name, {}).get(str(dim), {}).get(causal)
        if dim is None or coefficients is None or min(call.q_len, call.kv_len) < LEAST_TOKENS:
            return None
        sizes = list(features(call, self.rows[name][str(dim)], self.multiprocessors))
        if name == TORCH:  # it may pad to fewer channels than we do: a doubt speaks for torch
            for i in _MULTIPLICATIONS:
                sizes[i] *= max(call.head_dim, call.v_head_dim) / dim
        return sum(c * size for c, size in zip(coefficients, sizes, strict=True))

    @classmethod
    def from_json(cls, document: Any) -> CardModel:
        """What `dataclasses.asdict` gave, from a file.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is another thing.
        """
        coefficients = {
            str(name): {
                str(dim): {str(causal): tuple(map(float, some)) for causal, some in by_causality.items()}
                for dim, by_causality in by_dim.items()
            }
            for name, by_dim in document["coefficients"].items()
        }
        rows = {str(name): {str(dim): int(n) for dim, n in of.items()} for name, of in document["rows"].items()}
        model = cls(
            dict(document["about"]), int(document["multiprocessors"]), dict(document["kernels"]), rows, coefficients
        )
        for name, by_dim in coefficients.items():
            for dim, by_causality in by_dim.items():
                if min(model.multiprocessors, rows[name][dim]) < 1 or any(len(c) != 8 for c in by_causality.values()):
                    raise ValueError(f"{name} at head dimension {dim} has no eight coefficients, or no rows")
        return model


def speedup(request: Request, recipe: Recipe, kernel: str) -> float | None:
    """Torch's predicted time over that of our ``kernel``, ``None`` where nothing alike was timed.

    With a mask, too, it is the ratio without one: on an H200 masks cost torch more than us (docs/results/hopper.md).
    """
    if RECIPES.get(recipe.name) != recipe:
        return None
    model = model_of(request.device)
    if model is None or model.kernels.get(recipe.name) != kernel:
        return None
    call = Sizes.of(request)
    torch_us, ours_us = model.microseconds(call, TORCH), model.microseconds(call, recipe.name)
    return None if torch_us is None or ours_us is None else torch_us / ours_us


def model_of(device: torch.device) -> CardModel | None:
    """What ``lowbit tune`` found on this card, or what is shipped of its kind; ``None`` if neither is there."""
    name = device_name(device)
    return _tuned(name) or (shipped() if any(card in name for card in CARDS) else None)


@lru_cache(maxsize=1)
def shipped() -> CardModel:
    """The model of data/hopper_costs.json."""
    text = resources.files("lowbit_attention").joinpath("data/hopper_costs.json").read_text(encoding="utf-8")
    return CardModel.from_json(json.loads(text))


# ---- what `lowbit tune` keeps


def tuned_file(name: str) -> Path:
    """Where the model of a card of this name is kept, for its driver and these versions of torch and this package."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # (torch without CUDA has none)
    driver = version() if version is not None and torch.cuda.is_available() else 0
    text = f"{name} cuda {driver} torch {torch.__version__} lowbit {__version__}"
    return cache_dir() / "tuned" / (re.sub(r"[^A-Za-z0-9.]+", "-", text) + ".json")


@lru_cache(maxsize=16)
def _tuned(name: str) -> CardModel | None:
    try:
        path = tuned_file(name)
        if not path.is_file():
            return None
        return CardModel.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, LowbitError) as error:
        _LOG.warning(
            "what lowbit tune kept for %s is not read (%s): run it again, or lowbit tune --forget", name, error
        )
        return None


def keep(name: str, model: CardModel) -> Path:
    """Write the model of a card, for `model_of`. (Calls whose choice is remembered are not asked again.)

    Raises:
        InvalidArgumentError, SaveError: it cannot be written.
    """
    path = tuned_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(model))
    _tuned.cache_clear()
    return path


def forget(name: str) -> Path | None:
    """Remove the model of a card; the file, if there was one."""
    path = tuned_file(name)
    found = path.is_file()
    path.unlink(missing_ok=True)
    _tuned.cache_clear()
    return path if found else None
