"""The cache among users and processes: other users' files, stopped ones, leftovers (T4, T14, T15, T16, T17, T19)."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest

from lowbit_attention.backends.cuda.jit import bindings, compiler, fresh
from lowbit_attention.backends.cuda.jit import cache as cache_module
from lowbit_attention.backends.cuda.jit import store as store_module
from lowbit_attention.backends.cuda.jit.cache import KernelCache
from lowbit_attention.backends.cuda.jit.compiled import Compiled, Options
from lowbit_attention.backends.cuda.jit.compiler import cache_key
from lowbit_attention.backends.cuda.jit.export import ExportFolder
from lowbit_attention.backends.cuda.jit.folder import UnusableFolderError, own_folder
from lowbit_attention.backends.cuda.jit.source import Source
from lowbit_attention.backends.cuda.jit.store import OwnStore, write
from lowbit_attention.backends.cuda.jit.sweep import UNUSED_DAYS

KEY = "ab" * 32
KERNEL = Compiled(b"code", {}, ())
PLANTED = Compiled(b"planted", {}, ())
SOURCE, OPTIONS = Source("f.cu", "f"), Options.of("sm_89")
ALICE, BOB = 54321, 54322  # (no user has them, so they have no home either)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be other users")


def in_child(act, uid=None, seconds=60):
    """What ``act`` gives (as text) in a forked process, as another user if ``uid`` says so."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        text = "died"
        try:
            signal.alarm(seconds)
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                os.umask(0o022)
            text = str(act())
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def place():
    """A folder that every user can reach and nobody but root can write, as a machine's is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def home_of(place, uid):
    """A folder of this user."""
    home = place / str(uid)
    home.mkdir(mode=0o755)
    os.chown(home, uid, uid)
    return home


@pytest.fixture
def made(monkeypatch):
    """Compilations, which give their number."""
    calls = []

    def compile_source(source, options):
        calls.append(source.name)
        return Compiled(b"code %d" % len(calls), {}, ())

    monkeypatch.setattr(cache_module, "compile_source", compile_source)
    return calls


@needs_root
@needs_fork
def test_a_planted_entry_in_a_folder_of_another_user_is_not_read(place, caplog):
    """T14: a world-writable folder of Alice's, and an entry in it that Bob's process would find."""
    folder = place / "kernels"
    folder.mkdir()
    os.chown(folder, ALICE, ALICE)
    folder.chmod(0o777)
    in_child(lambda: write(folder, KEY, {}, PLANTED, 0o644), ALICE)
    assert (folder / f"{KEY}.bin").exists()
    for uid in (BOB, 0):  # (root is a user like any other)
        assert in_child(lambda: OwnStore(folder).find(KEY), uid) == "None"
        assert "belongs to another user (uid 54321" in in_child(lambda: _told(folder), uid)
    folder.chmod(0o755)
    assert in_child(lambda: OwnStore(folder).find(KEY), BOB) == "None"
    assert in_child(lambda: OwnStore(folder).find(KEY).cubin, ALICE) == "b'planted'"  # (it was a good entry)


def _told(folder):
    store = OwnStore(folder)
    assert store.usable() is None
    return store.problem


@needs_root
@needs_fork
@pytest.mark.parametrize("owner", [0, BOB])
def test_a_file_of_another_user_in_an_own_folder_does_not_count(place, owner):
    """T14: forged entries get there by a mistake of the folder's modes, or of root's; not even root's are read."""
    folder = home_of(place, ALICE) / "kernels"
    in_child(lambda: OwnStore(folder).keep(KEY, {}, KERNEL), ALICE)
    path = folder / f"{KEY}.bin"
    assert in_child(lambda: OwnStore(folder).find(KEY).cubin, ALICE) == "b'code'"
    os.chown(path, owner, owner)
    path.chmod(0o644)
    assert in_child(lambda: OwnStore(folder).find(KEY), ALICE) == "None"
    in_child(lambda: OwnStore(folder).keep(KEY, {}, KERNEL), ALICE)  # and it is made again
    assert in_child(lambda: OwnStore(folder).find(KEY).cubin, ALICE) == "b'code'"


@needs_root
@needs_fork
def test_a_folder_below_another_users_is_refused_and_not_made(place):
    """T14: sudo that keeps HOME; and a folder that Bob could replace."""
    home = home_of(place, ALICE)
    for uid in (0, BOB):
        assert "belongs to another user" in in_child(lambda: _told(home / "cache" / "kernels"), uid)
    assert list(home.iterdir()) == []


@needs_root
def test_what_a_rootless_container_does_not_know_may_own_what_is_above(place, monkeypatch):
    """The machine's own folders belong to nobody (65534) there."""
    folder = place / "kernels"
    os.chown(place, 65534, 65534)
    with pytest.raises(UnusableFolderError, match="belongs to another user"):
        own_folder(folder)
    from lowbit_attention.backends.cuda.jit import folder as folder_module

    monkeypatch.setattr(folder_module, "_is_outside", lambda uid: uid == 65534)
    assert own_folder(folder) == folder


@needs_root
@needs_fork
@pytest.mark.parametrize("kind", [0o020600, 0o060600])
def test_a_device_is_a_miss(place, kind):
    """T15: as /dev/zero is, and a disk."""
    OwnStore(place / "kernels").keep(KEY, {}, KERNEL)
    path = place / "kernels" / f"{KEY}.bin"
    path.unlink()
    try:
        os.mknod(path, kind, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no devices can be made here")
    assert OwnStore(place / "kernels").find(KEY) is None


@needs_root
@needs_fork
def test_kernels_of_root_are_read_by_others_who_name_their_folder(place, made, monkeypatch):
    """T16: warmed up as root at an image's build, run as another user; nothing is compiled, written or said."""
    exported = ExportFolder(place / "opt" / "kernels")
    exported.add(SOURCE, OPTIONS)
    assert exported.remarks() == []
    before = sorted(place.rglob("*"))

    def run():
        os.environ.update(LOWBIT_CACHE_READONLY=str(exported.folder), HOME="/nonexistent")
        os.environ.pop("LOWBIT_CACHE_DIR", None)
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("lowbit_attention").addHandler(handler)
        found = KernelCache().get(SOURCE, OPTIONS).cubin
        return found, len(made), lines

    assert in_child(run, BOB) == "(b'code 1', 1, [])"
    assert sorted(place.rglob("*")) == before


@needs_root
@needs_fork
def test_a_user_without_home_or_name_gets_one_line(place, made):
    """T17."""

    def run():
        for name in ("HOME", "XDG_CACHE_HOME", "LOWBIT_CACHE_DIR"):
            os.environ.pop(name, None)
        os.chdir(place)
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("lowbit_attention").addHandler(handler)
        cache = KernelCache()
        cubins = [cache.get(Source(name, name), OPTIONS).cubin for name in ("a", "b")]
        return cubins, cache.folder, lines

    text = in_child(run, BOB)
    assert text.startswith("([b'code 1', b'code 2'], None, [")
    assert text.count("kernels are kept in memory only: ") == 1
    assert "no such home folder: set LOWBIT_CACHE_DIR" in text


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_stopped_process_that_holds_locks_costs_one_wait_and_one_line(tmp_path, made, caplog):
    """T15."""
    sources = [Source(name, name) for name in "abc"]
    own_folder(tmp_path / "kernels")
    holders = []
    try:
        for source in sources:
            lock = tmp_path / "kernels" / f"{cache_key(source, OPTIONS)}.lock"
            holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
            holders.append(holder)
        for holder in holders:
            assert holder.stdout.readline() == "held\n"
            holder.send_signal(signal.SIGSTOP)
        cache = KernelCache(tmp_path / "kernels", lock_seconds=0.5)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="lowbit_attention"):
            found = [cache.get(source, OPTIONS).cubin for source in sources]
        assert time.monotonic() - began < 1.5
        assert found == [b"code 1", b"code 2", b"code 3"]
        (line,) = [record.getMessage() for record in caplog.records]
        assert "another process has been compiling a for more than 0.5 s, or was stopped" in line
        assert KernelCache(tmp_path / "kernels").get(sources[0], OPTIONS).cubin == b"code 1"  # kept nevertheless
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_the_wait_for_a_lock_is_bounded_by_default():
    assert 10 <= store_module.LOCK_SECONDS <= 120


@needs_fork
def test_a_child_forked_while_a_thread_compiles_compiles_itself(tmp_path, monkeypatch):
    """T4: the thread's locks are the parent's; nobody would release them in the child."""
    compiling, go_on = threading.Event(), threading.Event()

    def compile_source(source, options):
        if source.name == "slow":
            compiling.set()
            go_on.wait(30)
        return Compiled(source.name.encode(), {}, ())

    monkeypatch.setattr(cache_module, "compile_source", compile_source)
    cache = KernelCache(tmp_path / "kernels", lock_seconds=0.2)
    slow = Source("slow", "slow")
    thread = threading.Thread(target=cache.get, args=(slow, OPTIONS))
    thread.start()
    assert compiling.wait(30)
    with cache._guard, cache.own._guard:  # as another thread may have them
        assert in_child(lambda: cache.get(SOURCE, OPTIONS).cubin, seconds=20) == "b'f.cu'"
    go_on_in_child = threading.Event()
    go_on_in_child.set()

    def same_kernel():
        nonlocal go_on
        go_on = go_on_in_child
        return cache.get(slow, OPTIONS).cubin

    assert in_child(same_kernel, seconds=20) == "b'slow'"
    go_on.set()
    thread.join(30)
    assert not thread.is_alive()


@needs_fork
def test_a_fork_waits_for_a_thread_that_imports(monkeypatch):
    """T4: else the child has the half of a module for ever."""
    inside, events = threading.Event(), []

    def load():
        with bindings.no_fork_meanwhile():
            inside.set()
            time.sleep(0.3)
            events.append("imported")

    thread = threading.Thread(target=load)
    thread.start()
    assert inside.wait(30)

    def child():
        with bindings.no_fork_meanwhile():
            return events

    assert in_child(child, seconds=20) == "['imported']"
    thread.join(30)
    monkeypatch.setattr(bindings, "_FORK_SECONDS", 0.1)
    inside.clear()
    threading.Thread(target=load).start()
    assert inside.wait(30)
    assert in_child(child, seconds=20) == "['imported']"  # (not for ever: it went on without the second)


@needs_fork
@pytest.mark.parametrize("text", ['extern "C" __global__ void f() {}\n', "this is no CUDA"])
def test_a_child_forked_while_nvrtc_compiles_has_it_done_elsewhere(monkeypatch, tmp_path, text):
    """T4: NVRTC's own locks are held in the child for ever."""
    root = Path(cache_module.__file__).resolve().parents[3]
    light = (  # (the package's root would import torch, which takes seconds and is not needed)
        "import sys, types; root = types.ModuleType('lowbit_attention'); sys.modules['lowbit_attention'] = root\n"
        f"root.__path__ = [{str(root)!r}]\n"
    )
    run = fresh.run_fresh
    monkeypatch.setattr(fresh, "run_fresh", lambda program, *more: run(light + program, *more))
    monkeypatch.setattr(compiler, "_core", lambda: pytest.fail("it compiled itself"))
    compiler._running.add(1)  # as another thread has it meanwhile
    try:
        source = Source("f.cu", text)
        found = in_child(lambda: KernelCache(tmp_path / "kernels").get(source, OPTIONS), seconds=100)
    finally:
        compiler._running.discard(1)
    assert ("Resources(registers=" if "extern" in text else "CompileError: f.cu does not compile for sm_89") in found
    assert not compiler._forked_meanwhile


@needs_root
@needs_fork
def test_what_another_user_keeps_in_a_common_parent_is_left_alone(place):
    """T19: LOWBIT_CACHE_DIR=/tmp, say; root could remove anything there."""
    place.chmod(0o1777)
    theirs = place / "kernels-1"
    mine = place / "kernels-0" / f"{KEY}.bin"
    then = time.time() - (UNUSED_DAYS + 9) * 86400
    for folder, owner in ((theirs, ALICE), (mine.parent, 0)):
        folder.mkdir(mode=0o755)
        (folder / f"{KEY}.bin").touch()
        os.utime(folder / f"{KEY}.bin", (then, then))
        os.chown(folder, owner, owner)
    OwnStore(place / "kernels-2").keep(KEY, {}, KERNEL)
    assert (theirs / f"{KEY}.bin").exists()
    assert not mine.exists()


def test_a_cache_that_is_removed_meanwhile_is_made_again(tmp_path, made, caplog):
    """And for this user alone, whatever the umask is."""
    cache = KernelCache(tmp_path / "kernels")
    assert cache.get(Source("a", "a"), OPTIONS)
    shutil.rmtree(tmp_path / "kernels")
    old = os.umask(0)
    try:
        assert cache.get(SOURCE, OPTIONS).cubin == b"code 2"
    finally:
        os.umask(old)
    assert KernelCache(tmp_path / "kernels").get(SOURCE, OPTIONS).cubin == b"code 2"
    assert caplog.text == ""
    assert os.name != "posix" or (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_costs_the_entry_only(tmp_path, made, caplog, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = KernelCache(tmp_path / "kernels")
    assert cache.get(SOURCE, OPTIONS).cubin == b"code 1"
    assert cache.get(Source("b", "b"), OPTIONS).cubin == b"code 2"
    assert caplog.text.count("No space left on device") == 1
    assert [p.name for p in (tmp_path / "kernels").iterdir() if p.suffix in (".tmp", ".bin")] == []
    assert "No space left on device" in cache.own.try_to_write()
