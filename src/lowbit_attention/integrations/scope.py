"""Whose call this is: decided while the call happens, from the frames that are running then.

Nothing is noted when a forward begins, so nothing has to be undone when it ends: not by an exception, an interrupt at
any bytecode, a cancelled task, a generator that is dropped, or a fork. A frame that is gone claims no calls. A block is
in force while it is entered and somebody refers to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgumentError

Handler = Callable[..., Tensor]
"""``handler(original, name, *args, **kwargs)``: ``original`` is the function that stood there before, ``name`` the
dotted path (within the model) of the innermost module whose forward is running, ``None`` without a model; the rest is
the call's. It may have two methods: ``skipped(reason)`` hears of a call that compiled code gave to torch ("gradients",
"dropout"), ``passed_by(function)`` of one that a replacement of somebody else's ran by itself. With an attribute
``watches_gradients`` that is true it gets compiled code's calls with gradients, too, at the price of a graph break."""

MODULE_CALL: CodeType = nn.Module._call_impl.__code__
"""What runs, in Python, while a module's forward does."""

Place = tuple["Block", "str | None"]
"""A block, and the name of the module in it."""


class Block:
    """One interception of `intercept`: the calls of ``model``, or of the whole process, go to ``handler``.

    Attributes:
        entered: whether it is in force; the only state there is.
        wanted: whether torch must be (or become) ready for it.
        subjects: what its names are relative to: one model, or the named transformers of a pipeline.
    """

    __slots__ = ("__weakref__", "_names", "entered", "handler", "subjects", "wanted", "whole_process")

    def __init__(self, handler: Handler, model: Any = None) -> None:
        self.handler = handler
        self.entered = self.wanted = False
        self.whole_process = model is None
        self.subjects = {} if model is None else subjects_of(model)
        self._names = Names(self.subjects)

    def name_of(self, module: nn.Module) -> str | None:
        """The dotted path of ``module``, ``None`` if it is none of this block's."""
        return self._names.of(module)

    def place(self, modules: Sequence[nn.Module]) -> Place | None:
        """Whether it claims a call that is made while these modules run (innermost first), and by which name."""
        if self.whole_process:
            return self, None
        name = self._names.innermost(modules)
        return None if name is None else (self, name)

    def asked(self, modules: Sequence[nn.Module]) -> Place:
        """The same of a call that was made to this very block (`intercept.ask`), whatever runs."""
        return self.place(modules) or (self, None)


class Names:
    """The dotted paths of the modules in ``subjects``, each behind its subject's prefix. It keeps no module alive."""

    def __init__(self, subjects: dict[str, nn.Module]) -> None:
        self._paths: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        for prefix, subject in subjects.items():
            for module, path in _paths(subject):
                name = ".".join(part for part in (prefix, path) if part)
                self._paths.setdefault(id(module), (weakref.ref(module), name))
                # (a replica of nn.DataParallel is another module, with the same dict of hooks)
                self._paths.setdefault(id(module._forward_pre_hooks), (weakref.ref(module), name))

    def of(self, module: nn.Module) -> str | None:
        """The dotted path of ``module``, ``None`` if it is none of these."""
        found = self._paths.get(id(module))
        if found is not None and found[0]() is module:
            return found[1]
        found = self._paths.get(id(module.__dict__.get("_forward_pre_hooks")))
        if found is None or (there := found[0]()) is None:
            return None
        # (torch 2.5 exports a model's stand-in, which shares its `__dict__`)
        same = getattr(module, "_is_replica", False) or module.__dict__ is there.__dict__
        return found[1] if same else None

    def innermost(self, modules: Sequence[nn.Module]) -> str | None:
        """The path of the first of ``modules`` that is one of these."""
        for module in modules:
            if (name := self.of(module)) is not None:
                return name
        return None


def subjects_of(model: Any) -> dict[str, nn.Module]:
    """The modules that ``model`` stands for, by the prefix of their names: itself, or a pipeline's transformers.

    Raises:
        InvalidArgumentError: neither a module nor a pipeline with a transformer.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise InvalidArgumentError(
            f"model must be a torch.nn.Module, a pipeline of modules or None, got {type(model).__name__}"
        )
    modules = {str(name): part for name, part in components.items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in modules.items() if _denoises(name)}
    if not found:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no component named like a transformer or unet, but "
            f"{', '.join(modules) or 'no module at all'}: give the module itself"
        )
    return found


def _denoises(component: str) -> bool:
    """Whether a pipeline's component of this name is its transformer: run at every step, and worth the while."""
    return "encoder" not in component and any(word in component for word in ("transformer", "unet", "prior"))


def _paths(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module with its dotted path, without the wrappers that `torch.compile` puts around modules."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        if "_orig_mod" not in module._modules:
            plain = ".".join(part for part in path.split(".") if part != "_orig_mod")
            found.setdefault(id(module), (module, plain))
    return list(found.values())


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """``frame`` and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def running(frame: FrameType) -> nn.Module | None:
    """The module whose forward this frame runs, if it is such a frame (torch.compile runs copies of the code)."""
    code = frame.f_code
    if code is not MODULE_CALL and (code.co_name != "_call_impl" or code.co_filename != MODULE_CALL.co_filename):
        return None
    module = frame.f_locals.get("self")
    return module if isinstance(module, nn.Module) else None


def owner(blocks: Sequence[Block], modules: Sequence[nn.Module], asked: Block | None = None) -> Place | None:
    """The innermost block that a call belongs to while these modules run (innermost first).

    Args:
        asked: the block that the call was made to. Those entered after it come first, as ever.
    """
    for block in reversed(blocks):
        if block is asked:
            break
        if (place := block.place(modules)) is not None:
            return place
    return None if asked is None else asked.asked(modules)


def recomputes(frame: FrameType | None) -> bool:
    """Whether an `torch.autograd.Function` runs its forward without gradients, and will be asked for some.

    Reentrant checkpoints do: they run the same code again, with gradients, in their backward.
    """
    for one in frames(frame):
        code = one.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] == "ctx":
            # (``needs_input_grad`` is true under torch.no_grad(), too; a graph is recorded where there are edges)
            edges = getattr(one.f_locals.get("ctx"), "next_functions", ())
            if isinstance(edges, tuple) and any(edge[0] is not None for edge in edges):
                return True
    return False
