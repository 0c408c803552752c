"""Kernels by their names, as a profiler on a GPU tells them."""

from types import SimpleNamespace

import pytest
import torch

from lowbit_attention.bench import kernel_time
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.kernel_time import KernelTimes, profiled, work_of


@pytest.mark.parametrize(
    ("work", "names"),
    [
        (
            "attention",
            [
                "attention_wgmma", "attention_mma", "pack", "statistics", "query_means", "delta_s",
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1",
                "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 32, 4>>",
                "void pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>",
                "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
                "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>",
                "triton_tem_fused_flex_attention_0",
            ],
        ),
        (
            "products",
            [
                "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
                "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "triton_tem_fused_addmm_gelu_3",
                "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
                "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
                "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc",
            ],
        ),
        (
            "rest",
            [
                "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
                "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
                "triton_poi_fused__scaled_dot_product_flash_attention_clone_3", "triton_red_fused_addmm_mul_2",
                "triton_per_fused_native_layer_norm_mm_0", "Memset (Device)", "Memcpy DtoD (Device -> Device)",
                "void at::native::unpack_kernel", "void at::native::(anonymous namespace)::CatArrayBatchedCopy",
            ],
        ),
    ],
)  # fmt: skip
def test_what_a_kernel_does(work, names):
    assert {name: work_of(name) for name in names} == dict.fromkeys(names, work)


def event(key, us, device="CUDA", **more):
    return SimpleNamespace(key=key, self_device_time_total=us, device_type=f"DeviceType.{device}", **more)


def profiler(monkeypatch, events):
    calls = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            calls.append("begin")
            return self

        def __exit__(self, *_):
            calls.append("end")

        def key_averages(self):
            return events

    monkeypatch.setattr(kernel_time.torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    return calls


def test_a_step_is_profiled_kernel_by_kernel(monkeypatch):
    events = [
        event("attention_wgmma", 3000.0, is_user_annotation=False),
        event("nvjet_x", 2000.0),
        event("Memset (Device)", 500.0),
        event("Torch-Compiled Region: 0/0", 9000.0),
        event("my own gemm region", 9000.0, is_user_annotation=True),
        event("cudaLaunchKernel", 0.0, "CPU"),
    ]
    calls = profiler(monkeypatch, events)
    assert profiled(lambda: calls.append("step")) == KernelTimes(3.0, 2.0, 0.5)
    assert calls == ["wait", "begin", "step", "wait", "end"]


def test_a_profiler_that_sees_nothing_says_so(monkeypatch):
    profiler(monkeypatch, [event("cudaLaunchKernel", 0.0, "CPU")])
    with pytest.raises(Unsupported, match="CUPTI is missing"):
        profiled(lambda: None)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("CUPTI_ERROR_NOT_INITIALIZED"), Unsupported, "profiler failed: RuntimeError: CUPTI_ERROR"),
        (torch.cuda.OutOfMemoryError("full"), torch.cuda.OutOfMemoryError, "full"),
    ],
)
def test_a_profiler_that_fails_is_told_from_a_full_gpu(monkeypatch, error, kind, words):
    profiler(monkeypatch, [])

    def fails():
        raise error

    with pytest.raises(kind, match=words):
        profiled(fails)
