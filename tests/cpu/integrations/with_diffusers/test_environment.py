"""``DIFFUSERS_ATTN_BACKEND``, in interpreters of their own."""

import os
import subprocess
import sys

import pytest

MODEL = """
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
model = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=8, pos_embed_max_size=8,
).eval()
def run():
    with torch.no_grad():
        model(torch.randn(1, 4, 8, 8), torch.randn(1, 6, 32), torch.randn(1, 8), torch.ones(1))
"""
OURS = "from lowbit_attention.integrations.diffusers import register, unregister\n"
CALL = """
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
def run():
    dispatch_attention_fn(*[torch.randn(1, 8, 2, 16)] * 3)
"""
COUNTED = """
from lowbit_attention.integrations.diffusers.registration import _registered
run()
print(registry._active_backend.value, _registered[registry._active_backend.value].backend.report.by_implementation())
"""


def python(code, variable):
    environment = {**os.environ, "DIFFUSERS_ATTN_BACKEND": variable, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", code],
        env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    return run.stdout, run.stderr


@pytest.mark.parametrize("first", [OURS, "import diffusers.models.modeling_utils\n" + OURS])
def test_imported_before_the_backends_are(first):
    after = "unregister(); run(); print(registry._active_backend.value)"
    out, error = python(first + (MODEL if first is OURS else CALL) + COUNTED + after, "lowbit_int8_fp16")
    assert out == "lowbit_int8_fp16 {'emulation': 1}\nnative\n", error


def test_too_late():
    out, error = python(
        "import os\nos.environ['DIFFUSERS_ATTN_BACKEND'] = 'native'\nimport diffusers.models.attention_dispatch\n"
        "os.environ['DIFFUSERS_ATTN_BACKEND'] = 'lowbit'\n" + OURS,
        "lowbit",
    )
    assert out == ""
    assert "DIFFUSERS_ATTN_BACKEND=lowbit comes too late: diffusers has read it already" in error
    assert 'pipe.transformer.set_attention_backend("lowbit")' in error


def test_after_diffusers_has_failed_it_is_not_too_late():
    failing = "try:\n    import diffusers.models.attention_dispatch\nexcept ValueError as error:\n    print(error)\n"
    out, error = python(failing + OURS + CALL + COUNTED, "lowbit_int8_fp16")
    first, second = out.splitlines()
    assert first == "'lowbit_int8_fp16' is not a valid AttentionBackendName", error
    assert second == "lowbit_int8_fp16 {'emulation': 1}"


def test_a_recipe_that_is_none():
    _, error = python(OURS, "lowbit_sage9")
    assert "DIFFUSERS_ATTN_BACKEND=lowbit_sage9: there is no such backend" in error
    assert "sage2_8b" in error
