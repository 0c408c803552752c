"""Random calls, and their samples."""

import csv

import pytest
import torch
import typer
from bench_cases import CPU, Fake

from lowbit_attention.bench import sampling
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.run import Settings
from lowbit_attention.bench.sampling import LEAST_FLOPS, MOST_BYTES, MOST_FLOPS, random_shapes, sample
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.cli import bench as cli
from lowbit_attention.errors import InvalidArgumentError


def test_random_shapes_are_like_real_calls():
    shapes = random_shapes(400, 3)
    assert shapes == random_shapes(400, 3)
    assert shapes != random_shapes(400, 4)
    assert len({s.label for s in shapes}) == 400
    for s in shapes:
        assert LEAST_FLOPS <= s.flops <= MOST_FLOPS
        assert s.mask_bytes <= MOST_BYTES
        assert 64 <= s.q_len <= 131_072
        assert not (s.mask and s.is_causal)
        assert s.q_len == s.kv_len or not s.is_causal

    def share(of):
        return sum(map(of, shapes)) / len(shapes)

    assert 0.1 < share(lambda s: s.is_causal) < 0.5
    assert 0.05 < share(lambda s: s.mask is not None) < 0.3
    assert 0.2 < share(lambda s: s.head_dim == 64) < 0.5
    assert 0.1 < share(lambda s: s.kv_heads < s.q_heads) < 0.6
    assert 0.2 < share(lambda s: s.q_len % 64 != 0) < 0.7
    assert {s.q_len.bit_length() for s in shapes} >= set(range(8, 17))
    assert all(s.mask is None for s in random_shapes(50, 3, masked=0.0))


def test_samples_are_medians_of_turns(monkeypatch):
    taken = iter(range(1, 100))
    monkeypatch.setattr(sampling, "percentile", lambda times, at: sorted(times)[len(times) // 2])
    calls = []

    class Timer:
        def run(self, call, lead_us):
            calls.append((call(), lead_us))
            return float(next(taken))

        def settle(self):
            pass

        def host_us(self, call, times):
            return 40.0

    class Refuses(Fake):
        def prepare(self, shape, q, k, v, mask=None):
            raise Unsupported("not this one")

    monkeypatch.setattr(sampling, "make_timer", lambda device: Timer())
    a, b = Fake("a", {"whole": lambda: "a", "kernel": lambda: "never"}), Fake("b", {"whole": lambda: "b"})
    shapes = [parse_shape("1x2x8x16"), parse_shape("1x2x8x16:bits")]
    plain, masked = sample(shapes, [a, b, Refuses("c", {})], Settings(CPU, commit="abc"), rounds=3)
    assert [(r.provider, r.us, r.shape, r.commit, r.gpu) for r in plain.rows] == [
        ("a", 4.0, "1x2x8x16", "abc", "CPU"), ("b", 3.0, "1x2x8x16", "abc", "CPU"),
    ]  # fmt: skip
    assert [(n.provider, n.shape, n.reason) for n in plain.notes] == [("c", "1x2x8x16", "not this one")]
    assert calls[:6] == [("a", 0.0), ("b", 0.0), ("b", 0.0), ("a", 0.0), ("a", 0.0), ("b", 0.0)]
    assert {lead for _, lead in calls[6:]} == {80.0}  # (the host is ahead, though a mask takes it longer)
    assert len(masked.rows) == 2
    assert not list(sample(shapes, [a], Settings(CPU, max_seconds=-1.0)))


def test_what_does_not_fit_is_a_note():
    def full():
        raise torch.cuda.OutOfMemoryError

    def broken():
        raise RuntimeError("no kernel image\nand more")

    fakes = [Fake("big", {"whole": full}), Fake("broken", {"whole": broken}), Fake("works", {"whole": lambda: None})]
    (one,) = sample([parse_shape("1x2x8x16")], fakes, Settings(CPU))
    assert [row.provider for row in one.rows] == ["works"]
    assert [(n.provider, n.reason) for n in one.notes] == [
        ("big", "out of memory"), ("broken", "RuntimeError: no kernel image"),
    ]  # fmt: skip


def lowbit(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command("bench")(cli.command)
    return app(args=["--device", "cpu", "--random", "2", "-p", "torch_default", *arguments], standalone_mode=False)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "calls.csv"
    lowbit("-r", "exact", "--csv", str(file))
    rows = list(csv.DictReader(file.open()))
    assert [r["provider"] for r in rows] == ["torch_default", "ours:exact"] * 2
    assert all(float(r["us"]) > 0 and r["torch"] == torch.__version__ for r in rows)
    assert "2 random calls" in capsys.readouterr().out
    lowbit("--seed", "2", "--csv", str(file))
    assert len({r["shape"] for r in csv.DictReader(file.open())}) == 4
    wrong = (["--set", "quick"], ["--steps", "--tiny"], ["--plot", str(tmp_path / "a.png")], ["--shape", "1x2x8x16"])
    for more in wrong:
        with pytest.raises(InvalidArgumentError, match=more[0]):
            lowbit(*more)


def test_nothing_to_time_is_an_error(capsys):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("bench")(cli.command)
    assert app(args=["--device", "cpu", "--random", "1", "-p", "fa3"], standalone_mode=False) == 1
    assert "not measured: fa3, 1 ×: not installed" in capsys.readouterr().out
