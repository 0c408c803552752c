"""`lowbit bench --steps`."""

import json

import pytest
import torch
from step_cases import stub
from test_command import lowbit

from lowbit_attention.bench import base, results
from lowbit_attention.bench.run import Note
from lowbit_attention.bench.steps import StepResult, StepRow
from lowbit_attention.cli import bench_steps
from lowbit_attention.errors import InvalidArgumentError, InvalidRecipeError

TRIAL = ("--steps", "--device", "cpu", "--tiny", "--seconds-per-shape", "0")


def test_the_command_on_a_cpu(capsys, tmp_path):
    pytest.importorskip("transformers")
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json")}
    options = ("--csv", str(files["csv"]), "--json", str(files["json"]), "--commit", "abc")
    assert lowbit(*TRIAL, "-m", "bert-large", "-r", "auto", "-r", "sage2_8b", *options) in (None, 0)
    out = " ".join(capsys.readouterr().out.split())
    for words in ("bert-large: BERT-large", "ours:sage2_8b", "0/2/0", "ours:auto: 2 torch (recipe auto:", "appended 3"):
        assert words in out
    rows = results.read_rows(files["csv"], StepRow)
    assert [(r.model, r.variant, r.commit) for r in rows] == [
        ("bert-large (tiny)", variant, "abc") for variant in ("torch", "ours:auto", "ours:sage2_8b")
    ]
    document = json.loads(files["json"].read_text())
    assert [row["variant"] for row in document["rows"]] == [r.variant for r in rows]
    assert [(c["variant"], c["implementation"], c["calls"]) for c in document["calls"]] == [
        ("ours:auto", "torch", 2), ("ours:sage2_8b", "emulation", 2),
    ]  # fmt: skip
    assert document["notes"] == []


def test_a_missing_package_is_a_note_and_nothing_at_all_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(base, "is_installed", lambda module: False)
    assert lowbit(*TRIAL) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured: all at ltx-video, flux, sd3.5-large" in out
    assert "not installed: pip install diffusers" in out
    assert "Nothing was timed." in out
    assert "pip install diffusers transformers" in out


def test_what_was_measured_is_kept_when_the_run_breaks(monkeypatch, tmp_path):
    row = StepRow("t", "g", "d", "c", "t", "l", "c", "p", "m", "torch", "", False, 1.0, 1.0, 1.0, 3)

    def breaks(models, *others):
        yield StepResult(stub(), [row], [Note("ours:auto", "stub", "out of memory")])
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(bench_steps, "run_steps", breaks)
    with pytest.raises(RuntimeError, match="illegal"):
        lowbit(*TRIAL, "--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json"))
    assert results.read_rows(tmp_path / "a.csv", StepRow) == [row]
    assert json.loads((tmp_path / "a.json").read_text())["notes"][0]["reason"] == "out of memory"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["--steps"], InvalidArgumentError, "no CUDA device.*--device cpu --tiny"),
        (["--steps", "--device", "cpu"], InvalidArgumentError, "for GPUs; on the CPU try tiny ones.*--tiny"),
        ([*TRIAL, "-m", "fluks"], InvalidArgumentError, "unknown model 'fluks'; known: bert-large"),
        ([*TRIAL, "-r", "sage9"], InvalidRecipeError, "unknown name"),
        ([*TRIAL, "-s", "1x2x64x32"], InvalidArgumentError, "--shape is not for whole steps"),
        ([*TRIAL, "--dtype", "fp16"], InvalidArgumentError, "--dtype is not for whole steps"),
        ([*TRIAL, "--plot", "a.png"], InvalidArgumentError, "--plot is not for whole steps"),
        ([*TRIAL, "--csv", __file__], InvalidArgumentError, "other columns"),
        (["--device", "cpu", "-s", "1x2x64x32", "--tiny"], InvalidArgumentError, "--tiny is only for whole steps"),
        (["--device", "cpu", "-m", "flux"], InvalidArgumentError, "--model is only for whole steps"),
    ],
)
def test_wrong_input_is_refused_before_the_work(monkeypatch, arguments, kind, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kind, match=words):
        lowbit(*arguments)


def test_help_teaches(capsys):
    lowbit("--help")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in ("lowbit bench --steps --csv steps.csv", "torch_cut without the padded tokens", "hunyuan-video"):
        assert phrase in words
