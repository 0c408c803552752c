"""What of diffusers this integration touches, and the surgery on its closed list of backends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any

from ...errors import MissingExtraError, UnsupportedError

DISPATCH = "diffusers.models.attention_dispatch"
"""The module that reads ``DIFFUSERS_ATTN_BACKEND`` when it is imported, and holds the list of backends."""

_NEEDED = (
    "AttentionBackendName",
    "_AttentionBackendRegistry.register",
    "_AttentionBackendRegistry.set_active_backend",
    "_templated_context_parallel_attention",
)

INSTEAD = "with sdpa_enabled(pipe.transformer, recipe=…) runs a recipe without backends (docs/pytorch.md)"


def dispatch() -> Any:
    """diffusers' module of attention backends.

    Raises:
        MissingExtraError: diffusers is not installed. UnsupportedError: it has no such backends.
    """
    try:
        version = import_module("diffusers").__version__
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingExtraError("the attention backend of diffusers", "diffusers", "diffusers") from None
    try:
        found = import_module(DISPATCH)
    except ModuleNotFoundError as error:
        if error.name != DISPATCH:
            raise
        raise UnsupportedError(f"diffusers {version} has no attention backends (0.37 has); {INSTEAD}") from None
    for name in _NEEDED:
        try:
            attrgetter(name)(found)
        except AttributeError:
            raise UnsupportedError(f"diffusers {version} has no {DISPATCH}.{name} (0.37 has); {INSTEAD}") from None
    return found


def loaded() -> Any:
    """The same if it is imported already, else ``None``."""
    return sys.modules.get(DISPATCH)


def add_member(names: Any, value: str) -> Any:
    """The member ``value`` of the closed enum of backends' names, made if it is not there."""
    if value in names._value2member_map_:
        return names._value2member_map_[value]
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = value.upper(), value, names
    member._sort_order_ = len(names._member_names_)
    setattr(names, member._name_, member)  # (first: the class refuses to set what is in its maps)
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[value] = member
    hashed = getattr(names, "_hashable_values_", None)  # (a list, from Python 3.13.1 on)
    if hashed is not None:
        hashed.append(value)
    return member


def remove_member(names: Any, member: Any) -> None:
    """Undo `add_member`."""
    if names._member_map_.pop(member._name_, None) is None:
        return
    names._member_names_.remove(member._name_)
    names._value2member_map_.pop(member._value_, None)
    if member._value_ in getattr(names, "_hashable_values_", ()):
        names._hashable_values_.remove(member._value_)
    delattr(names, member._name_)


def forget_everywhere(members: list[Any]) -> None:
    """Let every attention processor that was given one of these backends follow the process-wide default again.

    They are found by what refers to the members: those of a model's copies, too.
    """
    for referrer in gc.get_referrers(*members):
        fields = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", None)
        if isinstance(fields, dict) and any(fields.get("_attention_backend") is member for member in members):
            if fields is referrer:
                fields["_attention_backend"] = None
            else:
                referrer._attention_backend = None


class EveryName(frozenset[str]):
    """The names of arguments that a backend takes, for diffusers, which drops others without a word: all of them.

    So an argument that means nothing here arrives, and can be refused.
    """

    def __contains__(self, name: object) -> bool:
        return True


class Wrapped:
    """A method of a class that calls ``after`` once it is done, until `restore`."""

    def __init__(self, cls: type, name: str, wrap: Callable[[Any], Any]) -> None:
        self.cls, self.name = cls, name
        self.original = cls.__dict__[name]
        self.replacement = wrap(self.original)
        setattr(cls, name, self.replacement)

    def restore(self) -> None:
        """Put the method back, unless somebody else has wrapped this one: then it stays, and does nothing more."""
        if self.cls.__dict__.get(self.name) is self.replacement:
            setattr(self.cls, self.name, self.original)
