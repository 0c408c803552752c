"""What `intercept` leaves in code that torch.compile makes: an operator that decides when the code runs.

The decision cannot be made while torch.compile traces, since the code is used again for other modules of the same
class. What is known then only is which modules the code itself holds, relative to the one whose forward it is; the
operator is told (``where``), and finds that one among the frames that run.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..call.torch_call import TorchCall
from ..ops import operator, sdpa_operator
from .scope import Block, Place, frames, running

_INSIDE = "inside "
"""``where`` of a module that is part of the one whose frame runs: its dotted path there follows."""
_OBJECTS = "objects "
"""``where`` of modules that are not: their numbers follow, innermost first."""

_TO = "to "
"""In front of ``where`` of a call that was made to a block (`intercept.ask`): its number follows, and a semicolon."""

_modules: dict[int, weakref.ref[nn.Module]] = {}
_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_next = count()
_numbering = threading.Lock()
# (importlib.reload runs this again, and code compiled before keeps its numbers)
_next_block: count[int] = globals().get("_next_block") or count()
_asked: weakref.WeakValueDictionary[int, Block] = globals().get("_asked") or weakref.WeakValueDictionary()

watching = False
"""Whether a block in force wants to see calls with gradients, too; set by `intercept.reconcile`."""
tally: Tensor = torch.zeros((), dtype=torch.int64, device="cpu")
"""Written by the operator that counts, so that torch.compile does not take it for dead code."""


Decide = Callable[..., Tensor]
Whose = Callable[[str], "Place | None"]
_decide: Decide
_whose: Whose


def implement(decide: Decide, whose: Whose) -> None:
    """Let the operators ask these (`intercept`) when they run: what runs a call, and which block it belongs to."""
    global _decide, _whose
    _decide, _whose = decide, whose


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exports() -> bool:
    """Whether this is a program for elsewhere. (Asked here: torch 2.11 answers its own tracer wrongly.)"""
    return _is_exporting()


def _is_exporting() -> bool:
    """Whether `torch.export` is at work; in torch 2.5 its two exporters say so only to themselves."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    translator = getattr(torch._dynamo.symbolic_convert.tls, "current_tx", None)
    return bool(torch.compiler._is_compiling_flag or getattr(translator, "export", False))


def compiles_around() -> bool:
    """Whether torch.compile runs Python code on tensors without data, to see what it does."""
    return torch._guards.TracingContext.try_get() is not None and not _is_exporting()


def call(*args: Any, to: int | None = None, **kwargs: Any) -> Tensor:
    """One call while torch.compile traces (whose graph this becomes); ``to``: the number of the block it goes to."""
    given = TorchCall.of(*args, **kwargs)
    block = "" if to is None else to_block(to)
    if exports():
        return _exported(given, block)
    if given.wants_grad() or given.dropout_p:
        if watching:
            seen: Tensor = _eagerly(block, *args, **kwargs)
            return seen
        reason = "gradients" if given.wants_grad() else "dropout"
        torch.ops.lowbit_attention.skipped(tally, block + where(), reason)
        return given.run(torch._C._nn.scaled_dot_product_attention)
    out: Tensor = torch.ops.lowbit_attention.sdpa_in_scope(*given.in_autocast().operands(), block + where())
    return out


def to_block(number: int) -> str:
    """What stands in front of ``where`` of a call that was made to the block of this number."""
    return f"{_TO}{number};"


def number_of_block(block: Block) -> int:
    """A new number by which calls are made to a block (`intercept.ask`), also from compiled code."""
    number = next(_next_block)
    _asked[number] = block
    return number


def asked(where: str) -> tuple[Block | None, str]:
    """The block that a call was made to, if any, and the rest of ``where``."""
    if not where.startswith(_TO):
        return None, where
    number, _, rest = where.removeprefix(_TO).partition(";")
    return _asked.get(int(number)), rest


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(block: str, *args: Any, **kwargs: Any) -> Tensor:
    return _decide(block, *args, **kwargs)


def _exported(given: TorchCall, block: str) -> Tensor:
    """An exported program runs anywhere: the handler writes into it what it can, now."""
    options = _export_options(block)
    if options is None or given.dropout_p or given.wants_grad():
        return given.run(torch._C._nn.scaled_dot_product_attention)
    out: Tensor = torch.ops.lowbit_attention.rerouted_sdpa(*given.in_autocast().operands(), *options)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _export_options(block: str) -> tuple[str, str | None, bool, int, str] | None:
    """What the handler that the call traced now belongs to writes into an exported program; ``None``: nothing."""
    place = _whose(block + where())
    options = getattr(place[0].handler, "export_options", None) if place is not None else None
    return None if options is None else options()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def where() -> str:
    """Which modules' forwards the code traced now holds, as `with_compiled` reads it."""
    held = _traced_modules()
    if not held:
        return ""
    around = _anchor([module for frame in frames(sys._getframe()) if (module := running(frame)) is not None])
    innermost = held[0][0]
    for path, module in around.named_modules() if around is not None else ():
        if module is innermost:
            return f"{_INSIDE}{path}"
    from torch._dynamo.guards import GuardBuilder, install_guard

    for _, variable in held:  # this code must not be used for another module of the same class
        if variable.source is not None:
            install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
    return _OBJECTS + ",".join(str(_number_of(module)) for module, _ in held)


def _traced_modules() -> list[tuple[nn.Module, Any]]:
    """The modules whose methods torch.compile is inlining, innermost first, with its own variables for them."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.nn_module import NNModuleVariable, UnspecializedNNModuleVariable

    callers = (frame.f_locals.get("self") for frame in frames(sys._getframe()) if _is_method(frame.f_code))
    translator: Any = next((found for found in callers if isinstance(found, InstructionTranslatorBase)), None)
    held: list[tuple[nn.Module, Any]] = []
    while translator is not None:
        variable = _first_local(translator)
        if isinstance(variable, LazyVariableTracker):
            variable = variable.realize()
        module = variable.value if isinstance(variable, UnspecializedNNModuleVariable) else None
        if isinstance(variable, NNModuleVariable):  # (torch.export has these, in torch 2.5 to 2.8 at least)
            module = translator.output.get_submodule(variable.module_key)
        if isinstance(module, nn.Module) and (not held or held[-1][0] is not module):
            held.append((module, variable))
        translator = getattr(translator, "parent", None)
    return held


def _first_local(translator: Any) -> Any:
    """What torch.compile knows of a method's ``self``."""
    names = translator.f_code.co_varnames
    if not names:
        return None
    variable = translator.symbolic_locals.get(names[0])
    if variable is None:  # (torch 2.5 keeps what a closure refers to apart)
        variable = getattr(translator, "closure_cells", {}).get(names[0])
    if type(variable).__name__ in ("CellVariable", "NewCellVariable"):  # (a closure refers to it, too)
        variable = translator.output.side_effects.load_cell(variable)
    return variable


def _is_method(code: CodeType) -> bool:
    return code.co_argcount > 0 and code.co_varnames[0] == "self"


def _number_of(module: nn.Module) -> int:
    with _numbering:
        if module not in _numbers:
            number = _numbers[module] = next(_next)
            _modules[number] = weakref.ref(module, lambda _: _modules.pop(number, None))
        return _numbers[module]


def _anchor(modules: Sequence[nn.Module]) -> nn.Module | None:
    """The innermost module that is none which torch.compile has made."""
    return next((module for module in modules if not isinstance(module, GraphModule)), None)


def with_compiled(modules: Sequence[nn.Module], where: str) -> list[nn.Module]:
    """The modules that run, innermost first: those of the frames, and before them those that compiled code holds."""
    held: list[nn.Module] = []
    if where.startswith(_INSIDE) and (around := _anchor(modules)) is not None:
        held = [around]
        for part in filter(None, where.removeprefix(_INSIDE).split(".")):
            module = held[0]._modules.get(part)
            if module is None:  # (a twin of the module that was traced, with another inside: what is known is around)
                break
            held.insert(0, module)
        held.pop()
    elif where.startswith(_OBJECTS):
        references = (_modules.get(int(n)) for n in where.removeprefix(_OBJECTS).split(","))
        held = [module for ref in references if ref is not None and (module := ref()) is not None]
    return [*held, *modules]


# ---- the operators


def _run(given: TorchCall, where: str) -> Tensor:
    return given.run(_decide, where)


def _skipped(tally: Tensor, where: str, reason: str) -> None:
    place = _whose(where)
    if place is not None and (told := getattr(place[0].handler, "skipped", None)) is not None:
        told(reason)


sdpa_operator("sdpa_in_scope", "str where", _run)
operator("skipped(Tensor(a!) tally, str where, str reason) -> ()", _skipped, lambda *_: None, mutates=True)
