"""What no kernel here takes, whatever the card: the reasons that the kernels have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...call.request import Request
from ...errors import InvalidRecipeError
from ...recipes.definition import Recipe
from ...recipes.formats import round_e4m3
from ...recipes.machine import Geometry
from ...recipes.options import SampledTokens
from .instances import DTYPE_CODES, HEAD_DIMS

_LARGEST_LENGTH = 1 << 30
"""Tokens; so that sums of two lengths stay in 32 bits."""
_MOST_MASKED_KEYS = 1 << 25
"""Keys; so that at 16 tiles of 64 a thread block there are no more blocks than a grid's second dimension has."""
_MOST_SAMPLED = 1024
"""Tokens of a sample of K (the packing kernels find them in 32 bits)."""

EXACT = ("it quantises, and recipe exact does not",)
"""Why no kernel takes the recipe that does not quantise."""


def request_reasons(request: Request) -> list[str]:
    """Why no kernel takes a request, whatever the recipe."""
    reasons = []
    if request.dtype not in DTYPE_CODES:
        reasons.append(f"it takes float16, bfloat16 and float32, not {request.dtype}")
    if request.mask == "float" and request.mask_dtype not in DTYPE_CODES:
        reasons.append(f"it takes float masks of float16, bfloat16 and float32, not {request.mask_dtype}")
    if max(request.head_dim, request.v_head_dim) > HEAD_DIMS[-1]:
        reasons.append(f"head_dim {max(request.head_dim, request.v_head_dim)} is above {HEAD_DIMS[-1]}")
    if request.machine is not None:
        reasons.append(f"like={request.machine.name!r} asks for an emulation")
    if 0 in (request.batch, request.q_heads, request.kv_heads, request.q_len, request.kv_len, request.v_head_dim):
        reasons.append("the call is empty")
    if request.mask != "none" and request.kv_len > _MOST_MASKED_KEYS:
        reasons.append(f"with a mask it takes up to {_MOST_MASKED_KEYS} keys")
    if max(request.q_len, request.kv_len) > _LARGEST_LENGTH:
        reasons.append(f"it takes up to {_LARGEST_LENGTH} tokens")
    return reasons


def option_reasons(recipe: Recipe, taken: Mapping[str, tuple[object, ...]]) -> Iterator[str]:
    """What of a recipe is not among the values that a kernel takes, or the packing kernels do not do."""
    for name, values in taken.items():
        if (value := getattr(recipe, name)) not in values:
            yield f"it has no {name}={value} (only {' or '.join(map(str, values))})"
    sample = recipe.k_sample
    if isinstance(sample, SampledTokens) and sample.count > _MOST_SAMPLED:
        yield f"it has no k_sample={sample} (at most {_MOST_SAMPLED} tokens)"


def number_reasons(recipe: Recipe, geometry: Geometry) -> Iterator[str]:
    """What of a recipe's numbers its formats and a kernel's tiles cannot hold."""
    if recipe.pv_format == "e4m3":
        v_max = torch.tensor(recipe.v_max, dtype=torch.float32, device="cpu")
        if float(round_e4m3(v_max)) != recipe.v_max:
            yield f"v_max={recipe.v_max} is no E4M3 number"
    try:
        recipe.check_geometry(geometry)
    except InvalidRecipeError as error:
        yield from error.reasons
