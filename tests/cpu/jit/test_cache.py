"""Machine code on disk: whole or not there, made once, and never in the way."""

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit_attention.backends.cuda.jit import cache as cache_module
from lowbit_attention.backends.cuda.jit.cache import CaptureError, KernelCache
from lowbit_attention.backends.cuda.jit.compiled import Compiled, Options, Resources
from lowbit_attention.backends.cuda.jit.source import Source
from lowbit_attention.env import CACHE_DIR_VARIABLE

SOURCE = Source("f.cu", 'extern "C" __global__ void f(int* x) { *x = 1; }\n')
OPTIONS = Options.of("sm_89")


@pytest.fixture
def made(monkeypatch):
    """Counts compilations; each gives other machine code than the last."""
    calls = []

    def compile_source(source, options):
        calls.append((source.name, options.arch))
        return Compiled(b"code %d\n\x00" % len(calls), {"f": Resources(7, 0, 0, 0, 16)}, ("a remark",))

    monkeypatch.setattr(cache_module, "compile_source", compile_source)
    return calls


def entry(folder):
    (path,) = folder.rglob("*.bin")
    return path


def test_a_second_process_reads_what_the_first_made(tmp_path, made, caplog):
    with caplog.at_level(logging.INFO, logger="lowbit_attention"):
        first = KernelCache(tmp_path).get(SOURCE, OPTIONS)
        second = KernelCache(tmp_path).get(SOURCE, OPTIONS)
    assert first == second
    assert made == [("f.cu", "sm_89")]
    assert len(caplog.records) == 1  # one line for the one compilation
    assert not list(tmp_path.rglob("*.tmp"))


def test_in_one_process_it_is_the_same_object(tmp_path, made):
    cache = KernelCache(tmp_path)
    assert cache.get(SOURCE, OPTIONS) is cache.get(SOURCE, OPTIONS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: content.replace(b"code", b"c0de"),
        lambda content: b"another file altogether",
        lambda content: content.replace(b'"registers"', b'"riegsters"'),
    ],
    ids=["empty", "cut", "cut in the header", "bit rot", "foreign", "other fields"],
)
def test_a_damaged_entry_is_made_again(tmp_path, made, damage):
    KernelCache(tmp_path).get(SOURCE, OPTIONS)
    path = entry(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again = KernelCache(tmp_path).get(SOURCE, OPTIONS)
    assert len(made) == 2
    assert again.cubin.startswith(b"code 2")
    assert KernelCache(tmp_path).get(SOURCE, OPTIONS) == again  # and it was mended
    assert len(made) == 2


def test_a_write_that_dies_leaves_nothing_that_counts(tmp_path, made, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            KernelCache(tmp_path).get(SOURCE, OPTIONS)
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("*.tmp"))
    KernelCache(tmp_path).get(SOURCE, OPTIONS)
    assert len(made) == 2


def test_a_folder_that_cannot_be_made_costs_the_disk_only(tmp_path, made, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = KernelCache(tmp_path / "file" / "kernels")
    assert cache.get(SOURCE, OPTIONS) is cache.get(SOURCE, OPTIONS)
    assert len(made) == 1
    assert "in memory only" in caplog.text


def test_threads_that_want_the_same_make_it_once(tmp_path, monkeypatch):
    everyone, calls = threading.Barrier(8), []

    def slow(source, options):
        calls.append(threading.get_ident())
        threading.Event().wait(0.1)
        return Compiled(b"code", {}, ())

    monkeypatch.setattr(cache_module, "compile_source", slow)
    cache = KernelCache(tmp_path)

    def get(_):
        everyone.wait()
        return cache.get(SOURCE, OPTIONS)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(get, range(8)))
    assert len(calls) == 1
    assert all(r is results[0] for r in results)


def test_processes_that_want_the_same_make_it_once(tmp_path):
    program = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from lowbit_attention.backends.cuda.jit.cache import KernelCache\n"
        "from lowbit_attention.backends.cuda.jit.compiled import Options\n"
        "from lowbit_attention.backends.cuda.jit.source import Source\n"
        f"KernelCache().get(Source({SOURCE.name!r}, {SOURCE.text!r}), Options.of('sm_89'))\n"
    )
    environment = {**os.environ, CACHE_DIR_VARIABLE: str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    output = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("compiled f.cu" in text for text in output) == 1
    assert entry(tmp_path)


def test_threads_of_a_fresh_process_may_all_be_the_first(tmp_path):
    program = (
        "from lowbit_attention.backends.cuda.jit.cache import KernelCache\n"
        "from lowbit_attention.backends.cuda.jit.compiled import Options\n"
        "from lowbit_attention.backends.cuda.jit.source import Source\n"
        f"source = Source({SOURCE.name!r}, {SOURCE.text!r})\n"
        "KernelCache().get_all([(source, Options.of('sm_89', {'N': n})) for n in range(8)], workers=8)\n"
    )
    environment = {**os.environ, CACHE_DIR_VARIABLE: str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.rglob("*.bin"))) == 8


def test_several_are_made_in_order(tmp_path):
    jobs = [(SOURCE, Options.of(arch)) for arch in ("sm_80", "sm_89", "sm_90a")]
    compiled = KernelCache(tmp_path).get_all(jobs)
    assert [KernelCache(tmp_path).get(*job) for job in jobs] == compiled
    assert len({c.cubin for c in compiled}) == 3


def test_nothing_is_compiled_while_a_graph_is_captured(tmp_path, made, monkeypatch):
    cache = KernelCache(tmp_path)
    warm = Options.of("sm_90a")
    cache.get(SOURCE, warm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cache.get(SOURCE, warm)
    with pytest.raises(CaptureError, match=r"f\.cu for sm_89 .* run the call once before the capture"):
        cache.get(SOURCE, OPTIONS)
    assert len(made) == 1


def test_several_compilations_are_one_line(tmp_path, made, caplog):
    sources = [Source(f"{name}.cu", name) for name in "abc"]
    cache = KernelCache(tmp_path)
    with caplog.at_level(logging.INFO, logger="lowbit_attention"):
        cache.get_all([(source, OPTIONS) for source in sources])
        cache.get_all([(source, OPTIONS) for source in sources])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiled a.cu, b.cu, c.cu in ")


def test_where_no_thread_can_be_started_they_are_made_one_by_one(tmp_path, made, monkeypatch):
    """At the interpreter's exit, say."""

    class NoPool:
        def __init__(self, **_):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(cache_module, "ThreadPoolExecutor", NoPool)
    sources = [Source(f"{name}.cu", name) for name in "abc"]
    assert len({c.cubin for c in KernelCache(tmp_path).get_all([(s, OPTIONS) for s in sources])}) == 3
    assert len(made) == 3
