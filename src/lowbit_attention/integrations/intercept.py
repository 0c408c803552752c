"""`intercepted`: the one primitive that reroutes ``torch.nn.functional.scaled_dot_product_attention``.

The name is replaced while a block is in force, and the function in its place decides call by call (`scope`) whose the
call is. Nothing else is kept: where no block is in force it passes through and puts torch's own function back, so what
an interrupt leaves half done is mended by the next call, or by the garbage collector when the block goes.

Why the name is replaced, and no ``torch.overrides.TorchFunctionMode`` entered: a mode costs every torch function about
1 µs a call, not only attention; it holds in one thread only; and code compiled outside of it is compiled again for the
mode itself. A replaced name costs nothing elsewhere, holds in every thread, and `torch.compile` guards on it: a model
compiled before is recompiled inside the block, and its first code is used again after it. What a mode sees and a
replaced name does not: a function kept in a closure, a default argument, a container or a class before the block.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
import weakref
from collections.abc import Iterable
from contextlib import ContextDecorator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import InvalidArgumentError
from . import traced
from .scope import Block, Handler, Place, frames, owner, running

if "_end_all" in globals():  # (importlib.reload runs this again: what the blocks so far have changed is undone first)
    globals()["_end_all"]()

_TORCH: Handler = torch._C._nn.scaled_dot_product_attention
_MHA = F.multi_head_attention_forward
# The same code as another function: torch.compile keeps the first as one node, whose insides run when no module is
# known to be running, and traces into this one.
_MHA_TRACEABLE = FunctionType(_MHA.__code__, _MHA.__globals__, _MHA.__name__, _MHA.__defaults__, _MHA.__closure__)
_MHA_TRACEABLE.__kwdefaults__ = _MHA.__kwdefaults__
_SELF = __name__.partition(".")[0]


class _Stood(NamedTuple):
    """What stood in torch before: the function, and whether attention modules took their fused path."""

    function: Handler
    fastpath: bool


_blocks: list[weakref.ref[Block]] = []
"""Those entered, innermost last. (Appending and removing are single steps that no thread and no interrupt divides.)"""
_stood: _Stood | None = None
"""``None``: torch is as it was."""
_reconciling: dict[str, object] = {}
"""The token of who does it: a lock that is open as soon as no frame of `reconcile` with that token runs any more."""


class intercepted(ContextDecorator):
    """Within the block, ``handler`` gets the calls of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        handler: called as ``handler(original, name, *args, **kwargs)``; see `scope.Handler`. What it calls itself goes
            to torch's own function.
        model: only the calls made while a forward of this module or one of its submodules runs (in any thread);
            ``None``: every call of the process. May be compiled, before or inside the block. A pipeline (anything with
            a dict ``components``) stands for its transformers and U-Nets.

    Blocks may be nested, and the innermost that a call belongs to gets it. Blocks need not end in the order they began,
    and one that nobody refers to any more is over. Reached are calls by attribute
    (``F.scaled_dot_product_attention``) and every global of a module that is torch's function, imported before or in
    the block; not reached is a function kept elsewhere (a closure, a default argument, a class), and what is not a call
    of it: `torch.nn.MultiheadAttention` with ``need_weights=True``. TorchScript sees torch's own. The fused evaluation
    path of `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder` skips the function, too; it is switched off
    within the block, for the whole process.

    If somebody else has put a function of his own in the name's place, it is called, and what it asks of torch by the
    name comes back to the handler.

    >>> import torch.nn.functional as F
    >>> def zeros(original, name, query, key, value, *args, **kwargs):
    ...     return torch.zeros_like(original(query, key, value, *args, **kwargs))
    >>> x = torch.ones(1, 1, 2, 4)
    >>> with intercepted(zeros):
    ...     inside = F.scaled_dot_product_attention(x, x, x)
    >>> bool(inside.any()), bool(F.scaled_dot_product_attention(x, x, x).any())
    (False, True)

    Raises:
        InvalidArgumentError: a ``model`` that is none; a block entered twice at once.
    """

    def __init__(self, handler: Handler, model: Any = None) -> None:
        self.block = Block(handler, model)

    def __enter__(self) -> Any:
        block = self.block
        if block.entered:
            raise InvalidArgumentError("the block is in force already; make another one")
        block.wanted = True
        _blocks.append(weakref.ref(block))
        reconcile()
        block.entered = True  # (last: a block that could not be entered claims no calls)
        return None

    def __exit__(self, *_: object) -> None:
        self.block.entered = self.block.wanted = False
        reconcile()

    def __del__(self) -> None:
        block: Block | None = getattr(self, "block", None)
        if block is not None and block.wanted and not sys.is_finalizing():
            block.entered = block.wanted = False
            reconcile()


def reconcile() -> None:
    """Make torch what the blocks in force want it to be. Harmless at any time, and after it was interrupted."""
    mine = object()
    while (other := _reconciling.setdefault("by", mine)) is not mine:
        if _runs(other, [sys._getframe()]):  # (the garbage collector came in between)
            break
        if not _runs(other, sys._current_frames().values()):
            _reconciling.pop("by", None)  # it was interrupted, or is another process's
        time.sleep(1e-4)
    try:
        wanted = None
        while wanted != (wanted := _wanted()):
            if wanted:
                _install()
            elif _stood is not None:
                _uninstall(_stood)
    finally:
        if _reconciling.get("by") is mine:
            del _reconciling["by"]


def _runs(token: object, tops: Iterable[FrameType]) -> bool:
    """Whether `reconcile` runs with this token in one of these threads, given by their innermost frames."""
    return any(
        frame.f_code is _RECONCILE and frame.f_locals.get("mine") is token for top in tops for frame in frames(top)
    )


_RECONCILE = reconcile.__code__


def _wanted() -> bool:
    """Whether some block wants to be, or become, in force."""
    for ref in tuple(_blocks):
        if (block := ref()) is None or not block.wanted:
            with contextlib.suppress(ValueError):  # (somebody else has removed it)
                _blocks.remove(ref)
    handlers = [block.handler for ref in tuple(_blocks) if (block := ref()) is not None]
    traced.watching = any(getattr(handler, "watches_gradients", False) for handler in handlers)
    return bool(handlers)


def blocks_in_force() -> list[Block]:
    """Innermost last."""
    return [block for ref in tuple(_blocks) if (block := ref()) is not None and block.entered]


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` while `intercepted` is in force."""
    given = (*args, *kwargs.values())
    if has_torch_function(given):  # a subclass's own attention (torch.nn.attention.bias), which looks for this function
        answer: Tensor = handle_torch_function(scaled_dot_product_attention, given, *args, **kwargs)
        return answer
    if torch.compiler.is_dynamo_compiling() or traced.compiles_around():
        return traced.call(*args, **kwargs)
    if torch._C._get_tracing_state() is not None:  # (torch.jit.trace)
        return _TORCH(*args, **kwargs)
    return decide("", *args, **kwargs)


def decide(where: str, *args: Any, **kwargs: Any) -> Tensor:
    """Run one call now: by the block that it belongs to, or by what stood there before.

    Args:
        where: what `traced` noted of the block that was asked and the modules that compiled code holds; ``""`` in eager
            mode.
    """
    blocks = blocks_in_force()
    asked, where = traced.asked(where)
    if not blocks and asked is None:
        _mend()
        return (_TORCH if _stood is None else _stood.function)(*args, **kwargs)
    inside, place = _look(blocks, where, asked)
    if inside is _HANDLED:
        return _TORCH(*args, **kwargs)
    function = _TORCH if _stood is None else _stood.function
    if inside is None and function is not _TORCH and asked is None:
        return _through(function, place, args, kwargs)
    return _TORCH(*args, **kwargs) if place is None else _handled(place, args, kwargs)


def ask(number: int, *args: Any, **kwargs: Any) -> Tensor:
    """A call that was made to a block itself, not by the name: its handler runs it, or that of a block within it.

    The block need not be in force. What stood in the name's place before is not asked.

    Args:
        number: the block's (`traced.number_of_block`).
    """
    if torch.compiler.is_dynamo_compiling() or traced.compiles_around():
        return traced.call(*args, to=number, **kwargs)
    return decide(traced.to_block(number), *args, **kwargs)


def whose(where: str) -> Place | None:
    """The block that a call made now belongs to."""
    asked, where = traced.asked(where)
    return _look(blocks_in_force(), where, asked)[1]


def _look(blocks: list[Block], where: str, asked: Block | None) -> tuple[CodeType | None, Place | None]:
    """Which of the two functions below a call is made from within, if any, and the block that it belongs to."""
    inside: CodeType | None = None
    modules = []
    scoped = asked is not None or not all(block.whole_process for block in blocks)
    for frame in frames(sys._getframe(2)):
        code = frame.f_code
        if code is _HANDLED and inside is None:
            return code, None
        if code is _THROUGH and inside is None:
            inside = code
            frame.f_locals["reached"].append(True)
        if scoped and (module := running(frame)) is not None:
            modules.append(module)
    return inside, owner(blocks, traced.with_compiled(modules, where), asked)


def _mend() -> None:
    """No block is in force, and a call came: end those whose ``__enter__`` was interrupted, and put torch back."""
    now_entering = {
        id(frame.f_locals.get("block"))
        for top in sys._current_frames().values()
        for frame in frames(top)
        if frame.f_code is _ENTERING
    }
    for ref in tuple(_blocks):
        if (block := ref()) is not None and not block.entered and id(block) not in now_entering:
            block.wanted = False
    reconcile()


def _handled(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Let the block's handler run a call. While this function runs, what the handler calls goes to torch."""
    block, name = place
    return block.handler(_TORCH, name, *args, **kwargs)


def _through(function: Handler, place: Place | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Let what stood there before run a call. While this function runs, what it asks of torch may be rerouted."""
    reached: list[bool] = []
    out = function(*args, **kwargs)
    if place is not None and not reached and (told := getattr(place[0].handler, "passed_by", None)) is not None:
        told(function)
    return out


_HANDLED, _THROUGH, _ENTERING = _handled.__code__, _through.__code__, intercepted.__enter__.__code__
traced.implement(decide, whose)


def _install() -> None:
    global _stood
    there = F.scaled_dot_product_attention
    if _stood is None or there is _stood.function:
        _stood = _Stood(there, torch.backends.mha.get_fastpath_enabled())
        F.scaled_dot_product_attention = scaled_dot_product_attention  # (first: from now on a call mends what is left)
        torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")
    torch.backends.mha.set_fastpath_enabled(False)
    if F.multi_head_attention_forward is _MHA:
        F.multi_head_attention_forward = _MHA_TRACEABLE
    _swap(_TORCH, scaled_dot_product_attention)


def _uninstall(stood: _Stood) -> None:
    global _stood
    _swap(scaled_dot_product_attention, _TORCH)
    if F.multi_head_attention_forward is _MHA_TRACEABLE:
        F.multi_head_attention_forward = _MHA
    if not torch.backends.mha.get_fastpath_enabled():  # (else someone has switched it on in the block)
        torch.backends.mha.set_fastpath_enabled(stood.fastpath)
    if F.scaled_dot_product_attention is scaled_dot_product_attention:  # (else someone replaced it in the block)
        F.scaled_dot_product_attention = stood.function  # (last: until then the next call mends what is left)
    _stood = None


def _swap(old: Handler, new: Handler) -> None:
    for module in _every_module():
        # (modules that load their contents late raise what they like, and some refuse to be changed)
        with contextlib.suppress(Exception):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


def _every_module() -> list[ModuleType]:
    """Where names may be replaced: not in torch, whose compiled graphs look the function up in ``torch._C._nn``."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in ("torch", _SELF) and isinstance(module, ModuleType)
    ]


def _end_all() -> None:
    """At the interpreter's exit: what runs later must find torch as it was."""
    _blocks.clear()
    reconcile()


atexit.register(_end_all)
