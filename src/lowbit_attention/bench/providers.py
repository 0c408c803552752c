"""The providers by name: ours, PyTorch's own, and those of other packages."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from .._version import __version__
from ..api import attention, attention_varlen, explain
from ..backends.base import Emulation
from ..backends.cuda.kernel import CudaKernel
from ..backends.registry import IMPLEMENTATIONS
from ..errors import InvalidArgumentError, UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.named import RECIPES
from ..recipes.named import recipe as find_recipe
from .base import (
    Call,
    Part,
    Provider,
    Unsupported,
    cu_seqlens,
    first_line,
    import_problem,
    load,
    need_cuda,
    need_square_causal,
    packed,
)
from .cudnn_fp8 import CudnnFp8
from .peers import ComfyKitchen, FlashAttention3, SageAttention, Xformers
from .shapes import Shape

DEFAULT_RECIPES = ("sage2_8b", "sage2pp_8b")
_OURS = "ours:"


class Ours(Provider):
    """This package with one recipe: the whole call and, where a kernel can be had alone, that."""

    takes_sequences = True

    def __init__(self, recipe: str | Recipe) -> None:
        self.recipe = find_recipe(recipe)
        self.name = _OURS + self.recipe.name

    def version(self) -> str:
        return __version__

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        recipe, causal = self.recipe, shape.is_causal
        if shape.is_varlen:
            return {"whole": self._of_sequences(shape, q, k, v)}
        chosen = explain(q, k, v, recipe=recipe, is_causal=causal, attn_mask=mask)
        if chosen.implementation is None:
            raise Unsupported("; ".join(f"{v.implementation}: {r}" for v in chosen.verdicts for r in v.reasons))
        parts: dict[Part, Call] = {"whole": lambda: attention(q, k, v, recipe=recipe, is_causal=causal, attn_mask=mask)}
        if q.device.type != "cuda":
            return parts
        if chosen.implementation == Emulation.name:
            why = [f"{v.implementation}: {'; '.join(v.reasons)}" for v in chosen.verdicts if not v.chosen]
            raise Unsupported("no kernel here, only the emulation" + (f" ({' | '.join(why)})" if why else ""))
        if kernel := _kernel_alone(chosen.implementation, q, k, v, recipe, causal, mask):
            parts["kernel"] = kernel
        return parts

    def _of_sequences(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """`attention_varlen`; an emulation is no more timed than elsewhere."""
        (q, k, v), cu = packed(q, k, v), cu_seqlens(shape, q.device)
        of: dict[str, Any] = {"is_causal": shape.is_causal, "on_emulation": "error" if q.is_cuda else "allow"}
        return lambda: attention_varlen(q, k, v, *cu, recipe=self.recipe, **of)


def _kernel_alone(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, is_causal: bool, mask: Tensor | None
) -> Call | None:
    """Our attention kernel on inputs that are packed here, once; ``None`` where there is no such kernel."""
    kernel = next((one for one in IMPLEMENTATIONS if one.name == implementation), None)
    if not isinstance(kernel, CudaKernel):
        return None
    if mask is not None:
        return _refuse_mask_alone
    try:
        return kernel.kernel_alone(q, k, v, recipe, is_causal)
    except UnsupportedError:
        return None


def _refuse_mask_alone() -> object:
    raise Unsupported("the kernel alone takes no mask, so only whole calls are timed with one")


class TorchSdpa(Provider):
    """``scaled_dot_product_attention`` with one of its backends, or (``None``) whichever it picks itself."""

    def __init__(self, name: str, backend: str | None) -> None:
        self.name, self.backend = name, backend

    def version(self) -> str:
        cudnn: Any = torch.backends.cudnn
        return f"{torch.__version__}" + (f", cuDNN {cudnn.version()}" if self.backend == "cudnn" else "")

    def not_available_reason(self) -> str | None:
        cudnn: Any = torch.backends.cudnn
        return "this PyTorch has no cuDNN" if self.backend == "cudnn" and not cudnn.is_available() else None

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_square_causal(shape)  # torch's is top-left
        if self.backend == "cudnn":
            need_cuda(q)
        options: dict[str, Any] = {"is_causal": shape.is_causal}
        if mask is not None:
            options = {"attn_mask": _with_causality(mask, shape) if shape.is_causal else mask}
        if shape.q_heads != shape.kv_heads:
            if Version(torch.__version__) < Version("2.5"):
                raise Unsupported(f"torch {torch.__version__} has no enable_gqa; 2.5 or newer has")
            options["enable_gqa"] = True
        call = _only(self.backend, lambda: F.scaled_dot_product_attention(q, k, v, **options))
        with warnings.catch_warnings(record=True) as caught:  # torch warns why a backend cannot run, and then raises
            warnings.simplefilter("always")
            try:
                call()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = dict.fromkeys(str(w.message).partition(" (Triggered")[0].strip() for w in caught)
                raise Unsupported("; ".join(why) or first_line(error)) from error
        return {"whole": call}


class TorchVarlen(Provider):
    """``torch.nn.attention.varlen.varlen_attn``, FlashAttention-2 over packed sequences."""

    name = "torch_varlen"
    takes_sequences = True

    def version(self) -> str:
        return torch.__version__

    def not_available_reason(self) -> str | None:
        return import_problem("torch.nn.attention.varlen", "torch 2.10 or newer has it")

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_square_causal(shape)
        if not shape.is_varlen:
            raise Unsupported("it is for sequences of different lengths: torch_fa2 is the same kernel without")
        if shape.q_heads != shape.kv_heads:
            raise Unsupported("groups of query heads would need copies of K and V")
        attend = load("torch.nn.attention.varlen").varlen_attn
        (q, k, v), cu = packed(q, k, v), cu_seqlens(shape, q.device)
        longest = [max(shape.sequence_lengths(tokens)) for tokens in (shape.q_len, shape.kv_len)]
        options: dict[str, Any] = {"window_size": (-1, 0 if shape.is_causal else -1)}
        if "window_size" not in inspect.signature(attend).parameters:
            options = {"is_causal": shape.is_causal}
        return {"whole": lambda: attend(q, k, v, *cu, *longest, **options)}


def _with_causality(mask: Tensor, shape: Shape) -> Tensor:
    """Both in one mask, as callers of torch write them: it takes a mask or causality. Made once, not timed."""
    sees = torch.ones(shape.q_len, shape.kv_len, dtype=torch.bool, device=mask.device).tril_()
    return mask & sees if mask.dtype == torch.bool else mask.masked_fill(~sees, float("-inf"))


def _only(backend: str | None, call: Call) -> Call:
    """``call`` with every other of torch's attention backends switched off.

    The switches cost half a microsecond of host time a call; ``torch.nn.attention.sdpa_kernel``, which does the same,
    costs nine, and the host's time is reported, too.
    """
    if backend is None:
        return call
    b: Any = torch.backends.cuda
    switches: dict[str, tuple[Callable[[bool], None], bool]] = {
        "flash": (b.enable_flash_sdp, b.flash_sdp_enabled()),
        "cudnn": (b.enable_cudnn_sdp, b.cudnn_sdp_enabled()),
        "math": (b.enable_math_sdp, b.math_sdp_enabled()),
        "mem_efficient": (b.enable_mem_efficient_sdp, b.mem_efficient_sdp_enabled()),
    }
    during = [(switch, name == backend) for name, (switch, _) in switches.items()]
    after = list(switches.values())

    def run() -> object:
        for switch, on in during:
            switch(on)
        try:
            return call()
        finally:
            for switch, on in after:
                switch(on)

    return run


_MAKERS: dict[str, Callable[[], Provider]] = {
    "torch_fa2": lambda: TorchSdpa("torch_fa2", "flash"),
    "torch_cudnn": lambda: TorchSdpa("torch_cudnn", "cudnn"),
    "torch_default": lambda: TorchSdpa("torch_default", None),
    "torch_varlen": TorchVarlen,
    "cudnn_fp8": CudnnFp8,
    "fa3": FlashAttention3,
    "sageattention": SageAttention,
    "comfy_kitchen": ComfyKitchen,
    "xformers": Xformers,
}
NAMES = tuple(_MAKERS)
"""Every provider but ours, which are ``ours:`` and a recipe."""


def default_names() -> list[str]:
    """Ours, torch's FlashAttention-2 and cuDNN, cuDNN's FP8, and those of the peers that are installed here."""
    peers = [FlashAttention3(), SageAttention(), ComfyKitchen(), Xformers()]
    ours = [_OURS + name for name in DEFAULT_RECIPES]
    return [*ours, "torch_fa2", "torch_cudnn", "cudnn_fp8", *(p.name for p in peers if p.is_installed())]


def resolve_providers(names: Sequence[str]) -> list[Provider]:
    """The providers of these names, each once.

    Raises:
        InvalidArgumentError: an unknown name. InvalidRecipeError: an unknown recipe behind ``ours:``.
    """
    found: dict[str, Provider] = {}
    for name in names:
        if name.startswith(_OURS):
            provider: Provider = Ours(name.removeprefix(_OURS))
        elif name in _MAKERS:
            provider = _MAKERS[name]()
        else:
            raise InvalidArgumentError(
                f"unknown provider {name!r}; known: {', '.join(NAMES)}, and ours:<recipe> with one of "
                f"{', '.join(RECIPES)}"
            )
        found.setdefault(provider.name, provider)
    return list(found.values())
