"""What nobody needs any more leaves the cache, and nothing else does (T19)."""

import os
import time

from lowbit_attention.backends.cuda.jit import sweep as sweep_module
from lowbit_attention.backends.cuda.jit.compiled import Compiled
from lowbit_attention.backends.cuda.jit.folder import own_folder
from lowbit_attention.backends.cuda.jit.store import OwnStore
from lowbit_attention.backends.cuda.jit.sweep import LEFTOVER_DAYS, UNUSED_DAYS, sweep

KEY = "ab" * 32
KERNEL = Compiled(b"code", {}, ())


def aged(path, days):
    """The file, made so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    then = time.time() - days * 86400
    os.utime(path, (then, then))
    return path


def test_leftovers_and_what_nobody_uses_are_swept(tmp_path):
    """T19: of writes that were killed, of older forms, of compilers that are gone; and nothing else."""
    folder = tmp_path / "kernels-2"
    own_folder(folder)
    own_folder(tmp_path / "kernels-1" / "ab")
    own_folder(tmp_path / "elsewhere")
    old = UNUSED_DAYS + 1
    goes = [
        aged(folder / "abcd1234-x_1y.tmp", LEFTOVER_DAYS + 0.1),
        aged(folder / f"{'1' * 64}.bin", old),
        aged(folder / f"{'1' * 64}.lock", old),
        aged(tmp_path / "kernels-1" / "ab" / f"{KEY}.bin", old),
        aged(tmp_path / "kernels-1" / "ab" / f"{KEY}.lock", old),
        aged(tmp_path / "kernels-1" / "ab" / "tmpk3j2.tmp", old),
    ]
    stays = [
        aged(folder / "abcd1234-new.tmp", LEFTOVER_DAYS - 0.1),
        aged(folder / f"{'2' * 64}.bin", UNUSED_DAYS - 1),
        aged(folder / "notes.txt", old),
        aged(folder / "ABC.bin", old),
        aged(tmp_path / "elsewhere" / f"{KEY}.bin", old),
        aged(tmp_path / f"{KEY}.bin", old),
        aged(tmp_path / "other.tmp", old),
    ]
    (tmp_path / "kernels-3").symlink_to(tmp_path / "elsewhere")
    (folder / "cd").symlink_to(tmp_path / "elsewhere")
    OwnStore(folder).keep(KEY, {}, KERNEL)  # what compiles sweeps
    assert [p for p in goes if p.exists()] == []
    assert [p for p in stays if not p.exists()] == []
    assert not (tmp_path / "kernels-1").exists()


def test_a_use_is_noted_so_that_what_is_used_stays(tmp_path):
    store = OwnStore(tmp_path / "kernels-2")
    store.keep(KEY, {}, KERNEL)
    path = tmp_path / "kernels-2" / f"{KEY}.bin"
    aged_time = time.time() - (UNUSED_DAYS + 1) * 86400
    os.utime(path, (aged_time, aged_time))
    os.unlink(tmp_path / "kernels-2" / "swept")
    assert store.find(KEY) == KERNEL
    sweep(tmp_path / "kernels-2")
    assert store.find(KEY) == KERNEL


def test_sweeping_is_once_a_process_and_once_a_day(tmp_path, monkeypatch):
    scans = []
    scan = sweep_module._scan
    monkeypatch.setattr(sweep_module, "_scan", lambda folder: scans.append(folder) or scan(folder))
    for _ in range(3):
        store = OwnStore(tmp_path / "kernels-2")
        store.keep(KEY, {}, KERNEL)
        store.keep(KEY, {}, KERNEL)
        assert store.find(KEY) == KERNEL  # (a hit does not sweep)
    assert len(scans) == 2  # the parent and the one generation, once
