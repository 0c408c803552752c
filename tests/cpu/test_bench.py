"""The benchmark: shapes, providers, turns, rows. Its CUDA side is followed with stand-ins; a GPU is not needed."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer

from lowbit_attention.bench import base, providers, results, run, sensors, timing
from lowbit_attention.bench.base import Provider, Unsupported
from lowbit_attention.bench.cudnn_fp8 import CudnnFp8, build, quantise
from lowbit_attention.bench.peers import ComfyKitchen, FlashAttention3, SageAttention, Xformers
from lowbit_attention.bench.pictures import bars, markdown
from lowbit_attention.bench.providers import NAMES, Ours, TorchSdpa, default_names, resolve_providers
from lowbit_attention.bench.run import Settings
from lowbit_attention.bench.shapes import SETS, Shape, parse_shape, shape_set
from lowbit_attention.bench.timing import CudaTimer, Limits, interleave, percentile, rotated
from lowbit_attention.cli import bench as cli
from lowbit_attention.errors import InvalidArgumentError, InvalidRecipeError, UnsupportedError

CPU = torch.device("cpu")
TINY = parse_shape("1x2x64x32")
QUICK = Limits(seconds=60.0, max_rounds=5)


def inputs(shape):
    return run.make_inputs(shape, CPU, torch.bfloat16, 0)


class Fake(Provider):
    """A provider whose calls are given."""

    def __init__(self, name, parts, reason=None):
        self.name, self.parts, self.reason = name, parts, reason

    def version(self):
        return "1"

    def not_available_reason(self):
        return self.reason

    def prepare(self, shape, q, k, v):
        if isinstance(self.parts, Exception):
            raise self.parts
        return self.parts


# Shapes


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (3, 7), (7, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_the_visible_pairs(q_len, kv_len, causal):
    shape = Shape("x", 2, 6, 3, q_len, kv_len, 16, causal)
    seen = sum(not causal or j <= i + kv_len - q_len for i in range(q_len) for j in range(kv_len))
    assert shape.flops == 4 * 2 * 6 * seen * 16


@pytest.mark.parametrize(
    ("text", "sizes", "causal"),
    [
        ("1x24x4608x128", (1, 24, 24, 4608, 4608, 128), False),
        ("4x32/8x8192x128:causal", (4, 32, 8, 8192, 8192, 128), True),
        ("1x40x32760,512x128", (1, 40, 40, 32760, 512, 128), False),
    ],
)
def test_a_shape_is_read_and_written(text, sizes, causal):
    shape = parse_shape(f" {text} ")
    assert (shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.head_dim) == sizes
    assert shape.is_causal is causal
    assert shape.label == shape.name == text
    assert parse_shape(shape.label) == shape


def test_a_label_says_nothing_twice():
    assert parse_shape("1x4/4x8,8x16") == parse_shape("1x4x8x16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1x2x3", "is not batch x heads"),
        ("1x2x3x4x5", "is not batch x heads"),
        ("1x2x3x4:Causal", "is not batch x heads"),
        ("", "is not batch x heads"),
        ("axbxcxd", "is not batch x heads"),
        ("1x0x8x16", "at least 1"),
        ("1x8/0x8x16", "at least 1"),
        ("1x6/4x8x16", "6 query heads are not a multiple of 4"),
    ],
)
def test_a_bad_shape_is_refused(text, words):
    with pytest.raises(InvalidArgumentError, match=words):
        parse_shape(text)


def test_the_sets():
    assert len(SETS["models"]) == 12
    assert len(SETS["grid"]) == 24
    for shapes in SETS.values():
        assert len({s.name for s in shapes}) == len({s.label for s in shapes}) == len(shapes)
        assert all(parse_shape(s.label).flops == s.flops for s in shapes)
    llama = next(s for s in shape_set("models") if s.name == "Llama-3.1-8B 8K")
    assert llama.label == "1x32/8x8192x128:causal"
    with pytest.raises(InvalidArgumentError, match="known: quick, grid, models"):
        shape_set("slow")


# Timing


def test_percentiles():
    values = [50.0, 10.0, 40.0, 20.0, 30.0]
    assert [percentile(values, p) for p in (0, 20, 50, 80, 100)] == [10, 18, 30, 42, 50]
    assert percentile([7.0], 20) == 7
    assert percentile([1.0, 2.0], 50) == 1.5


def test_the_order_rotates_and_the_first_of_a_round_is_told():
    seen = []

    def measure(key, is_first):
        seen.append((key, is_first))
        return float(len(seen))

    times, failed = interleave("abc", measure, Limits(seconds=100, max_rounds=4), clock=lambda: 0.0)
    assert "".join(key for key, _ in seen) == "abc" + "bca" + "cab" + "abc"
    assert [is_first for _, is_first in seen] == [True, False, False] * 4
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert failed == {}
    assert rotated([], 3) == []


@pytest.mark.parametrize(
    ("seconds_a_round", "budget", "rounds"),
    [
        (0.001, 4.0, 50),  # the most rounds
        (0.5, 4.0, 8),  # the budget
        (1.5, 4.0, 5),  # the fewest, where they cost no more than twice the budget
        (2.0, 4.0, 3),  # fewer still
        (60.0, 4.0, 3),
        (1.0, 0.0, 3),
    ],
)
def test_the_budget_ends_the_rounds(seconds_a_round, budget, rounds):
    now = [0.0]

    def measure(key, is_first):
        now[0] += seconds_a_round / 2
        return 1.0

    times, _ = interleave("ab", measure, Limits(seconds=budget), clock=lambda: now[0])
    assert {key: len(some) for key, some in times.items()} == {"a": rounds, "b": rounds}


def test_one_that_runs_out_of_memory_leaves_the_turns():
    def measure(key, is_first):
        if key == "b":
            raise torch.cuda.OutOfMemoryError
        return 1.0

    times, failed = interleave("abc", measure, Limits(seconds=9, max_rounds=2), clock=lambda: 0.0)
    assert times == {"a": [1, 1], "c": [1, 1]}
    assert failed == {"b": "out of memory"}
    assert interleave("b", measure, Limits())[0] == {}


class FakeCuda:
    """What `CudaTimer` asks of torch.cuda, written down in order."""

    def __init__(self, monkeypatch):
        self.log, self.allocated, self.peak = [], 1000, 0
        log = self.log

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                return 0.25

        def allocate(size, dtype, device):
            assert size >= 2 * 96 * 2**20
            return SimpleNamespace(zero_=lambda: log.append("flush"))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=96 * 2**20))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("settle"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(timing.torch, "empty", allocate)


def test_device_time_is_between_two_events_behind_a_flush_and_a_sleep(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    assert timer.run(lambda: cuda.log.append("call"), 50.0, lambda: cuda.log.append("look")) == 250.0
    assert cuda.log == ["flush", 200 * 2000, "record", "call", "record", "look", "wait"]
    cuda.log.clear()
    timer.run(lambda: None, lead_us=1e9)  # a call that waits for the device itself must not make it sleep for long
    assert cuda.log[1] == 3000 * 2000


def test_host_time_begins_with_an_empty_queue(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    assert timer.host_us(lambda: cuda.log.append("call"), 2) >= 0
    assert cuda.log == ["settle", "call", "settle", "call", "settle"]


def test_extra_memory_does_not_count_the_output(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    out = torch.zeros(2**18)  # 1 MiB
    cuda.peak = 1000 + 3 * 2**20
    assert timer.extra_mib(lambda: (out, None)) == 2.0
    cuda.peak = 1000
    assert timer.extra_mib(lambda: out) == 0.0


def test_sensors():
    read = sensors.parse_smi("1755, 3201, 61, 688.41\n")
    assert read == sensors.Reading(1755, 3201, 61, 688.41)
    assert str(read) == "1755 MHz, 3201 MHz memory, 61 °C, 688 W"
    assert sensors.parse_smi("1755, [N/A], 61, [Not Supported]") == sensors.Reading(1755, None, 61, None)
    assert sensors.parse_smi("No devices were found") is None
    some = [sensors.Reading(sm_mhz=mhz) for mhz in (1000, 1700, 1800)] + [sensors.Reading(watts=5)]
    assert sensors.median_reading(some) == sensors.Reading(sm_mhz=1700, watts=5)
    assert sensors.open_sensors(CPU).read() is None


def test_nvml_is_asked_for_the_gpu_by_uuid(monkeypatch):
    class NVMLError(Exception):
        pass

    def refuse(gpu):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda gpu, which: which * 1000,
        nvmlDeviceGetTemperature=lambda gpu, which: 60,
        nvmlDeviceGetPowerUsage=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}"))
    found = sensors.open_sensors(torch.device("cuda", 3))
    assert found._gpu == "GPU-abc-3"
    assert found.driver == "580.1"
    assert found.read() == sensors.Reading(1000, 2000, 60, None)


# Providers


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

    kernels = SimpleNamespace(kernel_alone=kernel_alone)
    monkeypatch.setattr(providers.importlib, "import_module", lambda name, package: kernels)
    parts = ours.prepare(replace(TINY, is_causal=True), q, q, q)
    assert list(parts) == ["whole", "kernel"]
    assert parts["kernel"]() == "ran"
    assert calls == [(q, q, q, ours.recipe, True)]

    def refuse(*arguments):
        raise UnsupportedError("not this one")

    kernels.kernel_alone = refuse
    assert list(ours.prepare(TINY, q, q, q)) == ["whole"]
    monkeypatch.setattr(providers.importlib, "import_module", lambda *a: (_ for _ in ()).throw(ImportError()))
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


@pytest.mark.parametrize("name", ["torch_cudnn", "cudnn_fp8", "fa3", "sageattention", "comfy_kitchen", "xformers"])
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
    quantised, scales = quantise(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        back = quantised[name].float() * scales[f"descale_{name}"]
        torch.testing.assert_close(back, t.float(), rtol=2**-4, atol=1e-3)
        assert quantised[name].float().abs().max() == 448
    assert scales["scale_s"] * scales["descale_s"] == 1
    assert build.__doc__


# A run


def measured(found, shapes=(TINY,), **options):
    return list(run.run(shapes, found, Settings(CPU, limits=QUICK, **options)))


def test_a_run_gives_rows_ratios_and_notes():
    q = torch.zeros(1, 2, 64, 32)
    works = {"whole": lambda: q, "kernel": lambda: None}
    cudnn = Fake("torch_cudnn", {"whole": lambda: q})
    infinite = Fake("infinite", {"whole": lambda: q / 0})
    late = Fake("late", {"whole": lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("…"))})
    refusing = Fake("refusing", Unsupported("not for me"))
    raising = Fake("raising", ValueError("what\nelse"))
    others = [cudnn, infinite, late, refusing, raising]
    (result,) = measured([Fake("works", works), *others])
    assert [(r.provider, r.part) for r in result.rows] == [
        ("works", "whole"), ("works", "kernel"), ("torch_cudnn", "whole")
    ]  # fmt: skip
    reference = result.rows[2].median_us
    for row in result.rows:
        assert row.ratio_to_cudnn == pytest.approx(reference / row.median_us, abs=1e-4)
        assert row.p20_us <= row.median_us <= row.p80_us
        assert row.rounds == 5
        assert row.host_us is None
        assert (row.shape, row.dtype, row.gpu) == ("1x2x64x32", "bf16", "CPU")
    assert {(n.provider, n.reason) for n in result.notes} == {
        ("infinite whole", "ArithmeticError: its output is not finite"),
        ("late whole", "out of memory"),
        ("refusing", "not for me"),
        ("raising", "ValueError: what"),
    }


def test_without_cudnn_there_is_no_ratio():
    (result,) = measured([Fake("works", {"whole": lambda: None})])
    assert result.rows[0].ratio_to_cudnn is None


def test_time_that_is_over_begins_no_shape():
    two = measured([Fake("works", {"whole": lambda: None})], (TINY, TINY), max_seconds=0.0)
    assert [len(r.rows) for r in two] == [0, 0]
    assert two[0].notes[0].reason == "not begun: 0 seconds were over"


def test_inputs_that_do_not_fit_are_a_note(monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(run.torch, "randn", full)
    (result,) = measured([Fake("works", {"whole": lambda: None})])
    assert result.rows == []
    assert [(n.provider, n.reason) for n in result.notes] == [("all", "out of memory")]


def test_each_row_has_its_own_clock_where_it_was_read(monkeypatch):
    class Steps(sensors.Sensors):
        value = 1000.0

        def read(self):
            self.value += 100
            return sensors.Reading(sm_mhz=self.value)

    monkeypatch.setattr(run, "open_sensors", lambda device: Steps())
    (result,) = measured([Fake("a", {"whole": lambda: None}), Fake("b", {"whole": lambda: None})])
    assert [r.sm_mhz for r in result.rows] == [1300, 1300]  # a in rounds 0, 2, 4: 1100, 1300, 1500; b in 1 and 3
    assert result.reading.sm_mhz == 1300


def test_inputs_are_the_same_every_time():
    shape = parse_shape("2x4/2x5,7x8")
    q, k, v = inputs(shape)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    assert torch.equal(q, inputs(shape)[0])
    assert not torch.equal(k, v)


# Rows


def rows():
    (result,) = measured([Fake("torch_cudnn", {"whole": lambda: None}), Fake("b", {"kernel": lambda: None})])
    return result.rows


def test_csv_grows_and_comes_back(tmp_path):
    path, some = tmp_path / "new" / "speed.csv", rows()
    some[1] = replace(some[1], host_us=1.5, is_causal=True)
    results.append_csv(path, some[:1])
    results.append_csv(path, some[1:])
    assert results.read_csv(path) == some
    assert path.read_text().count("median_us") == 1


def test_a_csv_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("time,colour\n1,red\n")
    for work in (lambda: results.append_csv(path, rows()), lambda: results.read_csv(path)):
        with pytest.raises(InvalidArgumentError, match="has colour"):
            work()
    assert path.read_text() == "time,colour\n1,red\n"
    path.write_text(",".join(reversed(results.COLUMNS)) + "\n")
    with pytest.raises(InvalidArgumentError, match="in another order"):
        results.check_csv(path)
    path.write_text("")
    results.append_csv(path, rows())
    assert len(results.read_csv(path)) == 2
    path.write_text(path.read_text().replace("False", "perhaps"))
    with pytest.raises(InvalidArgumentError, match="line 2: 'perhaps' is neither"):
        results.read_csv(path)


def test_tops():
    assert results.tops(parse_shape("1x24x4608x128"), 296) == pytest.approx(881.5, abs=0.1)


def test_the_commit_of_a_checkout(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    file = tmp_path / "a.py"
    file.write_text("1")
    assert results.commit_of(file) == ""
    git("init", "-q")
    assert results.commit_of(file) == ""  # in a checkout, but not a part of it
    git("add", "a.py")
    git("commit", "-qm", "a")
    commit = results.commit_of(file)
    assert 7 <= len(commit) <= 12
    file.write_text("2")
    assert results.commit_of(file) == commit + "+dirty"


def test_markdown():
    a, b = rows()
    some = [
        replace(a, median_us=434.4, tops=600.7, ratio_to_cudnn=1.0),
        replace(b, median_us=9.5, tops=1003.2, ratio_to_cudnn=2.5),
        replace(a, shape="other", median_us=51.26, tops=3.14159, ratio_to_cudnn=None),
    ]
    head, _, *table = markdown(some).splitlines()
    assert "CPU" in head
    assert table == [
        "| shape | torch_cudnn whole | b kernel |",
        "|---|---:|---:|",
        "| 1x2x64x32 | 434 (601, 1.00×) | 9.50 (1003, 2.50×) |",
        "| other | 51.3 (3.14) | - |",
    ]
    assert "Nothing" in markdown([])


def test_a_plot_is_drawn(tmp_path):
    bars(tmp_path / "a.png", rows())
    assert (tmp_path / "a.png").stat().st_size > 1000


# The command


def lowbit(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command("bench")(cli.command)
    return app(args=list(arguments), standalone_mode=False)


SMALL = ("--device", "cpu", "--shape", "1x2x64x32", "--seconds-per-shape", "0")


def test_the_command_on_a_cpu(capsys, tmp_path):
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "md", "png")}
    options = ["--csv", files["csv"], "--json", files["json"], "--markdown", files["md"], "--plot", files["png"]]
    names = ("-p", "torch_default", "-r", "sage2_8b", "-p", "fa3", "-p", "torch_cudnn", "-s", "1x4/2x32x32:causal")
    assert lowbit(*SMALL, *names, *map(str, options)) in (None, 0)
    out = capsys.readouterr().out
    for words in ("1x4/2x32x32:causal", "ours:sage2_8b", "torch_default", "p20–p80", "not measured: fa3", "appended 4"):
        assert words in " ".join(out.split())
    found = results.read_csv(files["csv"])
    assert {(r.shape, r.series) for r in found} == {
        (shape, series)
        for shape in ("1x2x64x32", "1x4/2x32x32:causal")
        for series in ("torch_default whole", "ours:sage2_8b whole")
    }
    document = json.loads(files["json"].read_text())
    assert len(document["rows"]) == 4
    assert {note["provider"] for note in document["notes"]} == {"fa3", "torch_cudnn"}
    assert "| 1x2x64x32 |" in files["md"].read_text()
    assert files["png"].stat().st_size > 1000
    lowbit(*SMALL, "-p", "torch_default", "--csv", str(files["csv"]))
    assert len(results.read_csv(files["csv"])) == 5


def test_the_command_with_nothing_to_time(capsys):
    assert lowbit(*SMALL, "-p", "cudnn_fp8") == 1
    assert "not measured: cudnn_fp8: not installed" in " ".join(capsys.readouterr().out.split())


def test_what_was_measured_is_kept_when_the_run_breaks(monkeypatch, tmp_path):
    def breaks(shapes, *others):
        yield run.Result(TINY, rows())
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(cli, "run", breaks)
    files = ("--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json"))
    with pytest.raises(RuntimeError, match="illegal"):
        lowbit(*SMALL, "-p", "torch_default", *files)
    assert len(results.read_csv(tmp_path / "a.csv")) == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PyTorch sees no CUDA device to time.*--device cpu --shape"),
        (["--device", "cpu"], "on the CPU give a tiny one"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--device", "meta"], "only cuda and cpu"),
        ([*SMALL, "--dtype", "fp64"], "'fp64' is not one of bf16, fp16"),
        ([*SMALL, "--set", "huge"], "unknown set 'huge'"),
        ([*SMALL, "-s", "1x2"], "'1x2' is not batch"),
        ([*SMALL, "-p", "fa9"], "unknown provider 'fa9'"),
        ([*SMALL, "-r", "sage9"], "unknown name"),
        ([*SMALL, "--plot", "a.xyz"], "a plot ends in"),
        ([*SMALL, "--markdown", "."], "is a folder"),
        ([*SMALL, "--csv", __file__], "other columns"),
    ],
)
def test_wrong_input_is_refused_before_the_work(monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgumentError, match=words):
        lowbit(*arguments)


def test_help_teaches(capsys):
    lowbit("--help")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in ("lowbit bench --set models --csv speed.csv", "ours:<recipe>", "take turns", "tiny shapes"):
        assert phrase in words
