"""Ours and the peers: what they are called with, and what they refuse. A GPU is not needed."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY, Fake, inputs, measured

from lowbit_attention import attention
from lowbit_attention.backends.cuda.mma import MMA_KERNEL
from lowbit_attention.bench import base, providers
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.cudnn_fp8 import CudnnFp8, build, quantize
from lowbit_attention.bench.peers import ComfyKitchen, FlashAttention3, SageAttention, Xformers
from lowbit_attention.bench.providers import NAMES, Ours, TorchSdpa, TorchVarlen, default_names, resolve_providers
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.errors import InvalidArgumentError, InvalidRecipeError, UnsupportedError


def test_names_are_resolved_once_each():
    found = resolve_providers(["ours:sage2_8b", "torch_fa2", "ours:sage2_4b:smooth_q=false", "torch_fa2"])
    assert [p.name for p in found] == ["ours:sage2_8b", "torch_fa2", found[2].name]
    assert found[2].recipe.smooth_q is False
    assert [p.name for p in resolve_providers(NAMES)] == list(NAMES)
    assert default_names()[:5] == ["ours:sage2_8b", "ours:sage2pp_8b", "torch_fa2", "torch_cudnn", "cudnn_fp8"]
    with pytest.raises(InvalidArgumentError, match=r"unknown provider 'fa9'; known: torch_fa2, .*ours:<recipe>"):
        resolve_providers(["fa9"])
    with pytest.raises(InvalidRecipeError, match="unknown name"):
        resolve_providers(["ours:sage9"])


@pytest.mark.parametrize("text", ["1x2x64x32", "1x4/2x48x32:causal"])
@pytest.mark.parametrize("name", ["ours:sage2_8b", "ours:exact", "torch_default", "torch_fa2"])
def test_providers_that_run_on_a_cpu_compute_attention(name, text):
    shape = parse_shape(text)
    q, k, v = inputs(shape)
    (provider,) = resolve_providers([name])
    parts = provider.prepare(shape, q, k, v)
    assert list(parts) == ["whole"]
    group = shape.q_heads // shape.kv_heads
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.float(), *(t.float().repeat_interleave(group, 1) for t in (k, v)), is_causal=shape.is_causal
    )
    torch.testing.assert_close(parts["whole"]().float(), exact, atol=0.1, rtol=0.1)
    assert provider.version()


@pytest.mark.parametrize("text", ["3x2x40x16:varlen", "3x4/2x24,40x16/8:causal:varlen"])
def test_sequences_are_each_a_call_of_their_own(text):
    shape = parse_shape(text)
    q, k, v = inputs(shape)
    parts = Ours("exact").prepare(shape, q, k, v)
    assert list(parts) == ["whole"]
    packed_q, packed_k, packed_v = base.packed(q, k, v)
    assert packed_v.shape == (3 * shape.kv_len, shape.kv_heads, shape.v_head_dim)
    out, at_q, at_k = parts["whole"](), 0, 0
    assert out.shape == (3 * shape.q_len, shape.q_heads, shape.v_head_dim)
    for n, m in zip(shape.sequence_lengths(shape.q_len), shape.sequence_lengths(shape.kv_len), strict=True):
        one = (packed_q[at_q : at_q + n], packed_k[at_k : at_k + m], packed_v[at_k : at_k + m])
        expected = attention(*(t[None] for t in one), recipe="exact", is_causal=shape.is_causal, layout="NHD")
        torch.testing.assert_close(out[at_q : at_q + n], expected[0])
        at_q, at_k = at_q + n, at_k + m
    assert (at_q, at_k) == (len(out), len(packed_k))


def test_only_those_who_take_sequences_are_given_some():
    shape = parse_shape("2x2x16x16:varlen")
    (result,) = measured([Fake("fixed", {"whole": lambda: None}), *resolve_providers(["ours:exact"])], (shape,))
    assert [row.provider for row in result.rows] == ["ours:exact"]
    assert [(n.provider, n.reason) for n in result.notes] == [
        ("fixed", "it takes no sequences of different lengths here")
    ]


def test_torch_over_sequences_is_called_as_torch_wants(monkeypatch):
    seen = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        seen.append((q.shape, cu_q.tolist(), cu_k.tolist(), max_q, max_k, window_size))

    monkeypatch.setattr(providers, "need_cuda", lambda q: None)
    monkeypatch.setattr(providers, "load", lambda name: SimpleNamespace(varlen_attn=varlen_attn))
    shape = parse_shape("2x3x16x8:causal:varlen")
    TorchVarlen().prepare(shape, *inputs(shape))["whole"]()
    starts = [0, shape.sequence_lengths(16)[0], 32]
    assert seen == [((32, 3, 8), starts, starts, 30, 30, (-1, 0))]
    with pytest.raises(Unsupported, match="torch_fa2 is the same"):
        TorchVarlen().prepare(TINY, *inputs(TINY))
    grouped = parse_shape("2x4/2x16x8:varlen")
    with pytest.raises(Unsupported, match="copies of K and V"):
        TorchVarlen().prepare(grouped, *inputs(grouped))


def test_only_one_backend_is_on_and_only_during_the_call():
    b = torch.backends.cuda
    states = [b.flash_sdp_enabled, b.cudnn_sdp_enabled, b.math_sdp_enabled, b.mem_efficient_sdp_enabled]
    before = [state() for state in states]
    call = providers._only("flash", lambda: [state() for state in states])
    assert call() == [True, False, False, False]
    assert [state() for state in states] == before

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        providers._only("math", fail)()
    assert [state() for state in states] == before


def test_torch_says_why_a_backend_cannot(monkeypatch):
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    shape = parse_shape("1x1x4x8")
    with pytest.raises(Unsupported, match=r"(?i)kernel|flash"):
        TorchSdpa("torch_cudnn_on_cpu", "mem_efficient").prepare(shape, q, q, q)
    with pytest.raises(Unsupported, match="as many queries as keys, got 4 and 8"):
        TorchSdpa("torch_fa2", "flash").prepare(parse_shape("1x1x4,8x8:causal"), q, q, q)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert TorchSdpa("torch_cudnn", "cudnn").not_available_reason() == "this PyTorch has no cuDNN"
    monkeypatch.setattr(providers.torch, "__version__", "2.4.1")
    with pytest.raises(Unsupported, match=r"2\.4\.1 has no enable_gqa"):
        TorchSdpa("torch_fa2", "flash").prepare(parse_shape("1x4/2x48x32"), q, q, q)


class OnCuda:
    """A stand-in for a tensor on a GPU, for decisions that ask for nothing else."""

    device = torch.device("cuda", 0)

    def transpose(self, a, b):
        return self

    def contiguous(self):
        return self


def test_ours_on_a_gpu_offers_the_kernel_where_it_has_one(monkeypatch):
    def chose(implementation):
        verdicts = (SimpleNamespace(implementation="some_kernel", chosen=False, reasons=("no such card",)),)
        monkeypatch.setattr(
            providers, "explain", lambda *a, **k: SimpleNamespace(implementation=implementation, verdicts=verdicts)
        )

    q, ours = OnCuda(), Ours("sage2_8b")
    chose("emulation")
    with pytest.raises(Unsupported, match=r"no kernel here, only the emulation \(some_kernel: no such card\)"):
        ours.prepare(TINY, q, q, q)
    chose(None)
    with pytest.raises(Unsupported, match="some_kernel: no such card"):
        ours.prepare(TINY, q, q, q)

    chose("attention_mma")
    calls = []

    def kernel_alone(*arguments):
        calls.append(arguments)
        return lambda: "ran"

    monkeypatch.setattr(MMA_KERNEL, "kernel_alone", kernel_alone)
    parts = ours.prepare(replace(TINY, is_causal=True), q, q, q)
    assert list(parts) == ["whole", "kernel"]
    assert parts["kernel"]() == "ran"
    assert calls == [(q, q, q, ours.recipe, True)]
    parts = ours.prepare(replace(TINY, mask="seen"), q, q, q, OnCuda())
    assert list(parts) == ["whole", "kernel"]
    with pytest.raises(Unsupported, match="kernel alone takes no mask"):
        parts["kernel"]()
    assert len(calls) == 1

    def refuse(*arguments):
        raise UnsupportedError("not this one")

    monkeypatch.setattr(MMA_KERNEL, "kernel_alone", refuse)
    assert list(ours.prepare(TINY, q, q, q)) == ["whole"]
    chose("torch_sdpa")
    assert list(ours.prepare(TINY, q, q, q)) == ["whole"]


def test_peers_are_called_as_their_packages_want(monkeypatch):
    seen = []

    def record(*arguments, **options):
        seen.append((len(arguments), options))

    ops = SimpleNamespace(memory_efficient_attention=record, LowerTriangularMask=lambda: "lower")
    fakes = {
        "flash_attn_interface": SimpleNamespace(flash_attn_func=record),
        "sageattention": SimpleNamespace(sageattn=record, __version__="2.2"),
        "comfy_kitchen": SimpleNamespace(
            int8_attention=record,
            prequantize_int8_attention=lambda q, k, v: "packed",
            int8_attention_from_prequantized=record,
        ),
        "xformers.ops": ops,
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    q, causal = OnCuda(), replace(TINY, is_causal=True)

    def options(provider, shape, part="whole"):
        seen.clear()
        provider.prepare(shape, q, q, q)[part]()
        return seen[0]

    assert options(FlashAttention3(), causal) == (3, {"causal": True})
    assert options(SageAttention(), TINY) == (3, {"tensor_layout": "HND", "is_causal": False})
    assert options(ComfyKitchen(), TINY) == (3, {})
    assert options(ComfyKitchen(), TINY, "kernel") == (1, {})
    assert options(Xformers(), causal) == (3, {"attn_bias": "lower"})
    assert SageAttention().version() == "2.2"
    with pytest.raises(Unsupported, match="no causality"):
        ComfyKitchen().prepare(causal, q, q, q)
    with pytest.raises(Unsupported, match="groups"):
        Xformers().prepare(parse_shape("1x4/2x8x16"), q, q, q)


@pytest.mark.parametrize(
    "name", ["torch_cudnn", "torch_varlen", "cudnn_fp8", "fa3", "sageattention", "comfy_kitchen", "xformers"]
)
def test_gpu_providers_refuse_a_cpu_in_words(name):
    (provider,) = resolve_providers([name])
    with pytest.raises(Unsupported, match="CUDA devices only"):
        provider.prepare(TINY, *inputs(TINY))


def test_a_package_that_is_missing_or_broken_is_told(monkeypatch, tmp_path):
    assert base.import_problem("no_such_package", "pip install it") == "not installed: pip install it"
    (tmp_path / "broken_package.py").write_text("raise OSError('libx.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert base.import_problem("broken_package", "") == "broken_package does not import: OSError: libx.so: not found"
    assert base.import_problem("json", "") is None
    assert base.package_version("no-such-package", "pytest") == pytest.__version__
    assert len(base.first_line(ValueError("x" * 1000))) <= 620


class FakeCudnn:
    """The part of cudnn's Python that the graph is built with; ``refuses`` says at which step it fails."""

    data_type = SimpleNamespace(FP8_E4M3="e4m3", FLOAT="f32")
    heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")

    def __init__(self, needs_amax_s=False, refuses=None):
        self.needs_amax_s, self.refuses, self.executed = needs_amax_s, refuses, []

    def create_handle(self):
        return "handle"

    def set_stream(self, handle, stream):
        assert (handle, stream) == ("handle", 7)

    def pygraph(self, **options):
        cudnn, graph = self, SimpleNamespace()
        assert options["handle"] == "handle"

        class Place:
            def __init__(self, name):
                self.name, self.is_output = name, False

            def set_output(self, yes):
                self.is_output = yes
                return self

            def set_dim(self, dim):
                assert len(dim) == 4
                return self

            set_stride = set_dim

            def set_data_type(self, dtype):
                return self

        def sdpa_fp8(**places):
            graph.options = places
            graph.outputs = [Place("o"), None, Place("amax_s"), Place("amax_o")]
            return graph.outputs

        def check_support():
            if self.refuses or (self.needs_amax_s and not graph.outputs[2].is_output):
                raise RuntimeError(self.refuses or "Amax_S is missing")

        def execute(tensors, workspace, handle):
            cudnn.executed.append({place.name: t for place, t in tensors.items()})

        graph.tensor = lambda name, dim, stride, data_type: Place(name)
        graph.sdpa_fp8, graph.check_support, graph.execute = sdpa_fp8, check_support, execute
        graph.validate = graph.build_operation_graph = graph.build_plans = lambda: None
        graph.create_execution_plans = lambda modes: None
        graph.get_workspace_size = lambda: 0
        self.graph = graph
        return graph


@pytest.mark.parametrize("needs_amax_s", [False, True])
def test_cudnn_fp8_builds_its_graph(monkeypatch, needs_amax_s):
    cudnn = FakeCudnn(needs_amax_s)
    monkeypatch.setattr("lowbit_attention.bench.cudnn_fp8.load", lambda module: cudnn)
    monkeypatch.setattr("lowbit_attention.bench.cudnn_fp8.need_cuda", lambda q: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    shape = parse_shape("1x4/2x16x32:causal")
    parts = CudnnFp8().prepare(shape, *inputs(shape))
    out = parts["kernel"]()
    assert list(parts) == ["kernel"]
    assert out.dtype == torch.float8_e4m3fn
    assert out.shape == (1, 4, 16, 32)
    given = cudnn.executed[-1]
    assert given["o"] is out
    assert set(given) == {"q", "k", "v", "o", "amax_o", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s",
                          "scale_o"} | ({"amax_s"} if needs_amax_s else set())  # fmt: skip
    assert cudnn.graph.options["use_causal_mask"] is True
    assert cudnn.graph.options["attn_scale"] == 32**-0.5
    cudnn.refuses = "no engine\nfor this"
    with pytest.raises(Unsupported, match=r"^cuDNN: RuntimeError: no engine$"):
        CudnnFp8().prepare(shape, *inputs(shape))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(Unsupported, match=r"9\.0 or newer"):
        CudnnFp8().prepare(shape, *inputs(shape))


def test_fp8_scales_give_the_values_back():
    q, k, v = inputs(TINY)
    quantized, scales = quantize(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        back = quantized[name].float() * scales[f"descale_{name}"]
        torch.testing.assert_close(back, t.float(), rtol=2**-4, atol=1e-3)
        assert quantized[name].float().abs().max() == 448
    assert scales["scale_s"] * scales["descale_s"] == 1
    assert build.__doc__
