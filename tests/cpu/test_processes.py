"""Files, errors and Ctrl-C between threads and processes. Cases of shared lists: T21, T25, T26."""

import importlib.util
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from lowbit_attention import RECIPES, cli, recipe
from lowbit_attention.adaptive import CallKey, Policy
from lowbit_attention.errors import InvalidRecipeError, LowbitError, MissingExtraError
from lowbit_attention.output.saving import appending, write_whole

SIZES = (10, 400_000)


def policies():
    """Two policies whose files differ much in length."""
    recipes = {name: RECIPES[name] for name in ("sage2_8b", "exact")}
    return [Policy({CallKey("n" * size, 0, 0.0): "sage2_8b"}, recipes) for size in SIZES]


def save_often(path):
    for one in policies() * 15:
        one.save(path)


def add_often(path):
    for _ in range(200):
        with appending(path) as file:
            file.write(b"a,b\n" if file.tell() == 0 else b"1,2\n")


def test_threads_that_save_to_one_path_all_succeed_and_leave_one_whole_file(tmp_path):  # T21
    path = tmp_path / "p.json"
    begin = threading.Barrier(6)
    seen = []

    def work(_):
        begin.wait()
        save_often(path)
        seen.append(len(next(iter(Policy.load(path).routes)).name))  # never half a file

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert set(seen) <= set(SIZES)
    assert len(seen) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def fail(which):
    """What a worker does."""
    if which == "recipe":
        recipe("sage2_8b:p_max=1000")
    if which == "extra":
        raise MissingExtraError("a plot", "plot", "matplotlib")
    if which == "save":
        Policy({}, RECIPES).save("/dev/null")


def test_processes_save_and_raise(tmp_path):  # T21, T26
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        saved = [pool.submit(save_often, tmp_path / "p.json") for _ in range(2)]
        added = [pool.submit(add_often, tmp_path / "rows.csv") for _ in range(2)]
        failed = [pool.submit(fail, which) for which in ("recipe", "extra", "save")]
        for one in (*saved, *added):
            one.result(timeout=120)
        errors = [one.exception(timeout=120) for one in failed]
    assert len(next(iter(Policy.load(tmp_path / "p.json").routes)).name) == SIZES[-1]
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b", *["1,2"] * 399]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "rows.csv"]
    assert isinstance(errors[0], InvalidRecipeError)
    assert errors[0].reasons == ("p_max=1000 is above the largest e4m3 number, 448",)
    assert isinstance(errors[1], MissingExtraError)
    assert errors[1].extra == "plot"
    assert isinstance(errors[2], LowbitError)
    assert "is a device" in str(errors[2])


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_ctrl_c_in_bench_keeps_what_was_measured(tmp_path):  # T25
    shapes = [f"--shape=1x1x{n}x16" for n in range(8, 208)]
    done = subprocess.Popen(
        [sys.executable, "-c", "from lowbit_attention.cli import main; main()", "bench", "--device", "cpu",
         "--seconds-per-shape", "0.2", "-p", "torch_default", "--csv", tmp_path / "a.csv", "--json",
         tmp_path / "a.json", *shapes],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 100
    while time.monotonic() < until and not ((tmp_path / "a.csv").exists() and (tmp_path / "a.csv").stat().st_size):
        time.sleep(0.05)  # (until the first row is there: just opened, the file is empty for some microseconds)
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=100)
    assert err == "lowbit: interrupted\n"
    assert done.returncode == 130
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert 1 <= len(rows) < 200
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(rows)


def test_ctrl_c_while_the_commands_are_imported(monkeypatch, capsys):  # T25
    class Interrupts:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "lowbit_attention.cli.app":
                raise KeyboardInterrupt
            return

    monkeypatch.delitem(sys.modules, "lowbit_attention.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupts, *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipes"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "lowbit: interrupted\n"
    assert importlib.util.find_spec("lowbit_attention.cli") is not None


def test_a_reader_that_has_seen_enough_is_no_failure_of_ours():
    done = subprocess.run(
        f"{sys.executable} -c 'from lowbit_attention.cli import main; main([\"recipes\", \"--json\"])' | head -c 1",
        shell=True, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert done.stdout == "["
    assert done.stderr == ""


def test_a_file_that_is_replaced_was_whole_at_every_moment(tmp_path):
    path = tmp_path / "f"
    texts = ["a" * 5, "b" * 300_000]
    write_whole(path, texts[0])
    stop = threading.Event()

    def read():
        found = set()
        while not stop.is_set():
            found.add(path.read_text())
        return found

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for n in range(100):
            write_whole(path, texts[n % 2])
        stop.set()
        assert reader.result() <= set(texts)
