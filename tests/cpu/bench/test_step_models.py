"""The models of whole steps: built as their packages' classes are, with inputs of the sizes that are meant."""

import sys
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU
from torch import nn

from lowbit_attention.bench import base
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.step_models import STEP_MODELS, Maker, StepInputs, StepModel, find_step_models
from lowbit_attention.errors import InvalidArgumentError


@pytest.mark.parametrize("name", STEP_MODELS)
def test_a_tiny_model_makes_a_step(name):
    model = STEP_MODELS[name]
    if reason := model.not_available_reason():
        pytest.skip(reason)
    module, inputs = model.build(CPU, tiny=True)
    assert not module.training
    assert {p.dtype for p in module.parameters()} <= {torch.bfloat16, torch.float32}
    with torch.no_grad():
        out = module(**inputs.given, return_dict=False)[0]
        assert out.isfinite().all()
        assert out.float().std() > 0.01
        again, _ = model.build(CPU, tiny=True)
        assert torch.equal(again(**inputs.given, return_dict=False)[0], out)
        if inputs.cut is not None:
            cut = module(**inputs.cut, return_dict=False)[0]
            assert (cut - out).abs().sum() < 0.02 * out.abs().sum()  # bf16's rounding, in another order
    if inputs.rows is not None:
        assert inputs.rows.shape == out.shape[:-1]


# The widths that inputs are made from, as the real classes have them by default (diffusers 0.42).
WIDTHS = {
    "in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "text_dim": 4096,
    "text_embed_dim": 4096, "caption_channels": 4096, "patch_size": 2, "attention_head_dim": 64,
}  # fmt: skip


class Transformer(nn.Module):
    """A class of diffusers as far as it is built here."""

    _keep_in_fp32_modules = ("norm1",)

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**{**WIDTHS, **config})
        self.block = nn.ModuleDict({"norm1": nn.LayerNorm(4), "norm10": nn.LayerNorm(4)})


@pytest.fixture
def diffusers(monkeypatch):
    classes = {m.class_name: type(m.class_name, (Transformer,), {}) for m in STEP_MODELS.values()}
    package = SimpleNamespace(__spec__=SimpleNamespace(), **classes)
    monkeypatch.setitem(sys.modules, "diffusers", package)
    return package


TOKENS = {
    "ltx-video": (2, 21 * 16 * 22, 16),
    "flux": (1, 4096, 16),
    "sd3.5-large": (2, 16, 128, 128),
    "qwen-image": (1, 83 * 83, 16),
    "cogvideox-5b": (2, 13, 16, 60, 90),
    "wan-1.3b": (1, 16, 21, 60, 104),
    "hunyuan-video": (1, 16, 16, 90, 160),
    "wan-14b": (1, 16, 21, 90, 160),
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_real_sizes(name, diffusers):
    model = STEP_MODELS[name]
    assert model.not_available_reason() is None
    module, inputs = model.build(CPU)
    assert isinstance(module, getattr(diffusers, model.class_name))
    assert vars(module.config) == WIDTHS | dict(model.config)
    assert inputs.given["hidden_states"].shape == TOKENS[name]
    assert inputs.given["hidden_states"].dtype == torch.bfloat16
    text = inputs.given["encoder_hidden_states"]
    assert text.shape[1] == model.sizes["text"]
    used = model.sizes.get("text_used")
    assert (inputs.cut is None) is (used is None)
    if used:
        mask = inputs.given.get("encoder_attention_mask", inputs.given.get("encoder_hidden_states_mask"))
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [used] * len(text)
        assert torch.equal(inputs.cut["encoder_hidden_states"], text[:, :used])
    kept = {name: p.dtype for name, p in module.named_parameters() if name.endswith("weight")}
    assert kept == {"block.norm1.weight": torch.float32, "block.norm10.weight": torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_the_mix_of_lengths_in_bert():
    config = SimpleNamespace()
    inputs = STEP_MODELS["bert-large"].inputs(Maker(CPU), config, STEP_MODELS["bert-large"].sizes)
    lengths = inputs.rows.sum(1).tolist()
    assert (len(lengths), lengths[0], lengths[-1]) == (32, 128, 512)
    assert lengths == sorted(lengths)
    assert torch.equal(inputs.given["attention_mask"].bool(), inputs.rows)
    assert inputs.cut is None


def test_building_leaves_the_global_state(diffusers):
    state = torch.get_rng_state()

    class Fails(nn.Module):
        def __init__(self, **config):
            raise MemoryError

    diffusers.FluxTransformer2DModel = Fails
    with pytest.raises(MemoryError):
        STEP_MODELS["flux"].build(CPU)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.empty(1).device == CPU


def test_why_a_model_cannot_be_built(monkeypatch, diffusers):
    flux = STEP_MODELS["flux"]
    del diffusers.FluxTransformer2DModel
    assert flux.not_available_reason().endswith("has no FluxTransformer2DModel: pip install --upgrade diffusers")
    monkeypatch.setattr(base, "is_installed", lambda module: False)
    assert flux.not_available_reason() == "not installed: pip install diffusers"
    assert STEP_MODELS["bert-large"].not_available_reason() == "not installed: pip install transformers"


def test_a_class_that_cannot_be_loaded_is_told(monkeypatch):
    class Late:
        __spec__ = None

        def __getattr__(self, name):
            raise RuntimeError("Failed to import it")

    monkeypatch.setitem(sys.modules, "late", Late())
    model = StepModel("late", "", "late", "X", 1, lambda *a: StepInputs({}), {}, {})
    with pytest.raises(Unsupported, match="cannot load X: Failed to import it"):
        model._find("X")


def test_models_by_name():
    assert [m.name for m in find_step_models(["flux", "wan-14b", "flux"])] == ["flux", "wan-14b"]
    with pytest.raises(InvalidArgumentError, match="unknown model 'fluks'; known: bert-large, ltx-video, flux"):
        find_step_models(["fluks"])
