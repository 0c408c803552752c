"""NVRTC without a GPU: machine code for every architecture, its resources, and diagnostics that help."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_attention import InvalidArgumentError, MissingExtraError
from lowbit_attention.backends.cuda.jit import compiler
from lowbit_attention.backends.cuda.jit.compiled import CompileError, Options, Resources
from lowbit_attention.backends.cuda.jit.compiler import cache_key, compile_source, read_report
from lowbit_attention.backends.cuda.jit.source import Source, read_source

ADD = Source("add.cu", 'extern "C" __global__ void add(float* x) { x[threadIdx.x] += AMOUNT; }\n')
GPU_TESTS = Path(__file__).resolve().parents[2] / "gpu"


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100a", "sm_120a"])
def test_every_architecture_compiles(arch):
    compiled = compile_source(ADD, Options.of(arch, {"AMOUNT": "1.0f"}))
    assert compiled.cubin.startswith(b"\x7fELF")
    assert set(compiled.resources) == {"add"}
    assert compiled.resources["add"].registers > 0
    assert compiled.resources["add"].spill_stores == 0


def test_the_accumulator_probe_compiles_for_hopper_without_spills():
    compiled = compile_source(read_source(GPU_TESTS, "accumulator_probe.cu"), Options.of("sm_90a"))
    assert set(compiled.resources) == {"wgmma_f16", "wgmma_f32", "mma_f16", "mma_f32"}
    assert all(r.spill_stores == r.spill_loads == 0 for r in compiled.resources.values())
    assert compiled.resources["wgmma_f32"].shared == 8 * 32  # B, 8 columns × 32 keys
    assert compiled.remarks == ()


def test_headers_are_compiled_from_the_root(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "two.cuh").write_text("constexpr int kTwo = 2;\n")
    (tmp_path / "a.cu").write_text('#include "inner/two.cuh"\nextern "C" __global__ void f(int* x) { *x = kTwo; }\n')
    assert "f" in compile_source(read_source(tmp_path, "a.cu"), Options.of("sm_89")).resources


def test_an_error_shows_the_line():
    with pytest.raises(CompileError, match=r"add\.cu does not compile for sm_89(.|\n)*add\.cu\(1\)(.|\n)*AMOUNT"):
        compile_source(ADD, Options.of("sm_89"))


def test_warnings_are_kept():
    source = Source("w.cu", 'extern "C" __global__ void f() { int unused; }\n')
    compiled = compile_source(source, Options.of("sm_89"))
    assert any("unused" in remark for remark in compiled.remarks)


@pytest.mark.parametrize("arch", ["89", "sm89", "compute_90", "sm_90x", ""])
def test_a_wrong_architecture_is_refused(arch):
    with pytest.raises(InvalidArgumentError, match="arch="):
        Options.of(arch)


def test_spills_are_read_from_the_report():
    report = """ptxas info    : Compiling entry function 'f' for 'sm_89'
ptxas info    : Function properties for f
    16 bytes stack frame, 28 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 400 bytes cmem[0]
ptxas warning : Potential Performance Loss: wgmma.mma_async instructions are serialized (C7514)
"""
    resources, remarks = read_report(report)
    assert resources == {"f": Resources(registers=255, stack=16, spill_stores=28, spill_loads=72, shared=1024)}
    assert len(remarks) == 1
    assert "C7514" in remarks[0]


def test_the_key_changes_with_everything_that_changes_the_code(monkeypatch):
    headers = (("h.cuh", "int h;"),)
    base = Source("a.cu", "int a;", headers)
    keys = {
        cache_key(base, Options.of("sm_89")),
        cache_key(base, Options.of("sm_90a")),
        cache_key(base, Options.of("sm_89", {"N": 1})),
        cache_key(base, Options.of("sm_89", {"N": 2})),
        cache_key(Source("a.cu", "int b;", headers), Options.of("sm_89")),
        cache_key(Source("b.cu", "int a;", headers), Options.of("sm_89")),
        cache_key(Source("a.cu", "int a;", (("h.cuh", "int i;"),)), Options.of("sm_89")),
        cache_key(Source("a.cu", "int a;"), Options.of("sm_89")),
    }
    assert len(keys) == 8
    assert cache_key(base, Options.of("sm_89", {"A": 1, "B": 2})) == cache_key(
        base, Options.of("sm_89", {"B": 2, "A": 1})
    )
    monkeypatch.setattr(compiler, "compiler_identity", lambda: ("nvidia-cuda-nvrtc 99.0",))
    assert cache_key(base, Options.of("sm_89")) not in keys


def test_a_key_does_not_load_the_compiler():
    program = (
        "import sys\nfrom lowbit_attention.backends.cuda.jit.compiler import Options, cache_key\n"
        "from lowbit_attention.backends.cuda.jit.source import Source\n"
        "cache_key(Source('a.cu', ''), Options.of('sm_89'))\n"
        "sys.exit('cuda.core' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_without_a_package_the_compiler_is_asked(monkeypatch):
    monkeypatch.setattr(compiler, "installed_nvrtc", dict)
    assert compiler.compiler_identity.__wrapped__() == (f"nvrtc {'.'.join(map(str, compiler.nvrtc_version()))}",)


def test_an_old_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 4))
    with pytest.raises(CompileError, match=r"NVRTC 12\.4 is older than 12\.8"):
        compile_source(ADD, Options.of("sm_89", {"AMOUNT": 1}))


@pytest.mark.parametrize(("version", "option"), [((12, 8), None), ((12, 9), True), ((13, 0), True)])
def test_an_option_that_older_compilers_refuse_is_left_out(monkeypatch, version, option):
    """NVRTC 12.8, which the oldest wheels of torch bring: 'unrecognized option --no-cache'."""
    given = []
    core = compiler._core()

    class Core:
        Program = core.Program

        @staticmethod
        def ProgramOptions(**options):
            given.append(options["no_cache"])
            return core.ProgramOptions(**options | {"no_cache": None})

    monkeypatch.setattr(compiler, "_core", lambda: Core)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: version)
    compile_source(ADD, Options.of("sm_89", {"AMOUNT": "1.0f"}))
    assert given == [option]


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingExtraError, match=r"lowbit-attention\[cuda13\]"):
        compile_source(ADD, Options.of("sm_89", {"AMOUNT": 1}))
