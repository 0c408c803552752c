"""Quantised attention for inference: an independent implementation of SageAttention2 and SageAttention2++."""

from ._version import __version__
from .api import attention, attention_varlen, explain
from .errors import InvalidArgumentError, InvalidRecipeError, LowbitError, MissingExtraError, UnsupportedError
from .granularity import PerBlock, PerChannel, PerChannelAndKeyTile, PerTensor, PerThread, PerToken, PerWarp
from .integrations.call_report import CallReport
from .integrations.torch_sdpa import disable_sdpa, enable_sdpa, sdpa_enabled
from .machine import AccumulatorModel, Geometry, Machine
from .metrics import Metrics, compare
from .recipe import Recipe
from .recipe_options import AllTokens, RestartedMax, RunningMax, SampledTokens, TileMax
from .recipes import RECIPES, recipe
from .sdpa import make_sdpa, sdpa

__all__ = [
    "RECIPES",
    "AccumulatorModel",
    "AllTokens",
    "CallReport",
    "Geometry",
    "InvalidArgumentError",
    "InvalidRecipeError",
    "LowbitError",
    "Machine",
    "Metrics",
    "MissingExtraError",
    "PerBlock",
    "PerChannel",
    "PerChannelAndKeyTile",
    "PerTensor",
    "PerThread",
    "PerToken",
    "PerWarp",
    "Recipe",
    "RestartedMax",
    "RunningMax",
    "SampledTokens",
    "TileMax",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "compare",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "make_sdpa",
    "recipe",
    "sdpa",
    "sdpa_enabled",
]
