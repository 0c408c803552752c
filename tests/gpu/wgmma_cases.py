"""What the tests of the Hopper kernel share: inputs, cases, hostile memory, and how far two answers may be apart.

A helper, not a test. Nothing here needs a GPU before it is called.
"""

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch

from lowbit_attention import attention, compare, explain, recipe
from lowbit_attention.cuda.instances import HEAD_DIMS, MANIFEST, wgmma_config
from lowbit_attention.cuda.launch import cache
from lowbit_attention.cuda.packing import pack_kv
from lowbit_attention.machine import MACHINES
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.masks import LOG2E, Masking
from lowbit_attention.synthetic import make

DEVICE = "cuda"
KERNEL = "attention_wgmma"
MACHINE = MACHINES["sm_90a"]
GEOMETRY = MACHINE.geometry
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TESTED = {
    name: recipe(name)
    for name in (
        "sage2_8b",
        "sage2pp_8b",
        "fast_8b",
        "sage2_8b:smooth_v=true",
        "sage2_8b:smooth_k=false",
        "sage2pp_8b:keys_per_promotion=128,v_max=2.25",
    )
}

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def compile_everything():
    """Every instance that the tests use, side by side: one after the other would take minutes."""
    configs = (wgmma_config(r, dim) for r in TESTED.values() for dim in HEAD_DIMS)
    jobs = {str(i): i for i in (*MANIFEST, *(c.instance() for c in configs))}
    cache().get_all((i.source(), i.options()) for i in jobs.values())


# ---- inputs


@lru_cache(maxsize=4)
def _made(family, batch, heads, length, head_dim):
    return make(family, batch=batch, heads=heads, length=length, head_dim=head_dim, seed=length + head_dim)


def inputs(family="normal", dtype=torch.bfloat16, *, batch=1, heads=(4, 4), lengths=(300, 300), head_dims=(128, 128)):
    """Q, K and V of a synthetic family on the device; pairs are (Q, K), head_dims (K, V)."""
    (q_heads, kv_heads), (q_len, kv_len), (dim, v_dim) = heads, lengths, head_dims
    q, k, v = _made(family, batch, q_heads, max(lengths), dim)
    if v_dim != dim:
        v = _made(family, batch, q_heads, max(lengths), v_dim)[2]
    tensors = q[:, :, :q_len], k[:, :kv_heads, :kv_len], v[:, :kv_heads, :kv_len]
    return tuple(t.contiguous().to(DEVICE, dtype, copy=True) for t in tensors)


@dataclass(frozen=True)
class Case:
    """One call that is compared with the reference."""

    recipe: str
    dtype: str
    head_dims: tuple[int, int]
    heads: tuple[int, int]
    lengths: tuple[int, int]
    causal: str
    family: str

    def __str__(self):
        pairs = ("x".join(map(str, pair)) for pair in (self.head_dims, self.heads, self.lengths))
        return "-".join((self.recipe, self.dtype, *pairs, self.causal, self.family))

    def tensors(self):
        batch = 8 if self.lengths[0] <= 2 else 2 if self.heads[0] == 3 else 1  # (some rows more, where there are few)
        return inputs(
            self.family, DTYPES[self.dtype], batch=batch,
            heads=self.heads, lengths=self.lengths, head_dims=self.head_dims,
        )  # fmt: skip

    def options(self):
        """Of `attention`."""
        return {} if self.causal == "none" else {"is_causal": True, "causal_alignment": self.causal}

    def causal_offset(self):
        return {"none": None, "top_left": 0, "bottom_right": self.lengths[1] - self.lengths[0]}[self.causal]


FACTORS = {
    "recipe": tuple(TESTED),
    "dtype": tuple(DTYPES),
    "head_dims": ((64, 64), (128, 128), (40, 40), (72, 72), (96, 96), (36, 36), (64, 128), (128, 40)),
    "heads": ((8, 2), (4, 1), (3, 3)),
    "lengths": (
        (1, 1), (1, 4097), (2, 63), (63, 65), (64, 64), (65, 127), (127, 129), (129, 1000), (1000, 129), (997, 1009),
        (4097, 4097),
    ),
    "causal": ("none", "bottom_right", "top_left"),
    "family": ("normal", "qkv_bias", "sink", "outlier_tokens"),
}  # fmt: skip


def covering(times):
    """Cases such that any two values of any two factors meet at least ``times`` times; always the same ones."""
    generator, names = random.Random(0), tuple(FACTORS)

    def pairs(values):
        return list(itertools.combinations(((name, values[name]) for name in names), 2))

    columns = [[(name, value) for value in FACTORS[name]] for name in names]
    missing = [pair for a, b in itertools.combinations(columns, 2) for pair in itertools.product(a, b)]
    met, cases = Counter(), {}
    while missing := [pair for pair in missing if met[pair] < times]:
        tries = []
        for _ in range(20):
            values = {name: generator.choice(FACTORS[name]) for name in names} | dict(generator.choice(missing))
            gain = sum(met[pair] < times for pair in pairs(values))
            tries.append((gain, len(tries), values))
        best = max(t for t in tries if Case(**t[2]) not in cases)[2]
        cases[Case(**best)] = None
        met.update(pairs(best))
    return list(cases)


# ---- memory around the tensors


def views(x):
    """``[B, H, N, D]`` views equal to ``x``, in memory that holds NaN wherever ``x`` is not."""
    batch, heads, length, dim = x.shape

    def inside(shape, *index):
        big = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        view = big[index]
        view.copy_(x)
        return view

    def at(offset):
        flat = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device=x.device)
        view = flat[offset : offset + x.numel()].view(x.shape)
        view.copy_(x)
        return view

    every = slice(None)
    return {
        "nhd": x.transpose(1, 2).contiguous().transpose(1, 2),
        "offset": at(24),
        "misaligned": at(3),
        "channel slice": inside((batch, heads, length, dim + 24), every, every, every, slice(8, 8 + dim)),
        "odd channel slice": inside((batch, heads, length, dim + 5), every, every, every, slice(1, 1 + dim)),
        "surrounded": inside((batch + 1, heads + 2, length + 7, dim + 16), *(slice(s, -1) for s in (0, 1)),
                             slice(3, -4), slice(8, -8)),
        "every second token": inside((batch, heads, 2 * length, dim), every, every, slice(1, None, 2)),
        "every second channel": inside((batch, heads, length, 2 * dim), *(every,) * 3, slice(None, None, 2)),
        "channels outside": x.transpose(2, 3).contiguous().transpose(2, 3),
    }  # fmt: skip


# ---- answers


def run(q, k, v, r, **options):
    """The kernel's output and lse, and no other implementation's."""
    explanation = explain(q, k, v, recipe=r, return_lse=True, **options)
    assert explanation.implementation == KERNEL, str(explanation)
    return attention(q, k, v, recipe=r, return_lse=True, **options)


def same(a, b):
    """Outputs with their lse, bit for bit (a NaN of the same bits is equal to itself)."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def reference(q, k, v, r, *, sm_scale=None, causal_offset=None, fidelity="step"):
    """The emulation of the kernel's tiles and accumulators, with the kernel's own means."""
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    machine = replace(MACHINE, fidelity=fidelity)
    means = pack_kv(k, v, r).means()
    return emulate(q, k, v, r, sm_scale=scale, masking=Masking(causal_offset), machine=machine, means=means)


BASE_ERROR = 1.75
"""The kernel's logits are s · factor − m less up to this many units of s: its base, 1.5 · 2²³ · factor + m with
m ≤ 2²¹ · factor, is rounded to one ulp, and an ulp of 1.25 … 1.75 · 2²³ · factor is at most 1.75 · factor."""


def score_unit(packed, sm_scale):
    """The largest factor of one unit of s that a row meets, in base-2 logits, ``[B, Hq, Nq]``."""
    of_keys = packed.k_scale[..., packed.k_group].amax(dim=-1)  # (only groups that hold a key)
    of_keys = of_keys.repeat_interleave(packed.q.shape[1] // packed.k.shape[1], dim=1)
    return packed.q_scale[..., packed.q_group] * of_keys[..., None] * (abs(sm_scale) * LOG2E)


def _by_row(other, true):
    """Each row's relative L1."""
    return (other.double() - true.double()).abs().sum(-1) / true.double().abs().sum(-1)


def assert_agrees(out, lse, q, k, v, r, *, sm_scale=None, causal_offset=None):
    """The kernel's output and lse are the reference's.

    They differ by (a) the rounding of the output, (b) ``BASE_ERROR``, which changes P by up to ``direct``, and flips of
    single roundings of P to E4M3 by it and by ex2 (2 ulp): each moves one of many terms by the recipe's own rounding
    error, so all together stay below 5 % of that; (c) the sums: an FP16 factor of running FP16 sums (2⁻¹¹), and with
    the step fidelity the truncation of single products, about 2⁻¹² of a sum an instruction.
    """
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    slices, keys = q.shape[0] * q.shape[1], k.shape[2]
    fidelity = "instruction" if slices * keys <= 10_000 else "step"  # (by the time it takes)
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
    off = (_by_row(out, ref.out) - direct)[seen]
    worst = float(_by_row(ref.out, true)[seen].max())
    assert float(off.max()) <= torch.finfo(out.dtype).eps + worst + sums + floats + 1 / 16, (float(off.max()), worst)

    # lse: BASE_ERROR, and float32 sums of N terms and of q · k̄; of P rounded to E4M3, flips of a 16th of a term as well
    group = q.shape[1] // k.shape[1]
    terms = torch.zeros_like(ref.lse)
    if ref.packed.k_mean is not None:
        mean = ref.packed.k_mean.repeat_interleave(group, dim=1).abs()
        terms = torch.einsum("bhnd,bhd->bhn", q.float().abs() * abs(scale), mean)
    size = 1 + keys / 4096 + ref.lse.abs() + 2 * terms
    error, bound = (lse - ref.lse).abs()[seen], (direct + 1e-5 * size)[seen]
    if r.row_sum == "accumulator":
        assert float(error.mean()) <= float(bound.mean()) + 2.0**-9 + sums
        bound = bound + 2.0**-4
    assert (error <= bound).all(), float((error / bound).max())
