"""Quantised attention for inference: an independent implementation of SageAttention2 and SageAttention2++."""

from ._version import __version__
from .api import attention, attention_varlen, explain
from .errors import InvalidArgumentError, InvalidRecipeError, LowbitError, MissingExtraError, UnsupportedError
from .machine import AccumulatorModel, Geometry, Machine
from .metrics import Metrics, compare
from .recipe import Recipe
from .recipes import RECIPES, recipe
from .sdpa import make_sdpa, sdpa

__all__ = [
    "RECIPES",
    "AccumulatorModel",
    "Geometry",
    "InvalidArgumentError",
    "InvalidRecipeError",
    "LowbitError",
    "Machine",
    "Metrics",
    "MissingExtraError",
    "Recipe",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "compare",
    "explain",
    "make_sdpa",
    "recipe",
    "sdpa",
]
