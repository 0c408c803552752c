"""Quantised attention for inference: an independent implementation of SageAttention2 and SageAttention2++.

Importing the package imports nothing else, torch included: each name brings its module when it is first taken. So what
must run before torch (`lowbit_attention.compat.alias`) can, and what needs only the errors or the version stays quick.
"""

import importlib
import re
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:  # (for type checkers and editors; a test compares it with `_WHERE`)
    from .api import attention, attention_varlen, explain, pack_kv
    from .call.mask_types import ALiBi, BlockMask, KeyPadding, Window
    from .errors import (
        EmulationRefusedError,
        EmulationWarning,
        FallbackWarning,
        InvalidArgumentError,
        InvalidRecipeError,
        KernelUnavailableError,
        LowbitError,
        MissingExtraError,
        SaveError,
        UnsupportedError,
    )
    from .evaluation.metrics import Metrics, compare
    from .functional import make_sdpa, sdpa
    from .integrations.call_report import CallReport
    from .integrations.torch_sdpa import disable_sdpa, enable_sdpa, sdpa_enabled
    from .parallel.merging import merge_state
    from .recipes.definition import Recipe
    from .recipes.granularity import PerBlock, PerChannel, PerChannelAndKeyTile, PerTensor, PerThread, PerToken, PerWarp
    from .recipes.machine import AccumulatorModel, Geometry, Machine
    from .recipes.named import RECIPES, recipe
    from .recipes.options import AllTokens, RestartedMax, RunningMax, SampledTokens, TileMax

__all__ = [
    "RECIPES",
    "ALiBi",
    "AccumulatorModel",
    "AllTokens",
    "BlockMask",
    "CallReport",
    "EmulationRefusedError",
    "EmulationWarning",
    "FallbackWarning",
    "Geometry",
    "InvalidArgumentError",
    "InvalidRecipeError",
    "KernelUnavailableError",
    "KeyPadding",
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
    "SaveError",
    "TileMax",
    "UnsupportedError",
    "Window",
    "__version__",
    "attention",
    "attention_varlen",
    "compare",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "make_sdpa",
    "merge_state",
    "pack_kv",
    "recipe",
    "sdpa",
    "sdpa_enabled",
]

_NAMES_IN = {
    "api": ("attention", "attention_varlen", "explain", "pack_kv"),
    "call.mask_types": ("ALiBi", "BlockMask", "KeyPadding", "Window"),
    "parallel.merging": ("merge_state",),
    "errors": (
        "EmulationRefusedError",
        "EmulationWarning",
        "FallbackWarning",
        "InvalidArgumentError",
        "InvalidRecipeError",
        "KernelUnavailableError",
        "LowbitError",
        "MissingExtraError",
        "SaveError",
        "UnsupportedError",
    ),
    "recipes.granularity": (
        "PerBlock",
        "PerChannel",
        "PerChannelAndKeyTile",
        "PerTensor",
        "PerThread",
        "PerToken",
        "PerWarp",
    ),
    "integrations.call_report": ("CallReport",),
    "integrations.torch_sdpa": ("disable_sdpa", "enable_sdpa", "sdpa_enabled"),
    "recipes.machine": ("AccumulatorModel", "Geometry", "Machine"),
    "evaluation.metrics": ("Metrics", "compare"),
    "recipes.definition": ("Recipe",),
    "recipes.options": ("AllTokens", "RestartedMax", "RunningMax", "SampledTokens", "TileMax"),
    "recipes.named": ("RECIPES", "recipe"),
    "functional": ("make_sdpa", "sdpa"),
}
_WHERE = {name: module for module, names in _NAMES_IN.items() for name in names}

_MIN_TORCH = (2, 5, 1)
"""As pyproject.toml declares it: 2.4 lacks ``torch.library.register_vmap``, which our operators need."""


if not TYPE_CHECKING:  # (a checker that saw it would take every misspelt name for one of ours)

    def __getattr__(name: str) -> Any:
        """A public name, from its module; or a submodule, as if it had been imported."""
        module = _WHERE.get(name)
        if module is not None:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            full = f"{__name__}.{name}"
            try:
                return importlib.import_module(full)
            except ModuleNotFoundError as error:
                if error.name != full:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_torch() -> None:
    """Refuse a torch that is too old, in one line and before anything of it is imported.

    Raises:
        ImportError: naming both versions. (Where there is no torch at all, importing it says so.)
    """
    torch = sys.modules.get("torch")
    found = getattr(torch, "__version__", None)
    if found is None:
        from importlib import metadata  # (torch imports it, too)

        try:
            found = metadata.version("torch")
        except metadata.PackageNotFoundError:
            return
    numbers = tuple(int(n) for n in re.findall(r"\d+", str(found).split("+")[0])[:3])
    if numbers and numbers < _MIN_TORCH:
        needed = ".".join(map(str, _MIN_TORCH))
        raise ImportError(
            f"lowbit-attention {__version__} needs torch>={needed}, and this is torch {found}: "
            f'pip install --upgrade "torch>={needed}"'
        )


_check_torch()
