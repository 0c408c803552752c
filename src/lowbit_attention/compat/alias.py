"""`install_as_sageattention`: ``import sageattention`` finds this library, until it is told otherwise.

Nothing here imports torch before ``sageattention`` is really imported, so the alias can be installed before torch is:
in ComfyUI's ``prestartup_script.py``, or in ``sitecustomize``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, wraps
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import LowbitError

if TYPE_CHECKING:
    from ..call.request import OnEmulation
    from ..recipes.definition import Recipe

NAME = "sageattention"
VERSION = f"2.2.0+lowbit.{__version__}"
"""The release whose functions these are; consumers ask for at least 2.1.1."""

_CORE, _QUANT = f"{NAME}.core", f"{NAME}.quant"
_FILES = {NAME: "sageattention.py", _CORE: "sageattention.py", _QUANT: "quant.py"}
"""The alias's modules, and where their functions are; as names, because importing them imports torch."""
_FOLDER = Path(__file__).parent

_OF_QUANT = ("per_block_int8", "per_warp_int8", "per_channel_fp8", "sub_mean")
_OF_CORE = {
    "attn_false": "attn_false",
    "attn_true": "attn_true",
    "get_cuda_arch_versions": "get_cuda_arch_versions",
    "per_block_int8_cuda": "per_block_int8",
    "per_block_int8_triton": "per_block_int8",
    "per_channel_fp8": "per_channel_fp8",
    "per_thread_int8_triton": "per_thread_int8",
    "per_warp_int8_cuda": "per_warp_int8",
    "sub_mean": "sub_mean",
}
"""Names of ``sageattention.core`` beside the functions, and what they are in `compat.quant`."""
_FLAGS = ("SM80_ENABLED", "SM89_ENABLED", "SM90_ENABLED")
"""Whether the functions for these cards can be called; they always can."""


class SageAttentionAlias(DistributionFinder):
    """What `install_as_sageattention` returns: ``remove()`` ends it, and so does the end of a ``with`` block."""

    def __init__(self, recipe: str | Recipe, on_emulation: OnEmulation) -> None:
        self._recipe, self._on_emulation = recipe, on_emulation
        self._hidden: dict[str, ModuleType] = {}

    @cached_property
    def _functions(self) -> dict[str, Callable[..., Any]]:
        """The functions of ``sageattention`` and ``sageattention.core``, the same in both."""
        from . import sageattention as functions

        _check(self._recipe, self._on_emulation)
        found = {name: getattr(functions, name) for name in functions.__all__}
        found["sageattn"] = functions.make_sageattn(self._recipe)
        if self._on_emulation == "warn":
            return found
        return {name: _with_default(function, self._on_emulation) for name, function in found.items()}

    def remove(self) -> None:
        """Take the alias away; what ``sageattention`` was before is there again. Twice is as good as once."""
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        for name in _FILES:
            sys.modules.pop(name, None)
        sys.modules.update(self._hidden)

    def __enter__(self) -> SageAttentionAlias:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # (importlib calls the rest)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The alias's modules."""
        del path, target
        if fullname not in _FILES:
            return None
        return ModuleSpec(fullname, _Loader(self), origin=_file_of(fullname), is_package=fullname == NAME)

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Iterable[Any]:  # noqa: B008
        """The alias's metadata, for ``importlib.metadata``."""
        return iter([_Distribution()] if context.name in (None, NAME) else [])


class _Loader(Loader):
    def __init__(self, alias: SageAttentionAlias) -> None:
        self._alias = alias

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with the functions; this imports torch, if nothing has yet."""
        from . import quant
        from . import sageattention as functions

        found: dict[str, Any] = {}
        if module.__name__ == _QUANT:
            found = {name: getattr(quant, name) for name in _OF_QUANT}
        else:
            found = dict(self._alias._functions)
        public = list(found)
        if module.__name__ == _CORE:
            found |= {name: getattr(quant, ours) for name, ours in _OF_CORE.items()}
            found |= dict.fromkeys(_FLAGS, True)
        vars(module).update(found)
        module.__doc__ = quant.__doc__ if module.__name__ == _QUANT else functions.__doc__
        module.__all__ = public  # type: ignore[attr-defined]
        module.__file__ = _file_of(module.__name__)
        module.__version__ = VERSION  # type: ignore[attr-defined]


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        """Name, version and top-level package."""
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
            "Summary: an alias of lowbit-attention\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        """Where a file of the alias would lie."""
        return _FOLDER / str(path)


def _file_of(module: str) -> str:
    return str(_FOLDER / _FILES[module])


def _check(recipe: str | Recipe, on_emulation: OnEmulation) -> None:
    """Look at the options. (This imports torch.)"""
    from ..call import checks
    from ..functional import find_recipe_or_auto

    find_recipe_or_auto(recipe)
    checks.check_choice("on_emulation", on_emulation, checks.ON_EMULATION)


def _with_default(function: Callable[..., Any], on_emulation: OnEmulation) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **{"on_emulation": on_emulation, **options})

    return call


def install_as_sageattention(
    recipe: str | Recipe = "auto", *, force: bool = False, on_emulation: OnEmulation = "warn"
) -> SageAttentionAlias:
    """Let ``import sageattention`` find `lowbit_attention.compat.sageattention`, in this process.

    ``importlib.util.find_spec("sageattention")`` and ``importlib.metadata.version("sageattention")`` find it, too. Call
    it before the library that is to use it is imported: most look for ``sageattention`` once.

    Args:
        recipe: what ``sageattention.sageattn`` runs. Before torch is imported a name is taken as it is, and an unknown
            one is refused by ``import sageattention``.
        force: also where the package ``sageattention`` is installed, which is hidden then.
        on_emulation: as in `lowbit_attention.attention`, for every function's calls that do not say.
    Returns:
        The alias; its ``remove()``, or the end of a ``with`` block, takes it away.

    >>> with install_as_sageattention():
    ...     from sageattention import sageattn
    >>> sageattn.__name__
    'sageattn'

    Raises:
        LowbitError: ``sageattention`` is installed or imported, and not ``force``; or the alias is there already.
        InvalidArgumentError, InvalidRecipeError: another ``on_emulation``, an unknown recipe.
    """
    if "torch" in sys.modules or not isinstance(recipe, str):  # (finding a recipe imports torch)
        _check(recipe, on_emulation)
    if any(isinstance(finder, SageAttentionAlias) for finder in sys.meta_path):
        raise LowbitError("the alias sageattention is installed already; remove() it first")
    alias = SageAttentionAlias(recipe, on_emulation)
    found = next(_installed(), None)
    if found and not force:
        raise LowbitError(f"the package sageattention is {found}; force=True hides it while the alias is there")
    alias._hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _belongs(name)}
    sys.meta_path.insert(0, alias)
    importlib.invalidate_caches()
    return alias


def _belongs(name: str) -> bool:
    return name == NAME or name.startswith(f"{NAME}.")


def _installed() -> Iterator[str]:
    """Where the real package is."""
    if NAME in sys.modules:
        yield f"imported already, from {getattr(sys.modules[NAME], '__file__', None)}"
    spec = PathFinder.find_spec(NAME)
    if spec is not None:
        yield f"installed at {spec.origin}"
