"""A compiler or driver that is missing, broken or hidden (T18, T32): one kind of error, which says what to do."""

import copy
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lowbit_attention import InvalidArgumentError, LowbitError, MissingExtraError
from lowbit_attention.backends.cuda import launch
from lowbit_attention.backends.cuda.jit import bindings, compiler, probe
from lowbit_attention.backends.cuda.jit.bindings import (
    CompilerBrokenError,
    CompilerMissingError,
    compiler_reasons,
    import_bindings,
)
from lowbit_attention.backends.cuda.jit.cache import CaptureError, KernelCache
from lowbit_attention.backends.cuda.jit.compiled import Compiled, CompileError, Options
from lowbit_attention.backends.cuda.jit.compiler import compile_source, nvrtc_version
from lowbit_attention.backends.cuda.jit.source import Source, SourceError, read_source
from lowbit_attention.backends.cuda.launch import Kernel, LaunchError, LoadError
from lowbit_attention.errors import KernelUnavailableError

SOURCE, OPTIONS = Source("f.cu", 'extern "C" __global__ void f() {}\n'), Options.of("sm_89")
PACKAGE = Path(bindings.__file__).resolve().parents[4]


def raises_when_asked(error):
    """A module ``cuda.bindings.nvrtc`` whose library does not load."""

    def version():
        raise error

    return types.SimpleNamespace(nvrtcVersion=version)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to dlopen libnvrtc.so.13: file too short"),
        RuntimeError('Failure finding "libnvrtc.so.13"\n  listdir(...):\n    a\n    b'),
        OSError("invalid ELF header"),
        AttributeError("nvrtcVersion"),
    ],
)
def test_a_library_that_does_not_load_is_a_broken_compiler(monkeypatch, tmp_path, error):
    monkeypatch.setattr(compiler, "import_bindings", lambda name: raises_when_asked(error))
    with pytest.raises(CompilerBrokenError) as raised:
        nvrtc_version.__wrapped__()
    monkeypatch.setattr(compiler, "nvrtc_version", nvrtc_version.__wrapped__)
    with pytest.raises(KernelUnavailableError, match="NVRTC's library cannot be loaded"):
        KernelCache(tmp_path).get(SOURCE, OPTIONS)
    (line,) = str(raised.value).splitlines()
    assert "--force-reinstall" in line
    assert "lowbit doctor" in line


def test_a_version_that_is_not_told_is_a_broken_compiler(monkeypatch):
    nvrtc = types.SimpleNamespace(nvrtcVersion=lambda: (7, 0, 0))
    monkeypatch.setattr(compiler, "import_bindings", lambda name: nvrtc)
    with pytest.raises(CompilerBrokenError, match="does not say its version"):
        nvrtc_version.__wrapped__()


def test_a_missing_package_is_named_with_the_extra():
    with pytest.raises(CompilerMissingError, match=r"'cuda\.nothing'.*lowbit-attention\[cuda13\]") as raised:
        import_bindings("cuda.nothing")
    assert isinstance(raised.value, MissingExtraError)
    assert raised.value.extra == "cuda13"


@pytest.mark.parametrize("kind", ["file", "package", "script that exits"])
@pytest.mark.parametrize(
    "ask", ["import_bindings('cuda.core')", "compile_source(Source('f', ''), Options.of('sm_89'))"]
)
def test_a_stranger_named_cuda_is_told_and_not_run(tmp_path, kind, ask):
    if kind == "package":
        (tmp_path / "cuda").mkdir()
    path = tmp_path / "cuda" / "__init__.py" if kind == "package" else tmp_path / "cuda.py"
    path.write_text("raise SystemExit(7)\n" if "exits" in kind else "print('the stranger ran')\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(CompilerBrokenError) as raised:
            eval(ask, {**globals(), "import_bindings": import_bindings})
        (reason,) = compiler_reasons()
        assert "cuda" not in sys.modules
    for text in (str(raised.value), reason):
        assert f"{path} hides NVIDIA's package `cuda`" in text
        assert "rename it" in text


def test_a_folder_named_cuda_hides_nothing(tmp_path, monkeypatch):
    """NVIDIA's package and any folder without ``__init__.py`` are one."""
    (tmp_path / "cuda").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compiler_reasons() == ()
    assert bindings._shadow() is None


@pytest.mark.parametrize(
    "error", [ImportError("libstdc++.so.6: version not found"), OSError("damaged"), TypeError("x")]
)
def test_a_package_that_cannot_be_imported_is_broken(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(bindings.importlib, "import_module", fail)
    with pytest.raises(CompilerBrokenError, match=r"cuda\.core cannot be imported .*force-reinstall"):
        import_bindings("cuda.core")


@pytest.mark.parametrize("error", [RuntimeError("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE"), OSError("x"), KeyError("y")])
def test_what_the_compiler_raises_is_a_compile_error(monkeypatch, error):
    core = compiler._core()

    class Program:
        def __init__(self, *_):
            raise error

    monkeypatch.setattr(
        compiler, "_core", lambda: types.SimpleNamespace(Program=Program, ProgramOptions=core.ProgramOptions)
    )
    with pytest.raises(CompileError, match=r"f\.cu does not compile for sm_89 .*`lowbit doctor`"):
        compile_source(SOURCE, OPTIONS)


def test_a_source_that_is_missing_or_no_text_is_of_the_family(tmp_path):
    (tmp_path / "a.cu").write_bytes(b"\xff\xfe")
    for name in ("a.cu", "b.cu"):
        with pytest.raises(KernelUnavailableError, match=name) as raised:
            read_source(tmp_path, name)
        assert isinstance(raised.value, InvalidArgumentError)


SAMPLES = [
    KernelUnavailableError("why", "do this", "log\nlog"),
    CompileError("why"),
    CompilerMissingError("why"),
    CompilerBrokenError("why", "do this"),
    SourceError("why"),
    LoadError("why", "do this"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_they_are_one_family_and_travel(error):
    assert isinstance(error, KernelUnavailableError)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert (again.reason, again.way_out, again.details) == (error.reason, error.way_out, error.details)


def test_what_is_the_users_to_see_is_not_of_the_family():
    for kind in (CaptureError, LaunchError):
        assert issubclass(kind, LowbitError)
        assert not issubclass(kind, KernelUnavailableError)


STEPS = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuKernelSetAttribute")


class Driver:
    """A driver that refuses one step of loading: answers with an error, or raises."""

    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
    CUfunction = staticmethod(int)
    cuLaunchKernelEx = None

    def __init__(self, step=None, error=None):
        self._step, self._error = step, error

    def cuGetErrorString(self, code):
        return 0, b"no kernel image is available for execution on the device"

    def __getattr__(self, name):
        if name not in STEPS:
            raise AttributeError(name)

        def answer(*_):
            if name != self._step:
                return 0, 1
            if self._error is not None:
                raise self._error
            return 209, None

        return answer


@pytest.fixture
def card(monkeypatch):
    """One GPU, as far as loading asks torch."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return lambda driver: monkeypatch.setattr(launch, "import_bindings", lambda name: driver)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [None, RuntimeError("Failed to dlopen libcuda.so.1"), OSError("x")])
def test_whatever_fails_when_a_kernel_is_loaded_is_a_load_error(card, step, error):
    card(Driver(step, error))
    with pytest.raises(LoadError, match=r"f cannot be loaded .*`lowbit doctor`") as raised:
        Kernel(Compiled(b"", {}, ()), "f", 128, shared_bytes=1024)
    assert error is not None or "no kernel image is available" in str(raised.value)


def test_what_loads_loads(card):
    card(Driver())
    Kernel(Compiled(b"", {}, ()), "f", 128, shared_bytes=1024)


def test_memory_that_is_out_is_told_as_such(card, monkeypatch):
    def out():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    card(Driver())
    monkeypatch.setattr(torch.cuda, "current_stream", out)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Kernel(Compiled(b"", {}, ()), "f", 128)


def a_world_with(tmp_path, kind):
    """An interpreter whose packages are ours, except that NVRTC's library is missing, empty, or what ``kind`` says."""
    nvrtc = [Path(f.locate()) for f in __import__("importlib.metadata").metadata.files("nvidia-cuda-nvrtc")]
    library = next(p for p in nvrtc if p.name.startswith("libnvrtc.so"))
    packages = next(p for p in library.parents if p.name == "site-packages")
    world = tmp_path / "world"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(world)], check=True)
    mine = next(world.glob("lib/python*/site-packages"))

    def mirror(theirs, ours):
        ours.mkdir(exist_ok=True)
        for item in theirs.iterdir():
            if item in library.parents:
                mirror(item, ours / item.name)
            elif item != library and item.suffix != ".pth":
                (ours / item.name).symlink_to(item)

    mirror(packages, mine)
    broken = mine / library.relative_to(packages)
    if kind == "empty":
        broken.touch()
    elif kind == "no library":
        broken.write_bytes(b"not a library\n" * 1000)
    elif kind == "cut":  # (its end is missing: loading it ends the process)
        with library.open("rb") as file:
            broken.write_bytes(file.read(library.stat().st_size // 100))
    return world / "bin" / "python"


@pytest.mark.skipif(sys.platform != "linux", reason="made of links")
@pytest.mark.parametrize("kind", ["missing", "empty", "no library"])
def test_four_lines_are_compiled_with_a_real_library_that_is(tmp_path, kind):
    python = a_world_with(tmp_path, kind)
    program = (  # (the package's root would import torch, which takes seconds and is not needed)
        "import sys, types; root = types.ModuleType('lowbit_attention'); sys.modules['lowbit_attention'] = root\n"
        f"root.__path__ = [{str(PACKAGE / 'lowbit_attention')!r}]\n"
        "from lowbit_attention.backends.cuda.jit.probe import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    run = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("\x02broken\x03NVRTC's library cannot be loaded (")
    assert "--force-reinstall" in run.stdout
    assert "\n" not in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="made of links")
def test_doctor_survives_a_library_that_ends_its_process(tmp_path):
    python = a_world_with(tmp_path, "cut")
    program = "from lowbit_attention.cli import main; main(['doctor'])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "LOWBIT_CACHE_DIR": str(tmp_path), "COLUMNS": "250"}
    run = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "nvidia-cuda-nvrtc" in run.stdout  # (its metadata are there)
    assert "problem: the run-time compiler ends the process (signal" in run.stdout
    assert 'pip install --force-reinstall "lowbit-attention[cuda13]"' in run.stdout
    assert "no problems found" not in run.stdout


def test_the_compiler_here_works():
    trial = probe.try_compiler()
    assert trial.works, trial.text
    assert "compiled four lines with NVRTC" in trial.text


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('the last words')", "exit code 1; the last words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11, SIGSEGV; it printed nothing"),
        ("print('no answer')", "exit code 0"),
        ("import time; time.sleep(60)", "hangs"),
    ],
)
def test_a_process_that_gives_no_answer_is_told(monkeypatch, program, words):
    real = probe.run_fresh
    monkeypatch.setattr(probe, "_SECONDS", 2.0)
    monkeypatch.setattr(probe, "run_fresh", lambda asked, seconds: real(program, seconds))
    trial = probe.try_compiler()
    assert not trial.works
    assert not trial.missing
    assert words in trial.text


def test_an_interpreter_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "could not be tried" in probe.try_compiler().text
