"""Where the GPU's time of a call goes: its kernels, told apart by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .base import Unsupported, first_line

Work = Literal["attention", "products", "rest"]

_FUSED = re.compile(r"triton_(poi|red|per|for)_")
"""Inductor's fused elementwise kernels, which are named after everything that they touch."""
_ATTENTION = re.compile(
    r"^(attention_wgmma|attention_mma|pack|statistics|query_means|delta_s)$"  # ours, packing included
    r"|sdpa|fmha|flash|attention|attn|mha|softmax",  # torch's, cuDNN's and CUTLASS's
    re.IGNORECASE,
)
_PRODUCTS = re.compile(
    r"gemm|gemv|matmul|nvjet|cutlass|cublas|xmma|splitk|convolv|implicit|triton_(tem|mm)", re.IGNORECASE
)
"""Linear layers and convolutions; Hopper's cuBLAS calls its kernels ``nvjet_…``."""


@dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of kernels by what they do. Kernels that overlap count in full, so the sum may exceed a call's."""

    attention_ms: float
    products_ms: float
    rest_ms: float


def work_of(kernel: str) -> Work:
    """What a kernel does, by its name. The emulation's kernels are torch's: products and the rest.

    >>> [work_of(name) for name in ("attention_wgmma", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "Memset (Device)")]
    ['attention', 'products', 'rest']
    """
    if _FUSED.match(kernel):
        return "rest"
    if _ATTENTION.search(kernel):
        return "attention"
    return "products" if _PRODUCTS.search(kernel) else "rest"


def kernel_times(kernels: Iterable[tuple[str, float]]) -> KernelTimes:
    """The sums over kernels, given as names and microseconds.

    >>> kernel_times([("fmha_cutlassF_bf16", 1500.0), ("pack", 500.0), ("sm90_xmma_gemm_bf16", 250.0)])
    KernelTimes(attention_ms=2.0, products_ms=0.25, rest_ms=0.0)
    """
    sums: dict[Work, float] = {"attention": 0.0, "products": 0.0, "rest": 0.0}
    for name, microseconds in kernels:
        sums[work_of(name)] += microseconds / 1000
    return KernelTimes(**{f"{work}_ms": round(ms, 4) for work, ms in sums.items()})


def profiled(call: Callable[[], object]) -> KernelTimes:
    """One call on the current CUDA device under torch's profiler.

    Raises:
        Unsupported: the profiler fails, or tells of no kernel; then whether the call was made is not known.
    """
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = call()
            torch.cuda.synchronize()
        del out
        found = list(_kernels(profile.key_averages()))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Unsupported(f"torch's profiler failed: {first_line(error)}") from error
    if not found:
        raise Unsupported("torch's profiler saw no kernel: CUPTI is missing here, or the driver forbids it")
    return kernel_times(found)


def _kernels(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """Names and microseconds of what ran on the device; regions that torch.compile or a user named are no kernels."""
    for event in events:
        on_device = str(event.device_type).endswith("CUDA")
        named = getattr(event, "is_user_annotation", False) or event.key.startswith(("Torch-Compiled", "ProfilerStep"))
        if on_device and not named and event.self_device_time_total > 0:
            yield event.key, float(event.self_device_time_total)
