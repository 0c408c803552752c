"""Which backend a call belongs to that a model makes by itself: the rule that diffusers has for those it dispatches.

An attention processor's own backend decides, if it was given one; else its model's; else the process-wide default.
Processors that call ``F.scaled_dot_product_attention`` themselves have no place for theirs, so which models were given
one is noted here; everything else is read from diffusers when the call happens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import nn

from .library import Wrapped, dispatch

AUTOENCODERS = "diffusers.models.autoencoders"

given: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""The backends that models, and single attention modules, were given while one of ours was registered; of each module
in them."""

_library: Any = None
_model_class: type[nn.Module] = nn.Module
_wrapped: list[Wrapped] = []


def watch(before: Callable[[nn.Module, str], None], after: Callable[[nn.Module | None, str | None], None]) -> None:
    """Hear of every backend that is set from now on.

    Args:
        before: is told of a model and the name that it is about to be given, and may raise.
        after: has to look again at what is in force; of a model that was given a name, it is told both.
    """
    global _library, _model_class
    if _wrapped:
        return
    _library = dispatch()
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.modeling_utils import ModelMixin

    _model_class = ModelMixin

    def setting(original: Any) -> Any:
        @wraps(original)
        def set_attention_backend(self: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
            name = _name(backend)
            before(self, name)
            answer = original(self, backend, *args, **kwargs)
            _forget(self)
            for module in self.modules():  # (each: an autoencoder's parts run without its own forward)
                given[module] = name
            after(self, name)
            return answer

        return set_attention_backend

    def resetting(original: Any) -> Any:
        @wraps(original)
        def reset_attention_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(self, *args, **kwargs)
            _forget(self)
            after(None, None)
            return answer

        return reset_attention_backend

    def activating(original: Any) -> Any:
        @wraps(original.__func__)
        def set_active_backend(cls: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original.__func__(cls, backend, *args, **kwargs)
            after(None, None)
            return answer

        return classmethod(set_active_backend)

    _wrapped.append(Wrapped(_library._AttentionBackendRegistry, "set_active_backend", activating))
    _wrapped.append(Wrapped(ModelMixin, "set_attention_backend", setting))
    _wrapped.append(Wrapped(ModelMixin, "reset_attention_backend", resetting))
    _wrapped.append(Wrapped(AttentionModuleMixin, "set_attention_backend", setting))


def unwatch() -> None:
    """Put diffusers' methods back, and forget what was noted."""
    while _wrapped:
        _wrapped.pop().restore()
    given.clear()


def in_force(modules: Sequence[nn.Module]) -> str | None:
    """The backend of a call that is made while these modules run (innermost first); ``None``: no model of diffusers."""
    for module in modules:
        if (own := _own(module)) is not None:
            return _name(own)
    for module in modules:
        if (name := given.get(module)) is not None:
            return name
    for module in modules:
        if isinstance(module, _model_class):
            # (images are no tokens: what an autoencoder attends to is exact unless it was given a backend itself)
            return None if _is_autoencoder(module) else default()
    return None


def default() -> str:
    """The name of the process-wide default."""
    return _name(_library._AttentionBackendRegistry._active_backend)


def model_of(modules: Sequence[nn.Module]) -> nn.Module | None:
    """The outermost model of diffusers among the modules that run, which names are relative to."""
    return next((module for module in reversed(modules) if isinstance(module, _model_class)), None)


def _own(module: nn.Module) -> Any:
    """What a module's attention processor was given, or a module that is one."""
    # (``module.processor`` costs a microsecond where there is none, and most modules have none)
    processor = module.__dict__.get("processor") or module._modules.get("processor") or module
    return getattr(processor, "__dict__", {}).get("_attention_backend")


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        given.pop(module, None)


def _name(backend: Any) -> str:
    return str(getattr(backend, "value", backend)).lower()


def _is_autoencoder(model: nn.Module) -> bool:
    return any(cls.__module__.startswith(AUTOENCODERS) for cls in type(model).__mro__)
