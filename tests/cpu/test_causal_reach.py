"""S13: which recipes let later tokens reach the rows before them, by statistics that are taken over all tokens.

docs/numerics.md says it; here is what it says. Rows and tokens are tiles apart, so that no tile's own scale reaches.
"""

import pytest
import torch

from lowbit_attention import RECIPES, attention, recipe

ROWS, LATER = 64, 256
"""On sm_89 and sm_90a keys 0…127 and queries 0…127 share no tile with tokens from 256 on."""
APART = "smooth_k=false,v_granularity=per_channel_and_key_tile"
"""Every statistic is a tile's."""
CONFINED = {
    "exact": "exact",
    "sage2_8b": f"sage2_8b:{APART}",
    "sage2_4b": f"sage2_4b:{APART}",
    "int8_u8": f"int8_u8:{APART}",
    "int8_fp16": f"int8_fp16:{APART}",
    "hadamard_attn": "hadamard_attn:v_granularity=per_channel_and_key_tile",
    "per token": f"sage2_8b:{APART},q_granularity=per_token,k_granularity=per_token",
}
REACHING = {
    "the mean of K": "sage2_8b:v_granularity=per_channel_and_key_tile",
    "the mean of a sample of K": "sage2_8b:v_granularity=per_channel_and_key_tile,k_sample=sampled(32)",
    "V's scales": "sage2_8b:smooth_k=false",
    "the mean of V": f"sage2_8b:{APART},smooth_v=true",
    "SmoothQuant's factors": "smooth_attn:v_granularity=per_channel_and_key_tile",
    "one scale for K": f"sage2_8b:{APART},k_granularity=per_tensor",
    "one scale for Q": f"sage2_8b:{APART},q_granularity=per_tensor",
}


def first_rows(spec, like, later):
    """Output and lse of the first rows, causal; ``later`` multiplies and shifts what comes long after them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 384, 32, generator=g) for _ in range(3))
    for t in (q, k, v):
        t[:, :, LATER:] = t[:, :, LATER:] * later + (later - 1)
    options = {} if spec == "exact" else {"like": like}
    out, lse = attention(q, k, v, recipe=spec, is_causal=True, return_lse=True, **options)
    return torch.cat([out[:, :, :ROWS], lse[:, :, :ROWS, None]], dim=-1)


@pytest.mark.parametrize("like", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("name", CONFINED)
def test_s13_statistics_of_tiles_do_not_reach(name, like):
    """Two roundings of float32 are left where V's tiles have a common factor."""
    before, after = (first_rows(CONFINED[name], like, later) for later in (1.0, 100.0))
    torch.testing.assert_close(after, before, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("name", [*REACHING, *(n for n, r in RECIPES.items() if not r.is_exact)])
def test_s13_statistics_of_all_tokens_reach(name):
    spec = REACHING.get(name, name)
    before, after = (first_rows(spec, "sm_89", later) for later in (1.0, 100.0))
    assert (after - before).abs().max() > 2**-14
    recipe(spec)


@pytest.mark.parametrize(
    ("name", "first"),
    [("exact", 2**-10), ("sage1", 2**-10), ("int8_fp16", 2**-10), (f"sage2_8b:{APART}", 2**-10), ("sage2_8b", 0.0),
     ("sage2pp_8b", 0.0), ("int8_u8", 0.0), ("fast_8b", 0.0)],
)  # fmt: skip
def test_s13_a_small_v_before_a_large_one(name, first):
    """Row 0 sees V[0] alone. FP16 keeps its digits beside a V a million times as large; E4M3 and INT8 do not."""
    q, k, v = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    v[:, :, 0], v[:, :, 100] = 2.0**-10, 1024.0
    got = attention(q, k, v, recipe=name, is_causal=True)[0, 0, 0]
    torch.testing.assert_close(got, torch.full((16,), first), rtol=1e-3, atol=0)
