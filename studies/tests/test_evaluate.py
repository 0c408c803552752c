"""The harness of the table on tiny random models: every row is there, and its arithmetic is right."""

import csv
import math

import draw
import evaluate
import numpy as np
import pytest
import tables
import torch
from study import UNIFORM, Row, Settings, Study, run

from lowbit_attention import InvalidArgumentError
from lowbit_attention.adaptive import Sample, find_subject, observe
from lowbit_attention.adaptive.calibrate import observe_subject
from lowbit_studies.subjects import load_subject, weights
from lowbit_studies.subjects.base import EndMetric
from lowbit_studies.subjects.calibration import calibrated
from lowbit_studies.subjects.diffusion import DiffusionConfig, DiffusionTransformer
from lowbit_studies.subjects.dit import DiffusionSubject
from lowbit_studies.subjects.language import LanguageConfig, LanguageModel
from lowbit_studies.subjects.lm import LanguageSubject

LM = LanguageConfig(dim=64, heads=1, layers=5, hidden=64)
DIT = DiffusionConfig(size=16, dim=64, heads=1, layers=2, hidden=64, classes=3)
TEXT = (torch.arange(3000) * 7 % 251).byte()


def lively(model):
    """A model whose attention matters."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "qkv" in name else 0.15)
    return model


def language(**options):
    return LanguageSubject(
        lively(LanguageModel(LM)), context=96, windows=3, batch=2, train=TEXT, held_out=TEXT, **options
    )


def diffusion():
    model = lively(DiffusionTransformer(DIT))
    return DiffusionSubject(model, pictures=4, batch=3, calibration_pictures=1, steps=3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    return run(language(), Settings(random=3, runs=1), folder, lambda text: None)


def test_every_row_is_there(study):
    names = [row.name for row in study.rows if row.group == "recipe"]
    assert names == ["exact", *UNIFORM]
    assert {"adaptive 60", "adaptive 80"} <= {row.name for row in study.rows if row.group == "adaptive"}
    assert len(tables.randoms(study, "adaptive 60")) == len(tables.randoms(study, "adaptive 80")) == 3


def test_policies_keep_their_shares(study):
    for share in (60, 80):
        row = study.row(f"adaptive {share}")
        assert row.four_bits >= share / 100 - 1e-9
        for other in tables.randoms(study, row.name):
            assert other.four_bits == pytest.approx(row.four_bits)
            assert other.seconds == pytest.approx(row.seconds)
    assert study.row("papers rule 60").four_bits == pytest.approx(study.row("adaptive 60").four_bits)
    assert study.row("rotated_4b").four_bits == 1.0
    assert study.row("sage2pp_8b").four_bits == 0.0


def test_rows_differ_and_exact_is_exact(study):
    exact = study.row("exact")
    assert float(exact.values["kl"].abs().max()) == 0.0
    assert float(study.row("rotated_4b").values["kl"].min()) > float(study.row("sage2_8b").values["kl"].max()) > 0
    assert study.row("exact").seconds > study.row("sage2pp_8b").seconds > study.row("rotated_4b").seconds > 0
    assert math.isnan(study.row("fast_8b").seconds)  # nobody timed it on Ada
    assert study.bitwise is True


def test_the_exact_row_is_the_model_alone(study):
    subject = language()
    out = subject.outputs(lambda: None)
    assert torch.equal(subject.judge(out, out)["bits"], study.row("exact").values["bits"])


def test_the_diffusion_transformer_is_judged_step_by_step(tmp_path):
    subject = diffusion()
    with observe(subject.model, ["sage2_4b"], timesteps=subject.timesteps) as watch:
        subject.calibrate(0, watch.restart)
        subject.calibrate(1, watch.restart)
    assert watch.observations.timesteps == [0.0, 1.0, 2.0]
    assert len(watch.observations.records) == 3 * DIT.layers
    out = subject.outputs(lambda: None)
    assert out.shape == (4, 3, 16, 16)
    again = DiffusionSubject(subject.model, pictures=4, batch=4, steps=3).outputs(lambda: None)
    assert torch.allclose(out, again, atol=1e-3)  # (float32, and the random weights amplify)
    worse = subject.judge(out, (out + 0.1).clamp(-1, 1))
    assert float(worse["psnr"].max()) < 30


def test_calibration_uses_other_inputs_than_the_judged():
    subject = language()
    other = torch.flip(TEXT, dims=(0,))
    changed = LanguageSubject(subject.model, context=96, windows=3, train=other, held_out=TEXT)
    assert torch.equal(subject.outputs(lambda: None), changed.outputs(lambda: None))
    assert not torch.equal(subject.calibrate(0, lambda: None), changed.calibrate(0, lambda: None))


def test_standard_errors_by_hand():
    metric = EndMetric("loss", "", False, 2)

    class Two:
        metrics = (metric,)

    study = Study(Two())
    mine = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    study.rows = [Row("adaptive 60", "adaptive", 0.6, 1.0, {"loss": mine})]
    for n, shift in enumerate((1.0, 3.0)):
        values = {"loss": mine + shift + torch.tensor([0.0, 0.0, 0.3], dtype=torch.float64)}
        study.rows.append(Row(f"random {n}", "random", 0.6, 1.0, values, of="adaptive 60"))
    better, error = tables.advantage(study, "adaptive 60", metric)
    assert better == pytest.approx(2.1)
    over_inputs = torch.tensor([2.0, 2.0, 2.3]).std().item() / math.sqrt(3)
    assert error == pytest.approx(math.hypot(over_inputs, math.sqrt(2) / math.sqrt(2)), rel=1e-6)
    higher = EndMetric("loss", "", True, 2)
    assert tables.advantage(study, "adaptive 60", higher)[0] == pytest.approx(-2.1)


def test_the_script_writes_tables_policies_and_pictures(tmp_path):
    weights.save(tmp_path / "w/lm.safetensors", lively(LanguageModel(LM)), {})
    weights.save(tmp_path / "w/dit.safetensors", lively(DiffusionTransformer(DIT)), {})
    np.savez(tmp_path / "corpus.npz", train=TEXT.numpy(), held_out=TEXT.numpy())
    found = evaluate.main(
        ["--out", str(tmp_path / "out"), "--weights", str(tmp_path / "w"), "--data", str(tmp_path / "corpus.npz"),
         "--subjects", "lm:64", "dit", "--device", "cpu", "--random", "2", "--runs", "1", "--steps", "2",
         "--text", "320", "--pictures", "3"],
        tell=lambda text: None,
    )  # fmt: skip
    assert len(found) == 2
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["subject"], row["inputs"]) for row in rows} == {("lm:64", "5"), ("dit", "3")}
    text = (tmp_path / "out/results.md").read_text()
    assert "2 random policies of these shares" in text
    assert text.count("applied again, gives the same bits") == 2
    assert (tmp_path / "out/dit/policy_adaptive_60.json").is_file()
    draw.main([str(tmp_path / "out"), str(tmp_path / "images")])
    assert {p.name for p in (tmp_path / "images").iterdir()} == {
        "subject-lm_64.png", "subject-dit.png", "subject-dit-pictures.png",
    }  # fmt: skip


def test_an_unknown_subject_is_an_error():
    with pytest.raises(InvalidArgumentError, match="known: lm, dit, minilm"):
        load_subject("gpt")


def test_the_language_model_was_trained():
    subject = load_subject("lm", context=1024, windows=2)
    out = subject.outputs(lambda: None)
    assert float(subject.judge(out, out)["bits"].mean()) < 2.5
    assert (weights.FOLDER / "lm.safetensors").stat().st_size <= 10_000_000


def test_the_diffusion_transformer_was_trained():
    subject = load_subject("dit", pictures=2, steps=8)
    out = subject.outputs(lambda: None)
    assert float(out.std()) > 0.2  # pictures with contrast, and smooth as pictures are, which noise is not
    assert float((out[..., 1:] - out[..., :-1]).abs().mean()) < 0.5 * float(out.std())
    assert (weights.FOLDER / "dit.safetensors").stat().st_size <= 10_000_000


@pytest.mark.parametrize(
    ("name", "kind", "layers", "timesteps"),
    [("lm", LanguageModel, 12, None), ("dit", DiffusionTransformer, 8, "forwards")],
)
def test_the_command_knows_the_trained_ones(name, kind, layers, timesteps):
    subject = find_subject(name)
    assert isinstance(subject.model, kind)
    assert len(subject.model.blocks) == layers
    assert (len(subject.prompts), subject.timesteps) == (2, timesteps)


@pytest.mark.parametrize("make", [language, diffusion])
def test_the_command_can_calibrate_them(make):
    subject = calibrated(make(), runs=2)
    found = observe_subject(subject, ["sage2_4b"], sample=Sample(), like="sm_89", resume=None, progress=False)
    steps = [0.0] if subject.timesteps is None else [0.0, 1.0, 2.0]
    assert found.timesteps == steps
    assert all(record.count == 2 for record in found.records.values())
