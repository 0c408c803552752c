"""What the tests of the Hopper kernel share: its cases, and how far two answers may be apart.

A helper, not a test. Nothing here needs a GPU before it is called.
"""

import math
from dataclasses import replace

import kernel_cases
import torch
from kernel_cases import CAUSAL, DTYPES, HARD_FAMILIES, HEADS, LENGTHS, by_row, mean_logits, score_unit

from lowbit_attention import attention, compare, explain, recipe
from lowbit_attention.backends.cuda.hopper import work_tiles_of
from lowbit_attention.backends.cuda.instances import HEAD_DIMS, MANIFEST, padded_head_dim, wgmma_config
from lowbit_attention.backends.cuda.launch import cache
from lowbit_attention.backends.cuda.packing import PackPlan, pack_kv
from lowbit_attention.backends.cuda.schedule import heads_side_by_side, sm_count
from lowbit_attention.call.masks import Masking
from lowbit_attention.call.request import make_request
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact

KERNEL = "attention_wgmma"
MACHINE = MACHINES["sm_90a"]
GEOMETRY = MACHINE.geometry
TESTED = {
    name: recipe(name)
    for name in (
        "sage2_8b",
        "sage2pp_8b",
        "fast_8b",
        "fast_8b:v_tile_means=false,smooth_v=true",
        "fast_8b:keys_per_promotion=384,promote_first_tile=false,softmax_max=restarted(20;4)",
        "fast_8b:keys_per_promotion=384,v_tile_means=false",
        "sage2_8b:smooth_v=true",
        "sage2_8b:smooth_k=false",
        "sage2_8b:k_sample=sampled(64)",
        "sage2pp_8b:keys_per_promotion=128,v_max=2.25",
        "sage2pp_8b:keys_per_promotion=256,p_max=112,v_max=2.25,row_sum=unrounded",
    )
}

FACTORS = {
    "recipe": tuple(TESTED),
    "dtype": tuple(DTYPES),
    "head_dims": kernel_cases.HEAD_DIMS,
    "heads": HEADS,
    "lengths": LENGTHS,
    "causal": CAUSAL,
    "family": HARD_FAMILIES,
}


def covering(times):
    """Cases of `FACTORS`."""
    return kernel_cases.covering(FACTORS, times)


def compile_everything():
    """Every instance that the tests use, side by side: one after the other would take minutes."""
    named = (i for i in MANIFEST if i.arch == "sm_90a")
    configs = (wgmma_config(r, dim, t) for r in TESTED.values() for dim in HEAD_DIMS for t in DTYPES.values())
    jobs = {str(i): i for i in (*named, *(c.instance() for c in configs))}
    cache().get_all((i.source(), i.options()) for i in jobs.values())


# ---- answers


def run(q, k, v, r, **options):
    """The kernel's output and lse, and no other implementation's."""
    explanation = explain(q, k, v, recipe=r, return_lse=True, **options)
    assert explanation.implementation == KERNEL, str(explanation)
    return attention(q, k, v, recipe=r, return_lse=True, **options)


def reference(q, k, v, r, *, sm_scale=None, causal_offset=None, fidelity="step"):
    """The emulation of the kernel's tiles and accumulators, with the kernel's own means."""
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    machine = replace(MACHINE, fidelity=fidelity)
    means = pack_kv(k, v, r).means()

    def emulated(key_splits):
        return emulate(
            q, k, v, r, sm_scale=scale, masking=Masking(causal_offset), machine=machine, means=means,
            key_splits=key_splits,
        )  # fmt: skip

    key_splits, rows = split_rows(q, k, v, r, causal_offset)
    result = emulated(1)
    if key_splits > 1:
        other = emulated(key_splits)
        out, lse = torch.where(rows[..., None], other.out, result.out), torch.where(rows, other.lse, result.lse)
        result = replace(result, out=out, lse=lse)
    return result


def split_rows(q, k, v, r, causal_offset):
    """Into how many parts the kernel splits the keys of some query rows, and of which (bool ``[B, Hq, Nq]``)."""
    (batch, heads, length, _), config = q.shape, wgmma_config(r, padded_head_dim(max(q.shape[3], v.shape[3])), q.dtype)
    request = make_request(
        q, k, v, None, r, None, is_causal=causal_offset is not None, bottom_right=True, return_lse=False, layout="HND"
    )
    index = q.device.index
    work, q_blocks = work_tiles_of(request, config, sm_count(index))
    pack = PackPlan.of(batch, k.shape[1], k.shape[2], k.shape[3], v.shape[3], r)
    section = heads_side_by_side(request, pack, index, equal=length % config.q_rows == 0)
    rows = torch.zeros(batch * heads, q_blocks, dtype=torch.bool)
    for item in range(work.whole, work.whole + work.tail):  # as `work_item` of csrc/common/work.cuh
        place = item % (section * q_blocks)
        head = item // (section * q_blocks) * section + place % section
        rows[head, q_blocks - 1 - place // section] = True
    rows = rows.repeat_interleave(config.q_rows, dim=1)[:, :length].reshape(batch, heads, length)
    return work.key_splits, rows.to(q.device)


BASE_ERROR = 1.75
"""The kernel's logits are s · factor − m less up to this many units of s: its base, 1.5 · 2²³ · factor + m with
m ≤ 2²¹ · factor, is rounded to one ulp, and an ulp of 1.25 … 1.75 · 2²³ · factor is at most 1.75 · factor."""


def assert_agrees(out, lse, q, k, v, r, *, sm_scale=None, causal_offset=None, alike=False, fidelity=None):
    """The kernel's output and lse are the reference's; ``alike``: many keys of a row have the same logit.

    ``fidelity``: the reference's; if not given, by the time that it takes.

    They differ by (a) the rounding of the output, (b) ``BASE_ERROR``, which changes P by up to ``direct``, and flips of
    single roundings of P to E4M3 by it and by ex2 (2 ulp): each moves one of many terms by the recipe's own rounding
    error, so all together stay below 5 % of that; (c) the sums: an FP16 factor of running FP16 sums (2⁻¹¹), and with
    the step fidelity the truncation of single products, about 2⁻¹² of a sum an instruction.
    """
    if (part := kernel_cases.seen_part(q, k, causal_offset)) is not None:
        first, end, offset = part
        assert (lse[:, :, :first] == -torch.inf).all()
        assert not out[:, :, :first].any()
        assert_agrees(
            out[:, :, first:], lse[:, :, first:], q[:, :, first:], k[:, :, :end], v[:, :, :end], r,
            sm_scale=sm_scale, causal_offset=offset, alike=alike, fidelity=fidelity,
        )  # fmt: skip
        return
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    slices, keys = q.shape[0] * q.shape[1], k.shape[2]
    fidelity = fidelity or ("instruction" if slices * keys <= 10_000 else "step")
    ref = reference(q, k, v, r, sm_scale=scale, causal_offset=causal_offset, fidelity=fidelity)
    true, _ = exact(q, k, v, sm_scale=scale, masking=Masking(causal_offset))
    seen = ref.lse > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen)
    assert not out[~seen].any()
    assert out.isfinite().all()
    if not seen.any():
        return

    interval = r.promotion_keys(GEOMETRY)
    sums = (interval > GEOMETRY.b_k) * 2.0**-11 + (fidelity == "step") * interval / 32 * 2.0**-12
    direct = math.log(2) * BASE_ERROR * score_unit(ref.packed, scale)
    floats = 2.0**-19  # float32 itself: l, 1 / l, log2 P_r rounded down
    method = compare(true, ref.out, rows=seen).l1
    rounding = compare(ref.out, ref.out.to(out.dtype), rows=seen).l1
    l1 = compare(ref.out, out, rows=seen).l1
    assert l1 <= 1.05 * rounding + float(direct[seen].mean()) + 0.05 * method + sums + floats, (l1, rounding, method)

    # no row is lost among the others: none is further off than the method's worst and one flip, 1 / 8 of half its sum
    off = (by_row(out, ref.out) - direct)[seen]
    worst = float(by_row(ref.out, true)[seen].max())
    assert float(off.max()) <= torch.finfo(out.dtype).eps + worst + sums + floats + 1 / 16, (float(off.max()), worst)

    # lse: BASE_ERROR, and float32 sums of N terms and of q · k̄; of P rounded to E4M3, flips of a 16th of a term as well
    size = 1 + keys / 4096 + ref.lse.abs() + 2 * mean_logits(q, ref.packed.k_mean, scale)
    error, bound = (lse - ref.lse).abs()[seen], (direct + 1e-5 * size)[seen]
    if r.row_sum == "accumulator":
        assert float(error.mean()) <= float(bound.mean()) + 2.0**-9 + sums
        if alike:
            # Equal P flip together, by a step of E4M3: an eighth of P, or 2⁻⁹ where P ≤ 2⁻⁶; the sum is P_r at least.
            # But only in rows whose P lies as near a boundary as BASE_ERROR reaches: emulated, 1 of 800 at most.
            flipped = error > bound + 2.0**-4
            assert int(flipped.sum()) <= error.numel() / 100, int(flipped.sum())
            bound = torch.where(flipped, bound + max(2.0**-3, keys * 2.0**-9 / r.p_max), bound + 2.0**-4)
        else:
            bound = bound + 2.0**-4
    assert (error <= bound).all(), float((error / bound).max())
