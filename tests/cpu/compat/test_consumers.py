"""Each consumer of ``sageattention``, by the calls that it is known to make: layouts, words, masks, answers.

The calls are written from the consumers' documented interfaces (diffusers 0.42, ComfyUI and its node packs of autumn
2026, yunchang 0.6, xDiT 0.7, SGLang); `test_diffusers_itself` asks the real package, where it is installed.
"""

import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lowbit_attention
from lowbit_attention import compare
from lowbit_attention.compat import install_as_sageattention

SOURCE = Path(lowbit_attention.__file__).parents[1]
DIM = 32


@pytest.fixture
def sage():
    with install_as_sageattention(on_emulation="allow"):
        import sageattention

        yield sageattention


def qkv(kv_heads=4, lengths=(70, 50), biased=False):
    """HND, with a mean of K where smoothing is to show."""
    g = torch.Generator().manual_seed(0)
    sizes = [(4, lengths[0]), (kv_heads, lengths[1]), (kv_heads, lengths[1])]
    q, k, v = (torch.randn(2, h, n, DIM, generator=g) for h, n in sizes)
    return q, (k + 3 if biased else k), v


def near(got, want, l1=0.06):
    assert got.shape == want.shape
    assert compare(want, got).l1 < l1


def by_token(*tensors):
    return [t.transpose(1, 2) for t in tensors]


# ---- ComfyUI

MASKS = {
    "none": None,
    "bool [B, 1, Nq, Nk]": torch.arange(50) < torch.tensor([30, 50])[:, None, None, None],
    "float [1, 1, Nq, Nk]": torch.randn(1, 1, 70, 50, generator=torch.Generator().manual_seed(1)),
    "float [B, H, Nq, Nk]": torch.randn(2, 4, 70, 50, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_comfyui_use_sage_attention(sage, layout, mask):
    """``--use-sage-attention``: asks the signature for ``attn_mask``, always passes ``smooth_k=False``, and takes every
    exception for a reason to run torch's attention, so one raised here would be a silent loss."""
    assert "attn_mask" in inspect.signature(sage.sageattn).parameters
    q, k, v = qkv(biased=True)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    options = {"is_causal": False, "tensor_layout": layout, "sm_scale": None, "smooth_k": False}
    if mask is not None:
        options["attn_mask"] = mask
    given = (q, k, v) if layout == "HND" else by_token(q, k, v)
    out = sage.sageattn(*given, **options)
    near(out if layout == "HND" else out.transpose(1, 2), want, l1=1e-5)  # ("auto" on a CPU: exact attention)


def test_comfyui_with_a_named_recipe():
    """Installed with a recipe of the user's: ComfyUI's ``smooth_k=False`` changes it, as it says."""
    q, k, v = qkv(biased=True)
    want = scaled_dot_product_attention(q, k, v)
    with install_as_sageattention("sage2_8b", on_emulation="allow"):
        from sageattention import sageattn

        near(sageattn(q, k, v, is_causal=False, tensor_layout="HND", sm_scale=None, smooth_k=False), want, l1=0.2)
        near(sageattn(q, k, v, is_causal=False, tensor_layout="HND", sm_scale=None), want)


KJ_MODES = {
    "auto": ("sageattn", {}),
    "fp16_cuda": ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp32"}),
    "fp16_triton": ("sageattn_qk_int8_pv_fp16_triton", {}),
    "fp8_cuda": ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp32"}),
    "fp8_cuda++": ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp16"}),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("mode", KJ_MODES)
def test_kjnodes(sage, mode, layout, mask):
    """Every mode passes ``attn_mask``, ``None`` too; float32 models come as float16."""
    name, options = KJ_MODES[mode]
    q, k, v = (t.half() for t in qkv())
    m = mask.half() if mask is not None and mask.dtype != torch.bool else mask
    want = scaled_dot_product_attention(q, k, v, attn_mask=m)
    given = (q, k, v) if layout == "HND" else by_token(q, k, v)
    out = getattr(sage, name)(*given, is_causal=False, attn_mask=m, tensor_layout=layout, **options)
    near(out if layout == "HND" else out.transpose(1, 2), want)


# ---- several GPUs

YUNCHANG = {
    "SAGE_AUTO": ("sageattn", {}),
    "SAGE_FP16": ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp32"}),
    "SAGE_FP16_TRITON": ("sageattn_qk_int8_pv_fp16_triton", {}),
    "SAGE_FP8": ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp32"}),
    "SAGE_FP8_SM90": ("sageattn_qk_int8_pv_fp8_cuda_sm90", {"pv_accum_dtype": "fp32+fp32"}),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", YUNCHANG)
def test_yunchang_in_a_ring(sage, kind, causal):
    """A partial function called in flash attention's words; two steps' (out, lse) merge to the whole answer."""
    name, options = YUNCHANG[kind]
    function = partial(getattr(sage, name), tensor_layout="NHD", return_lse=True, **options)
    q, k, v = qkv(lengths=(64, 64))
    words = {"dropout_p": 0, "softmax_scale": DIM**-0.5, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None}
    words["return_softmax"] = False
    if causal:
        out, lse = function(*by_token(q, k, v), causal=True, **words)
        near(out.transpose(1, 2), scaled_dot_product_attention(q, k, v, is_causal=True))
        assert lse.shape == (2, 4, 64)
        return
    parts = [function(*by_token(q, k[:, :, s], v[:, :, s]), causal=False, **words) for s in (slice(40), slice(40, 64))]
    (out_1, lse_1), (out_2, lse_2) = [(out.transpose(1, 2), lse[..., None]) for out, lse in parts]
    merged = out_1 - torch.sigmoid(lse_2 - lse_1) * (out_1 - out_2)
    near(merged, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_xdit(sage, is_causal):
    """HND without naming the layout, ``lse`` always: ``[B, H, S]``, natural logarithm."""
    q, k, v = qkv(lengths=(64, 64))
    out, lse = sage.sageattn(q, k, v, is_causal=is_causal, return_lse=True)
    near(out, scaled_dot_product_attention(q, k, v, is_causal=is_causal), l1=1e-5)
    logits = (q @ k.transpose(2, 3)) * DIM**-0.5
    if is_causal:
        logits = logits.masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf)
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("return_lse", [False, True])
def test_sglang_and_vllm_omni(sage, return_lse):
    q, k, v = by_token(*qkv(kv_heads=2))
    got = sage.sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=0.2, return_lse=return_lse)
    out = got[0] if return_lse else got
    near(out.transpose(1, 2), scaled_dot_product_attention(*by_token(q, k, v), scale=0.2, enable_gqa=True), l1=1e-5)
    assert not return_lse or got[1].shape == (2, 4, 70)


def test_sglang_packed_with_an_unused_tail(sage):
    """SGLang cuts a packed buffer itself: one document, unsqueezed."""
    q, k, v = (t[0].transpose(0, 1) for t in qkv(lengths=(64, 64)))
    out = sage.sageattn(*(t[:40][None] for t in (q, k, v)), tensor_layout="NHD", is_causal=False, sm_scale=DIM**-0.5)
    cut = [t[:40].transpose(0, 1)[None] for t in (q, k, v)]
    near(out.transpose(1, 2), scaled_dot_product_attention(*cut), l1=1e-5)


# ---- diffusers, and the habit of replacing torch's function


def test_as_torchs_own_function(sage, monkeypatch):
    """``F.scaled_dot_product_attention = sageattn``: torch's words, all by keyword."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sage.sageattn)
    q, k, v = qkv()
    mask = MASKS["bool [B, 1, Nq, Nk]"]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.2, enable_gqa=False
    )
    near(out, scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2), l1=1e-5)


DIFFUSERS = """
import lowbit_attention.compat.alias as alias
installed = alias.install_as_sageattention("sage2_8b", on_emulation="allow")
import sys
assert "torch" not in sys.modules
import torch
from torch.nn.functional import scaled_dot_product_attention
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
q, k, v = (torch.randn(1, 40, 4, 32) for _ in range(3))
want = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
for name in ("sage", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda",
             "_sage_qk_int8_pv_fp16_triton", "sage_varlen"):
    with attention_backend(name):
        out = dispatch_attention_fn(q, k, v)
    off = ((out - want).abs().mean() / want.abs().mean()).item()
    assert 0 < off < 0.06, (name, off)
    print(name)
"""


def test_diffusers_itself():
    """A fresh interpreter: the alias before torch and before diffusers, whose six ``sage`` backends then run by it."""
    pytest.importorskip("diffusers", minversion="0.42", exc_type=ImportError)
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "DIFFUSERS_ATTN_CHECKS": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DIFFUSERS], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6


PRESTARTUP = """
import sys
def execute(script):  # (as a custom node's prestartup_script.py is run: by itself, before anything else)
    exec(compile(open(script).read(), script, "exec"), {"__file__": script, "__name__": "prestartup"})
execute(sys.argv[1])
assert "torch" not in sys.modules and "numpy" not in sys.modules, "imported too early"
import importlib.util
assert importlib.util.find_spec("sageattention") is not None
assert "torch" not in sys.modules
import torch
from sageattention import sageattn
q = torch.randn(1, 2, 9, 8)
print(tuple(sageattn(q, q, q, is_causal=False, tensor_layout="HND", sm_scale=None, smooth_k=False).shape))
"""


def test_comfyuis_prestartup_script(tmp_path):
    script = tmp_path / "prestartup_script.py"
    script.write_text(
        "from lowbit_attention.compat.alias import install_as_sageattention\n\ninstall_as_sageattention()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", PRESTARTUP, str(script)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2, 9, 8)"


def test_the_page_runs(capsys):
    page = (Path(__file__).resolve().parents[3] / "docs/sageattention.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 3
    namespace = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/sageattention.md", "exec"), namespace)
    finally:
        namespace["alias"].remove()
    assert "runs: torch_sdpa with recipe exact" in capsys.readouterr().out
