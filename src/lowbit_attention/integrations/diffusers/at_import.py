"""``DIFFUSERS_ATTN_BACKEND=lowbit``: diffusers reads the variable while its module of backends is imported.

That module looks the name up in its own list at once, and fails if it is not there. So where the variable names one of
ours, its import is accompanied: it reads ``native``, and what was asked for is registered and set right behind it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ...env import DIFFUSERS_VARIABLE as VARIABLE
from ...env import diffusers_backend
from ...recipes.named import RECIPES
from .library import DISPATCH, loaded
from .registration import register

_CONSTANTS = "diffusers.utils.constants"


class EnvironmentWarning(UserWarning):
    """``DIFFUSERS_ATTN_BACKEND`` names a backend of ours, and nobody can obey any more."""


def is_ours(name: str) -> bool:
    """Whether the variable names ``lowbit``, or that with a recipe."""
    return name == "lowbit" or name in {f"lowbit_{recipe}" for recipe in RECIPES}


def obey_environment() -> None:
    """If the variable names a backend of ours, let it hold once diffusers' module is imported; warn if that was."""
    wanted = diffusers_backend()
    if not wanted.lower().startswith("lowbit"):
        return
    if not is_ours(wanted):
        warnings.warn(
            f"{VARIABLE}={wanted}: there is no such backend, but lowbit and lowbit_<recipe> with one of the recipes "
            f"{', '.join(RECIPES)}",
            EnvironmentWarning,
            stacklevel=3,
        )
        return
    constants = sys.modules.get(_CONSTANTS)
    if loaded() is not None or (constants is not None and wanted != constants.__dict__.get(VARIABLE)):
        warnings.warn(
            f"{VARIABLE}={wanted} comes too late: diffusers has read it already. Set it before Python starts and "
            f"import lowbit_attention.integrations.diffusers before diffusers; or call its register(), and then "
            f'pipe.transformer.set_attention_backend("{wanted}")',
            EnvironmentWarning,
            stacklevel=3,
        )
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds diffusers' module of backends as anybody would, and puts `_Accompanied` in front of its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DISPATCH:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Accompanied(spec.loader, self)
                return spec
        return None


class _Accompanied(Loader):
    """A module's own loader, with the variable out of its sight, and with ours registered behind it."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        constants = import_module(_CONSTANTS)
        wanted = getattr(constants, VARIABLE, "native")
        if not is_ours(wanted):  # (changed since)
            self._loader.exec_module(module)
            return
        setattr(constants, VARIABLE, "native")
        try:
            self._loader.exec_module(module)
        finally:
            setattr(constants, VARIABLE, wanted)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        register()
        backends: Any = module
        backends._AttentionBackendRegistry.set_active_backend(backends.AttentionBackendName(wanted))
