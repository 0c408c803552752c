"""Providers from other packages, each available only where it is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import (
    Call,
    Part,
    Provider,
    Unsupported,
    import_problem,
    is_installed,
    load,
    need_cuda,
    need_no_mask,
    need_square_causal,
    package_version,
)
from .shapes import Shape


class Peer(Provider):
    """A provider that is an optional package: its module, what pip calls it, and how to come by it."""

    module: str
    packages: tuple[str, ...]
    how: str

    def is_installed(self) -> bool:
        return is_installed(self.module)

    def version(self) -> str:
        found = package_version(*self.packages)
        return found if found != "unknown" else str(getattr(load(self.module), "__version__", found))

    def not_available_reason(self) -> str | None:
        return import_problem(self.module, self.how)


def _nhd(*tensors: Tensor) -> list[Tensor]:
    """Copies as ``[B, N, H, D]``, the layout those peers are made for; the copying is not timed."""
    return [t.transpose(1, 2).contiguous() for t in tensors]


class FlashAttention3(Peer):
    """FlashAttention-3 in 16 bits, from FlashAttention's folder ``hopper``."""

    name = "fa3"
    module = "flash_attn_interface"
    packages = ("flash-attn-3", "flash_attn_3")
    how = "build the folder hopper of github.com/Dao-AILab/flash-attention"

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_no_mask(mask, "FlashAttention-3's function takes none")
        attend = load(self.module).flash_attn_func
        q, k, v = _nhd(q, k, v)
        return {"whole": lambda: attend(q, k, v, causal=shape.is_causal)}  # its causality is bottom-right, as ours


class SageAttention(Peer):
    """The official SageAttention package, with the kernel it picks for this GPU."""

    name = "sageattention"
    module = "sageattention"
    packages = ("sageattention",)
    how = "build github.com/thu-ml/SageAttention"

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_no_mask(mask, "its function is called without one")
        need_square_causal(shape)
        attend = load(self.module).sageattn
        return {"whole": lambda: attend(q, k, v, tensor_layout="HND", is_causal=shape.is_causal)}


class ComfyKitchen(Peer):
    """comfy-kitchen's INT8 attention; its prequantised half is the kernel alone."""

    name = "comfy_kitchen"
    module = "comfy_kitchen"
    packages = ("comfy-kitchen",)
    how = "pip install comfy-kitchen"

    def not_available_reason(self) -> str | None:
        problem = super().not_available_reason()
        if problem is None and not hasattr(load(self.module), "int8_attention"):
            return f"comfy-kitchen {self.version()} has no int8_attention: pip install -U comfy-kitchen"
        return problem

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_no_mask(mask, "its function is called without one")
        if shape.is_causal:
            raise Unsupported("its INT8 attention has no causality")
        kitchen = load(self.module)
        parts: dict[Part, Call] = {"whole": lambda: kitchen.int8_attention(q, k, v)}
        if hasattr(kitchen, "prequantize_int8_attention"):
            packed = kitchen.prequantize_int8_attention(q, k, v)
            parts["kernel"] = lambda: kitchen.int8_attention_from_prequantized(packed)
        return parts


class Xformers(Peer):
    """xformers' memory-efficient attention, with the operator it picks."""

    name = "xformers"
    module = "xformers"
    packages = ("xformers",)
    how = "pip install xformers"

    def not_available_reason(self) -> str | None:
        return super().not_available_reason() or import_problem("xformers.ops", self.how)

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_no_mask(mask, "it is called with causality alone")
        need_square_causal(shape)
        if shape.q_heads != shape.kv_heads:
            raise Unsupported("groups of query heads would need copies of K and V")
        ops: Any = load("xformers.ops")
        bias = ops.LowerTriangularMask() if shape.is_causal else None
        q, k, v = _nhd(q, k, v)
        return {"whole": lambda: ops.memory_efficient_attention(q, k, v, attn_bias=bias)}
