"""cuDNN's FP8 attention through its graph API (pip ``nvidia-cudnn-frontend``): E4M3 in and out, the kernel alone.

On Hopper cuDNN writes an FP8 output only, so a whole call from and to 16 bits would need passes that cuDNN does not
have; what is timed here has its inputs in FP8 already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import (
    Call,
    Part,
    Provider,
    Unsupported,
    first_line,
    import_problem,
    load,
    need_cuda,
    need_no_mask,
    need_square_causal,
    package_version,
)
from .shapes import Shape

E4M3_MAX = 448.0
_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


class CudnnFp8(Provider):
    """``sdpa_fp8`` with one scale a tensor."""

    name = "cudnn_fp8"

    def __init__(self) -> None:
        self._handles: dict[torch.device, Any] = {}

    def version(self) -> str:
        return f"cudnn-frontend {package_version('nvidia-cudnn-frontend')}, cuDNN {load('cudnn').backend_version()}"

    def not_available_reason(self) -> str | None:
        return import_problem("cudnn", "pip install nvidia-cudnn-frontend")

    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        need_cuda(q)
        need_no_mask(mask, "its graph is built without one")
        need_square_causal(shape)  # bottom-right is refused on Hopper
        if torch.cuda.get_device_capability(q.device) < (9, 0):
            raise Unsupported("cuDNN's FP8 attention needs compute capability 9.0 or newer")
        cudnn = load("cudnn")
        if q.device not in self._handles:
            self._handles[q.device] = cudnn.create_handle()
        handle = self._handles[q.device]
        quantized, scales = quantize(q, k, v)
        problems: list[str] = []
        # Older versions insist on the largest softmax value as an output, newer ones prefer to do without.
        for with_amax_s in (False, True):
            try:
                graph, tensors, out = build(cudnn, handle, shape, quantized, scales, with_amax_s)
                workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
                call = _caller(cudnn, handle, graph, tensors, workspace, out)
                call()
                torch.cuda.synchronize(q.device)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # its errors are of several types of its own, across versions
                problems.append(first_line(error))
            else:
                return {"kernel": call}
        raise Unsupported("cuDNN: " + " | ".join(dict.fromkeys(problems)))


def quantize(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Q, K and V in E4M3, one scale a tensor, and every scale the graph asks for (float32, ``[1, 1, 1, 1]``)."""
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, t in (("q", q), ("k", k), ("v", v)):
        scale = t.abs().amax().float() / E4M3_MAX
        quantized[name] = (t.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        scales[f"descale_{name}"] = scale
    largest = torch.full_like(scales["descale_v"], E4M3_MAX)
    scales["scale_s"], scales["descale_s"] = largest, 1 / largest  # the softmax is at most 1
    scales["scale_o"] = 1 / scales["descale_v"]  # an average of V is no larger than V
    return quantized, {name: scales[name].reshape(1, 1, 1, 1).contiguous() for name in _SCALES}


def build(
    cudnn: Any, handle: Any, shape: Shape, quantized: dict[str, Tensor], scales: dict[str, Tensor], with_amax_s: bool
) -> tuple[Any, dict[Any, Tensor], Tensor]:
    """The finished graph, the tensors that fill its places (outputs included), and which of them is the output."""
    e4m3, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=f32, compute_data_type=f32, handle=handle)

    def place(name: str, t: Tensor, dtype: Any) -> Any:
        return graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=dtype)

    places = {name: place(name, t, e4m3) for name, t in quantized.items()}
    places |= {name: place(name, t, f32) for name, t in scales.items()}
    # `is_inference` and `use_causal_mask` are the names that every version since FP8 attention came has.
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **places, is_inference=True, attn_scale=shape.head_dim**-0.5, use_causal_mask=shape.is_causal, name="attention"
    )
    result, one = torch.empty_like(quantized["q"]), scales["scale_o"]
    outputs = [(out, result, e4m3), (amax_o, torch.zeros_like(one), f32)]
    outputs += [(amax_s, torch.zeros_like(one), f32)] if with_amax_s else []
    for where, t, dtype in outputs:
        where.set_output(True).set_dim(list(t.shape)).set_stride(list(t.stride())).set_data_type(dtype)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    tensors = {places[name]: t for name, t in (quantized | scales).items()} | {where: t for where, t, _ in outputs}
    return graph, tensors, result


def _caller(cudnn: Any, handle: Any, graph: Any, tensors: dict[Any, Tensor], workspace: Tensor, out: Tensor) -> Call:
    def call() -> Tensor:
        cudnn.set_stream(handle, torch.cuda.current_stream(workspace.device).cuda_stream)
        graph.execute(tensors, workspace, handle=handle)
        return out

    return call
