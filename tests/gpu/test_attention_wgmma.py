"""The Hopper kernel's numbers: the reference's with the same tiles and sums, and the method's own error, not more."""

import math

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import DTYPES, hopper_only, inputs
from wgmma_cases import BASE_ERROR, GEOMETRY, TESTED, assert_agrees, covering, reference, run, split_rows

from lowbit_attention import compare, recipe
from lowbit_attention.backends.cuda import hopper, schedule
from lowbit_attention.call.masks import LOG2E, Masking
from lowbit_attention.evaluation.synthetic import FAMILIES
from lowbit_attention.recipes.options import RestartedMax
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.quantize import pack

pytestmark = hopper_only

EVERY_RECIPE = pytest.mark.parametrize("r", TESTED.values(), ids=TESTED)
PLAIN = pytest.mark.parametrize("r", [TESTED[n] for n in ("sage2_8b", "sage2pp_8b", "fast_8b")], ids=str)
RAW = recipe("sage2_8b:smooth_k=false")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


# ---- against the reference


@pytest.mark.parametrize("case", covering(3), ids=str)
def test_it_is_the_reference(case):
    """Any two of recipe, dtype, widths, heads, lengths, causality and family of inputs meet in three cases or more."""
    r, (q, k, v) = TESTED[case.recipe], case.tensors()
    out, lse = run(q, k, v, r, **case.options())
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_agrees(out, lse, q, k, v, r, causal_offset=case.causal_offset())


@EVERY_RECIPE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_of_rows_than_sms(r, causal, head_dim):
    """512 work tiles: each thread block has several, and its rings of stages go on from one to the next."""
    q, k, v = inputs("qkv_bias", batch=4, heads=(16, 4), lengths=(1000, 777), head_dims=(head_dim, head_dim))
    out, lse = run(q, k, v, r, is_causal=causal)
    assert_agrees(out, lse, q, k, v, r, causal_offset=777 - 1000 if causal else None)


@pytest.fixture
def every_key_split(monkeypatch):
    """Keys are split wherever SMs are left, however few they are."""
    monkeypatch.setattr(schedule, "_SPLIT_COST", -1e6)
    hopper.KERNEL._plans.clear()
    yield
    hopper.KERNEL._plans.clear()


SPLIT = [
    TESTED["fast_8b"],
    recipe("fast_8b:softmax_max=running"),
    recipe("fast_8b:promote_first_tile=false,softmax_max=restarted(20;4)"),
]


@pytest.mark.parametrize("r", SPLIT, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 72])
@pytest.mark.parametrize("lengths", [(192, 129), (70, 300), (500, 1024), (193, 2500), (1000, 4001)], ids=str)
@pytest.mark.parametrize("family", ["qkv_bias", "sink", "outlier_tokens"])
@pytest.mark.usefixtures("every_key_split")
def test_splits_along_the_keys(r, head_dim, lengths, family):
    q, k, v = inputs(family, batch=1, heads=(4, 2), lengths=lengths, head_dims=(head_dim, head_dim))
    assert split_rows(q, k, v, r, None)[0] > 1
    out, lse = run(q, k, v, r)
    assert_agrees(out, lse, q, k, v, r)
    assert all(torch.equal(x, y) for x, y in zip(run(q, k, v, r), (out, lse), strict=True))


SINKS = {  # tokens of 2700: 21 tiles and a bit; intervals of fast_8b begin with tiles 0, 1, 9, 17
    "inside": (700,),
    "where an interval begins": (9 * 128 + 5,),
    "at a tile's ends": (4 * 128 - 1, 6 * 128),
    "two neighbours": (500, 520, 640),
    "three neighbours, on to the next interval": (7 * 128, 8 * 128, 9 * 128),
    "last": (2699,),
    "everywhere": (3, 300, 1000, 1100, 1300, 2100, 2600),
}


def with_sinks(tokens, seeing, dtype, head_dim, queries=300):
    """Normal inputs whose queries that are ``seeing`` find ``tokens`` 10 nats above the others; their V is small."""
    made = inputs("normal", heads=(4, 2), lengths=(queries, 2700), head_dims=(head_dim, head_dim))
    q, k, v = (t.float() for t in made)
    index = list(tokens)
    q[..., 0] = torch.where(seeing, 8.0, 0.0)
    k[..., 0] = 0.0
    k[:, :, index] *= 0.1
    k[:, :, index, 0] = 1.25 * math.sqrt(head_dim)
    v[:, :, index] *= 0.01
    return tuple(t.to(dtype) for t in (q, k, v))


@pytest.mark.parametrize("tokens", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("rows", ["all", "two of a warp", "one warp of a warpgroup", "every other pair"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (128, "fp32")])
def test_tiles_that_jump(tokens, rows, causal, head_dim, dtype):
    """Warps decide for themselves, while their MMAs are those of four; what two rows see makes no warp jump."""
    row = torch.arange(300, device="cuda")
    seeing = {
        "all": row >= 0, "two of a warp": row % 16 % 11 == 2, "one warp of a warpgroup": row // 16 % 4 == 1,
        "every other pair": row % 2 == 0,
    }[rows]  # fmt: skip
    q, k, v = with_sinks(tokens, seeing, DTYPES[dtype], head_dim)
    r = TESTED["fast_8b"]
    out, lse = run(q, k, v, r, is_causal=causal)
    assert_agrees(out, lse, q, k, v, r, causal_offset=2400 if causal else None)
    other, _ = run(q, k, v, r.replace(softmax_max=RestartedMax(20.0, 4.0)), is_causal=causal)
    true, _ = exact(q, k, v, sm_scale=1 / math.sqrt(head_dim), masking=Masking(2400 if causal else None))
    assert compare(true, out).l1 <= 1.05 * compare(true, other).l1


@pytest.mark.parametrize("tokens", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("queries", [300, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.usefixtures("every_key_split")
def test_tiles_that_jump_where_keys_are_split(tokens, queries, head_dim):
    """Each part's first tile has an interval of its own; a warp with one row never jumps after that."""
    seeing = torch.ones(queries, dtype=torch.bool, device="cuda")
    q, k, v = with_sinks(tokens, seeing, torch.bfloat16, head_dim, queries)
    r = TESTED["fast_8b"]
    assert split_rows(q, k, v, r, None)[0] > 1
    out, lse = run(q, k, v, r)
    assert_agrees(out, lse, q, k, v, r)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_tail_waves_keys_are_split(dtype):
    """Some blocks of rows whole and some along the keys, as the plan has it; again and again on the same packed K."""
    heads = schedule.sm_count(torch.cuda.current_device()) // 4 + 10  # 4 blocks of rows each, so that some 40 are left
    q, k, v = inputs("normal", dtype, batch=1, heads=(heads, heads), lengths=(700, 4000), head_dims=(128, 128))
    r = TESTED["fast_8b"]
    key_splits, rows = split_rows(q, k, v, r, None)
    assert key_splits > 1
    assert 0 < int(rows.sum()) < rows.numel()
    out, lse = run(q, k, v, r)
    assert_agrees(out, lse, q, k, v, r)
    alone = hopper.KERNEL.kernel_alone(q, k, v, r)
    for _ in range(3):
        assert torch.equal(alone(), out)


@PLAIN
@pytest.mark.parametrize("factor", [-1.0, 0.0, 1e-3, 16.0, -16.0])
def test_other_scales_of_the_logits(r, factor):
    q, k, v = inputs("qkv_bias", lengths=(300, 500))
    scale = factor / math.sqrt(128)
    out, lse = run(q, k, v, r, sm_scale=scale)
    assert_agrees(out, lse, q, k, v, r, sm_scale=scale)


@PLAIN
@pytest.mark.parametrize("size", [1e-35, 1e-32, 1e-29, 1e-27, 1e-24])
@pytest.mark.parametrize("largest", [0.5, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_so_small_that_their_factors_have_no_inverse(r, size, largest, head_dim):
    """One key of ordinary size sets the maximum of a row far above all others', whose K is down to denormal.

    Those have the logit 0, or what ``BASE_ERROR`` makes of it, so all are rounded alike.
    """
    q, k, v = inputs("normal", torch.bfloat16, heads=(2, 2), lengths=(200, 1100), head_dims=(head_dim, head_dim))
    k = (k.double() * size).bfloat16()
    k[:, :, 3] = largest * q[:, :, 5]
    out, lse = run(q, k, v, r)
    assert_agrees(out, lse, q, k, v, r, alike=True)


@pytest.mark.parametrize("length", [1, 64, 65, 100, 128, 1000, 3000])
@pytest.mark.parametrize("head_dim", [64, 128])
@EVERY_RECIPE
def test_the_sums_are_the_cards(r, head_dim, length):
    """Without logits every P is P_r, so nothing but the sums of P·V is left: they are the accumulator model's exactly.

    The row sum adds N / 16 times four equal numbers, so it errs by N / 16 · 2⁻²⁴ at the most, and so does the
    reference's; log2 P_r < 16 is rounded down (11 · 2⁻²⁴ of P), ex2 errs by 2 ulp (4 · 2⁻²⁴), and 1 / l, δ_V and v̄ are
    some roundings more.
    """
    q, k, v = inputs("v_mean", torch.float32, heads=(2, 2), lengths=(70, length), head_dims=(head_dim, head_dim))
    out, lse = run(q, k, v, r, sm_scale=0.0)
    ref = reference(q, k, v, r, sm_scale=0.0, fidelity="instruction")
    error = (out - ref.out).abs() / ref.out.abs().amax(dim=(0, 1, 2))
    assert float(error.max()) <= (length / 8 + 24) * 2.0**-24
    assert float((lse - ref.lse).abs().max()) <= (length / 8 + 24) * 2.0**-24 + 2.0**-22 * math.log(length + 1)


# ---- Q, which is quantised inside the kernel


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("name", ["sage2_8b", "sage2pp_8b"])  # Q from shared memory, and from registers
@pytest.mark.parametrize("sign", [1, -1])
def test_the_integers_of_q(dtype, head_dim, name, sign):
    """One key, e_c in head c, the same Q in every head: lse is one channel's logit, which only its integer q̂ makes.

    K̂ = 127 · e_c and δ_K = fl(1 / 127), so s = 127 · q̂ and lse = ln 2 · (s · factor − at most ``BASE_ERROR`` units of
    s): divided by ln 2 · factor · 127 it is less than 0.02 from q̂.
    """
    r = recipe(f"{name}:smooth_k=false")
    q = inputs("outlier_tokens", dtype, heads=(1, 1), lengths=(333, 333), head_dims=(head_dim, head_dim))[0]
    q[:, :, 64:80] *= 30  # other scales from group to group
    q[:, :, 3], q[:, :, 11] = 0, 0  # rows 3 and 11 share a scale: a group of zeros
    heads = q.expand(1, head_dim, -1, -1)
    k = torch.eye(head_dim, dtype=dtype, device=q.device)[None, :, None]
    scale = sign / math.sqrt(head_dim)
    _, lse = run(heads, k, torch.ones_like(k), r, sm_scale=scale)

    ref = pack(q.float(), k[:, :1].float(), k[:, :1].float(), r, GEOMETRY, None)
    delta_k = torch.tensor(1.0) / torch.tensor(127.0)
    factor = ref.q_scale[0, 0, ref.q_group] * float(delta_k) * abs(scale) * LOG2E  # [Nq]
    found = lse[0] / (math.log(2) * factor * 127)  # [channel, Nq]
    integers = sign * ref.q[0, 0].T
    assert float((found - integers).abs().max()) < BASE_ERROR / 127 + 0.006  # (2 · 2⁻²⁴ · 127² units of s, too)
    assert torch.equal(found.round().clamp(-127, 127), integers)
    assert int(integers.abs().max()) == 127


# ---- against exact attention


@PLAIN
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_errs_no_more_than_the_method(family, r, causal, head_dim):
    """Against float64: 5 % more than the emulation, which the kernel's rounding of logits and ex2 may cost at most, and
    the rounding of the output. (In `step` fidelity a drifting V errs half as much as on the card.)"""
    q, k, v = inputs(family, lengths=(1500, 1500), head_dims=(head_dim, head_dim))
    offset = 0 if causal else None
    out, lse = run(q, k, v, r, is_causal=causal)
    ref = reference(q, k, v, r, causal_offset=offset, fidelity="instruction")
    true, true_lse = exact(q, k, v, sm_scale=1 / math.sqrt(head_dim), masking=Masking(offset))
    rounding = compare(true, true.to(q.dtype)).l1
    assert compare(true, out).l1 <= 1.05 * compare(true, ref.out).l1 + rounding
    assert compare(true, out).cos_sim >= compare(true, ref.out).cos_sim - 1e-4
    theirs, ours = ((x.double() - true_lse).abs().mean() for x in (ref.lse, lse))
    assert float(ours) <= 1.05 * float(theirs) + 2e-4 * float(true_lse.abs().mean())
