"""`intercepted`: the one primitive that reroutes ``torch.nn.functional.scaled_dot_product_attention``.

Why the name is replaced, and no ``torch.overrides.TorchFunctionMode`` entered: a mode costs every torch function about
1 µs a call, not only attention; it holds in one thread only; and code compiled outside of it is compiled again for the
mode itself. A replaced name costs nothing elsewhere, holds in every thread, and `torch.compile` guards on it: a model
compiled before is recompiled inside the block, and its first code is used again after it. What a mode sees and a
replaced name does not: a function kept in a closure, a default argument, a container or a class before the block.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

Handler = Callable[..., Tensor]
"""``handler(original, name, *args, **kwargs)``: ``original`` is torch's own function, ``name`` the dotted path (within
the model) of the innermost module whose forward is running, ``None`` without a model; the rest is the call's."""

_TORCH: Handler = torch._C._nn.scaled_dot_product_attention
_MHA = F.multi_head_attention_forward
# The same code as another function: torch.compile keeps the first as one node, whose insides run when no module is
# known to be running, and traces into this one.
_MHA_TRACEABLE = FunctionType(_MHA.__code__, _MHA.__globals__, _MHA.__name__, _MHA.__defaults__, _MHA.__closure__)
_MHA_TRACEABLE.__kwdefaults__ = _MHA.__kwdefaults__
_SELF = __name__.partition(".")[0]


class _Running(threading.local):
    """The modules of one interception's model whose forward is running in this thread, innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []


class _Busy(threading.local):
    """Whether a handler is running in this thread: what it calls itself goes to torch."""

    def __init__(self) -> None:  # (an attribute of the object, not of the class, or a guard of torch.compile fails)
        self.handling = False


class _Interception:
    """One block of `intercepted`. ``running`` is ``None`` without a model."""

    def __init__(self, handler: Handler, running: _Running | None) -> None:
        self.handler = handler
        self.running = running


_active: tuple[_Interception, ...] = ()
"""Those in force, innermost last; replaced as a whole, so that other threads may read it at any time."""
_lock = threading.RLock()
_busy = _Busy()
_fastpath = True
_before: Handler = _TORCH


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` while `intercepted` is in force."""
    given = (*args, *kwargs.values())
    if has_torch_function(given):  # a subclass's own attention (torch.nn.attention.bias), which looks for this function
        answer: Tensor = handle_torch_function(scaled_dot_product_attention, given, *args, **kwargs)
        return answer
    if _busy.handling:
        return _TORCH(*args, **kwargs)
    for interception in reversed(_active):
        name: str | None = None
        if interception.running is not None:
            if not interception.running.names:
                continue
            name = interception.running.names[-1]
        _busy.handling = True
        try:
            return interception.handler(_TORCH, name, *args, **kwargs)
        finally:
            _busy.handling = False
    return _TORCH(*args, **kwargs)


@contextmanager
def intercepted(handler: Handler, model: nn.Module | None = None, *, named: bool = True) -> Iterator[None]:
    """Within the block, ``handler`` gets the calls of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        handler: called as ``handler(original, name, *args, **kwargs)``; see `Handler`. What it calls itself goes to
            torch's own function.
        model: only the calls made while a forward of this module or one of its submodules runs (in any thread);
            ``None``: every call of the process. May be compiled, before or inside the block.
        named: whether ``name`` tells the module apart. Code that `torch.compile` makes for one of several equal layers
            holds its name, so each layer compiled on its own is compiled again for it (raise
            ``torch._dynamo.config.recompile_limit`` above the number of layers); with ``False`` the name is ``""``.

    Blocks may be nested, and the innermost that a call belongs to gets it. Blocks need not end in the order they began.
    Reached are calls by attribute (``F.scaled_dot_product_attention``) and every global of a module that is torch's
    function, imported before or in the block; not reached is a function kept elsewhere (a closure, a default argument,
    a class), and what is not a call of it: `torch.nn.MultiheadAttention` with ``need_weights=True``. The fused
    evaluation path of `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder` skips the function, too; it is
    switched off within the block, for the whole process.

    >>> import torch.nn.functional as F
    >>> def zeros(original, name, query, key, value, *args, **kwargs):
    ...     return torch.zeros_like(original(query, key, value, *args, **kwargs))
    >>> x = torch.ones(1, 1, 2, 4)
    >>> with intercepted(zeros):
    ...     inside = F.scaled_dot_product_attention(x, x, x)
    >>> bool(inside.any()), bool(F.scaled_dot_product_attention(x, x, x).any())
    (False, True)
    """
    running = None if model is None else _Running()
    interception = _Interception(handler, running)
    with ExitStack() as stack:
        if model is not None and running is not None:
            for module, path in _paths(model):
                stack.enter_context(_tracked(module, path, path if named else "", running))
        _begin(interception)
        stack.callback(_end, interception)
        yield


def _paths(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module with its dotted path, without the wrappers that `torch.compile` puts around modules."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        if "_orig_mod" not in module._modules:
            plain = ".".join(part for part in path.split(".") if part != "_orig_mod")
            found.setdefault(id(module), (module, plain))
    return list(found.values())


@contextmanager
def _tracked(module: nn.Module, path: str, name: str, running: _Running) -> Iterator[None]:
    """Keep ``name`` in ``running`` while the forward of ``module`` runs."""
    is_root = not path

    def enter(module: nn.Module, args: object) -> None:
        if is_root:  # (what a KeyboardInterrupt left: hooks are told of exceptions, not of interrupts)
            running.names.clear()
        running.names.append(name)

    def leave(module: nn.Module, args: object, out: object) -> None:
        if running.names:
            running.names.pop()

    # Kept under a name of ours, where `register_forward_hook` takes the next number: guards of torch.compile hold the
    # keys, and with numbers every layer and every block would be compiled anew.
    before: Any = module._forward_pre_hooks
    key = next(k for n in count() if (k := f"lowbit_attention.{n}") not in before)
    after: Any = module._forward_hooks
    always: Any = module._forward_hooks_always_called
    before[key], after[key], always[key] = enter, leave, True
    before.move_to_end(key, last=False)  # (a hook that fails first would be left but not entered)
    try:
        yield
    finally:
        for hooks in (before, after, always):
            hooks.pop(key, None)


def _begin(interception: _Interception) -> None:
    global _active, _fastpath
    with _lock:
        if not _active:
            _replace()
            _fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _active = (*_active, interception)


def _end(interception: _Interception) -> None:
    global _active
    with _lock:
        _active = tuple(other for other in _active if other is not interception)
        if not _active:
            _restore()
            torch.backends.mha.set_fastpath_enabled(_fastpath)


def _replace() -> None:
    global _before
    _before = F.scaled_dot_product_attention  # torch's, or what someone else put in its place
    _swap(_TORCH, scaled_dot_product_attention)
    F.scaled_dot_product_attention = scaled_dot_product_attention
    if F.multi_head_attention_forward is _MHA:
        F.multi_head_attention_forward = _MHA_TRACEABLE


def _restore() -> None:
    if F.scaled_dot_product_attention is scaled_dot_product_attention:  # (else someone replaced it in the block)
        F.scaled_dot_product_attention = _before
    if F.multi_head_attention_forward is _MHA_TRACEABLE:
        F.multi_head_attention_forward = _MHA
    _swap(scaled_dot_product_attention, _TORCH)


def _swap(old: Handler, new: Handler) -> None:
    for module in _modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _modules() -> list[ModuleType]:
    """Where names may be replaced: not in torch, whose compiled graphs look the function up in ``torch._C._nn``."""
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and (module is F or name.partition(".")[0] not in ("torch", _SELF))
    ]
