"""The training scripts, tiny: they learn, repeat by seed, and write weights that the subjects load."""

import json

import numpy as np
import prepare
import pytest
import torch
import train_dit
import train_lm
from loop import Options

from lowbit_studies.subjects import weights
from lowbit_studies.subjects.diffusion import DiffusionConfig, DiffusionTransformer
from lowbit_studies.subjects.language import LanguageConfig, LanguageModel

TINY = {"dim": 32.0, "heads": 1.0, "layers": 2.0, "hidden": 32.0}


@pytest.fixture
def corpus(tmp_path):
    line = b"def f(x):\n    return x + 1\n"
    text = np.frombuffer(line * 400, dtype=np.uint8)
    np.savez(tmp_path / "corpus.npz", train=text, held_out=text[:4000], python=np.array("3"))
    return tmp_path / "corpus.npz"


def options(data, out, **changes):
    return Options(data, out, device="cpu", batch=4, overrides=TINY, learning_rate=1e-2, **changes)


def test_the_language_model_learns_and_repeats(tmp_path, corpus, capsys):
    for name in ("a", "b"):
        train_lm.main(options(corpus, tmp_path / f"{name}.safetensors", steps=60), short=64, long=128)
    log = json.loads((tmp_path / "a.json").read_text())
    losses = [entry["loss"] for entry in log["curve"]]
    assert losses[-1] < 0.9 * losses[0]
    assert log["steps"] == 60
    assert 0 < log["validation"]["bits_128"] < 6.5
    a, b = (weights.load(tmp_path / f"{name}.safetensors", LanguageModel, LanguageConfig) for name in ("a", "b"))
    assert a.config.dim == 32
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert "step      1" in capsys.readouterr().out


def test_the_limit_in_time_holds(tmp_path, corpus):
    train_lm.main(options(corpus, tmp_path / "a.safetensors", minutes=17 / 60), short=32, long=64)  # 2 s of training
    log = json.loads((tmp_path / "a.json").read_text())
    assert 1.5 < log["seconds"] < 17
    assert log["steps"] > 3


def test_the_diffusion_transformer_learns(tmp_path):
    pixels = np.zeros((2, 24, 30, 3), dtype=np.uint8)
    pixels[0], pixels[1, :, ::2] = 40, 250
    sizes = {name: np.array([value, value]) for name, value in (("height", 24), ("width", 30))}
    np.savez(tmp_path / "images.npz", pixels=pixels, label=np.array([0, 1]), names=np.array(["a", "b"]), **sizes)
    chosen = options(tmp_path / "images.npz", tmp_path / "dit.safetensors", steps=80)
    chosen.overrides = {**TINY, "size": 16.0, "patch": 4.0}
    train_dit.main(chosen)
    log = json.loads((tmp_path / "dit.json").read_text())
    losses = [entry["loss"] for entry in log["curve"]]
    assert losses[-1] < 0.8 * losses[0]
    model = weights.load(tmp_path / "dit.safetensors", DiffusionTransformer, DiffusionConfig)
    assert (model.config.classes, model.config.size) == (2, 16)
    assert (tmp_path / "dit.png").stat().st_size > 100


def test_a_failing_compiler_is_only_slower(tmp_path, corpus, capsys, monkeypatch):
    def broken(self, **_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    train_lm.main(options(corpus, tmp_path / "a.safetensors", steps=2, compile=True), short=32, long=64)
    assert "not compiled: RuntimeError: no compiler here" in capsys.readouterr().out
    assert (tmp_path / "a.safetensors").is_file()


def test_the_pictures_come_out_of_the_wheels(tmp_path):
    prepare.images(tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz") as data:
        assert [str(name) for name in data["names"]] == list(prepare.PICTURES)
        assert np.bincount(data["label"]).tolist() == [len(prepare.SHORT_SIDES)] * len(prepare.PICTURES)
        assert min(data["height"].min(), data["width"].min()) == min(prepare.SHORT_SIDES)
        spread = data["pixels"].reshape(len(data["label"]), -1).std(axis=1)
        assert spread.min() > 10  # pictures, not grey (padding included)
