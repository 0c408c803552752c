"""`register` and `unregister`: names in diffusers' list of attention backends, and everything undone again."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ...adaptive.policy import Policy
from ...api import Training
from ...call.request import OnEmulation
from ...errors import InvalidArgumentError
from ...recipes.definition import Recipe
from ...recipes.machine import Machine
from ...recipes.named import RECIPES
from ..call_report import CallReport
from ..intercept import intercepted
from . import state
from .backend import Backend, BackendOptions
from .calls import make_function
from .library import EveryName, add_member, dispatch, forget_everywhere, remove_member


class _Watched(intercepted):
    """A backend's block, in force as long as some model, or the process, is on that backend."""

    def __init__(self, backend: Backend) -> None:
        self.block = backend.block
        self.backend = backend


_registered: dict[str, _Watched] = {}


def register(
    recipe: str | Recipe | Policy = "auto",
    name: str = "lowbit",
    *,
    timesteps: Any = None,
    like: str | Machine | None = None,
    training: Training = "exact",
    strict: bool = False,
    on_emulation: OnEmulation = "warn",
) -> CallReport:
    """Make ``name`` an attention backend of diffusers that runs ``recipe``, and ``name_<recipe>`` one for each recipe.

    Afterwards ``pipe.transformer.set_attention_backend("lowbit")`` and ``with attention_backend("lowbit_sage2_8b")``
    work. A name that is there already is replaced.

    Args:
        recipe: ``"auto"`` (a kernel where it is faster than torch, torch elsewhere), a recipe's name, a `Recipe`, or a
            `Policy` (a recipe for each layer and timestep), which ``set_attention_backend`` holds against the model.
        name: small letters, digits and underscores.
        timesteps: with a policy, what moves its steps, as in `observe`: ``None``, ``"forwards"``, or the scheduler.
        like: as in `sdpa_enabled`; of ``name``, not of those with a recipe's.
        training, strict, on_emulation: as in `sdpa_enabled`.
    Returns:
        A `CallReport` that counts every call of these backends by implementation and reason.

    Reached are the calls that diffusers dispatches, and those that models make to ``F.scaled_dot_product_attention`` by
    themselves, whose backend is by the same rule the processor's, else the model's, else the process-wide default
    (autoencoders: the first two). docs/diffusers.md has a table of models.

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe, a name that diffusers has itself.
        MissingExtraError, UnsupportedError: no diffusers, or one without such backends.
    """
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InvalidArgumentError(f"name={name!r}: a backend's name has small letters, digits and underscores")
    library = dispatch()
    names = library.AttentionBackendName
    wanted: dict[str, str | Recipe | Policy] = {name: recipe, **{f"{name}_{r}": r for r in RECIPES}}
    if taken := [one for one in wanted if one in names._value2member_map_ and one not in _registered]:
        raise InvalidArgumentError(f"name={name!r}: diffusers has a backend {taken[0]!r} already; choose another name")
    report = CallReport()
    options = BackendOptions(like=like, training=training, strict=strict, on_emulation=on_emulation)
    of_recipes = BackendOptions(like=None, training=training, strict=strict, on_emulation=on_emulation)
    made = [
        Backend(one, what, timesteps if one == name else None, options if one == name else of_recipes, report)
        for one, what in wanted.items()
    ]
    state.watch(_about_to_set, _look_again)
    for backend in made:
        _add(library, backend)
    _look_again(None, None)
    return report


def unregister(name: str | None = None) -> None:
    """Undo `register`: of this name, or of all. Models on these backends follow the process-wide default again, and if
    that is one of them, it becomes the environment's (``DIFFUSERS_ATTN_BACKEND``), or torch's. Where nothing is
    registered, nothing happens.

    Raises:
        InvalidArgumentError: a name that is not registered.
    """
    if name is not None and name not in _registered:
        raise InvalidArgumentError(f"name={name!r} is not registered; there are {', '.join(_registered) or 'none'}")
    gone = [one for one in _registered if name is None or one == name or one in {f"{name}_{r}" for r in RECIPES}]
    if gone:
        library = dispatch()
        if state.default() in gone:
            library._AttentionBackendRegistry.set_active_backend(_default_without(library, gone))
        forget_everywhere([member for one in gone if (member := _registered[one].backend.member) is not None])
        for one in gone:
            _remove(library, _registered.pop(one))
    if not _registered:
        state.unwatch()


def _add(library: Any, backend: Backend) -> None:
    registry = library._AttentionBackendRegistry
    if (before := _registered.get(backend.name)) is not None:
        _close(before)
    backend.open()  # (once the one before follows the scheduler no more)
    _registered[backend.name] = _Watched(backend)
    backend.member = add_member(library.AttentionBackendName, backend.name)
    function = make_function(backend.name, backend.number)
    registry.register(backend.member, supports_context_parallel=True)(function)
    registry._supported_arg_names[backend.member] = EveryName(registry._supported_arg_names[backend.member])


def _remove(library: Any, watched: _Watched) -> None:
    _close(watched)
    names, registry = library.AttentionBackendName, library._AttentionBackendRegistry
    member = names._value2member_map_.get(watched.backend.name)
    if member is None:  # (registering was interrupted)
        return
    for model in [model for model, name in list(state.given.items()) if name == member.value]:
        state.given.pop(model, None)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)
    registry._supports_context_parallel.discard(member.value)
    remove_member(names, member)


def _close(watched: _Watched) -> None:
    watched.__exit__()
    watched.backend.close()


def _default_without(library: Any, gone: list[str]) -> Any:
    """What the process-wide default becomes when those that go are out of the way."""
    names = library.AttentionBackendName
    wanted = str(library.DIFFUSERS_ATTN_BACKEND)
    return names(wanted) if wanted in names._value2member_map_ and wanted not in gone else names.NATIVE


def _about_to_set(model: nn.Module, name: str) -> None:
    """A model is to be given a backend of this name: a policy must be this model's."""
    if name in _registered and model is state.model_of([model]):
        _registered[name].backend.check(model)


def _look_again(model: nn.Module | None, name: str | None) -> None:
    """Be in force for the backends that are in use, and for no others."""
    if model is not None and name in _registered and model is state.model_of([model]):
        _registered[name].backend.begin(model)
    in_use = {state.default(), *state.given.values()}
    for one, watched in list(_registered.items()):
        if (one in in_use) != watched.block.entered:
            if one in in_use:
                watched.__enter__()
            else:
                watched.__exit__()
