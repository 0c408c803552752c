"""Every transformer class of diffusers that can be built, tiny: which calls are reached, and what comes out."""

import importlib.util
from pathlib import Path

import pytest
import reach
import tiny
import tiny_first
import tiny_flux
import tiny_videos
import torch
from tiny_models import BY_NAME, CASES

from lowbit_attention import sdpa_enabled
from lowbit_attention.integrations.diffusers import register, unregister

NEAR = "int8_fp16"
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def rows():
    """Every class, natively and on the backend."""
    report = register(NEAR)
    found = {case.id: reach.reached(case, report, "lowbit") for case in CASES}
    unregister()
    return found


@pytest.mark.parametrize("name", BY_NAME)
def test_every_call_is_reached_and_the_output_is_near(rows, name):
    row = rows[name]
    assert row.counted.calls > 0
    if row.case.refuses:
        assert row.case.refuses in row.refused
        return
    assert not row.refused
    assert row.arrived == row.ran == row.counted.calls
    assert 0 < row.error < 5e-3


def test_the_matrix_in_the_documents_is_this(rows):
    spec = importlib.util.spec_from_file_location("diffusers_matrix", ROOT / "tools/diffusers_matrix.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    assert matrix.on_the_page() == matrix.text(list(rows.values())), "run: python tools/diffusers_matrix.py"


@pytest.mark.parametrize("name", [case.id for case in CASES if case.masked])
def test_masks_are_honoured(name, monkeypatch):
    """Without its mask a model gives something else, and on the backend it is as near to that."""
    case = BY_NAME[name]
    report = register(NEAR)
    masked = reach.on(case.build(), case, "lowbit")
    for module in (tiny, tiny_first, tiny_flux, tiny_videos):
        monkeypatch.setattr(module, "seen", lambda b, n, hidden=0, dtype=torch.bool: torch.ones(b, n, dtype=dtype))
        monkeypatch.setattr(module, "ragged", lambda: torch.ones(2, tiny.TEXT, dtype=torch.bool))
    row = reach.reached(case, report, "lowbit")
    unmasked = case.run(case.build())
    assert row.error < 5e-3
    different = masked.shape != unmasked.shape or reach.relative(masked, unmasked) > 2 * row.error
    assert different


WHOLE = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel",
    "SanaTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel", "Kandinsky5Transformer3DModel",
)  # fmt: skip
"""Different processors. (Lumina2, HiDream, OmniGen, StableAudioDiT compile with graph breaks only, natively too.)"""


@pytest.mark.parametrize("name", WHOLE)
def test_compiled(name):
    """Without graph breaks: whole, and block by block."""
    case = BY_NAME[name]
    report = register(NEAR)
    model = case.build()
    model.set_attention_backend("lowbit")
    eager = case.run(model)
    calls = report.calls
    torch._dynamo.reset()
    report.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert reach.relative(case.run(compiled), eager) < 1e-3
    assert report.ran == report.calls == 2 * calls
    report.clear()
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert reach.relative(case.run(model), eager) < 1e-3
        assert report.ran == report.calls == calls


def test_compiled_code_follows_the_backend():
    """What was compiled on one backend is not used on another."""
    for name in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        case = BY_NAME[name]
        report = register(NEAR)
        model = case.build()
        exact = case.run(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert reach.relative(case.run(compiled), exact) < 1e-5
        model.set_attention_backend("lowbit")
        near = case.run(compiled)
        assert 1e-5 < reach.relative(near, exact) < 5e-3
        calls = report.calls
        replaced = register("sage2_8b")
        assert not torch.equal(case.run(compiled), near)
        assert replaced.ran == calls == report.calls
        model.set_attention_backend("native")
        assert reach.relative(case.run(compiled), exact) < 1e-5
        assert replaced.ran == calls
        model.set_attention_backend("lowbit")
        unregister()
        assert reach.relative(case.run(compiled), exact) < 1e-5


def test_the_same_calls_as_sdpa_enabled():
    for name in ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"):
        case = BY_NAME[name]
        report = register("sage2_8b")
        model = case.build()
        with sdpa_enabled(model, recipe="sage2_8b") as other:
            out = case.run(model)
        assert torch.equal(reach.on(model, case, "lowbit"), out)
        assert report.counts == other.counts
