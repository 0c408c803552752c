"""What the tests of `attention_mma` share: its instances and cases, and how far two answers may be apart.

A helper, not a test. Nothing here needs a GPU before it is called.

On a Hopper GPU the kernel is run directly, because `attention` prefers the Hopper kernel for some recipes.
"""

import itertools
import math
from dataclasses import dataclass, replace

import kernel_cases
import pytest
import torch
from kernel_cases import CAUSAL, DTYPES, HARD_FAMILIES, HEADS, LENGTHS, by_row, mean_logits, same, score_unit

from lowbit_attention import compare, recipe
from lowbit_attention.backends.cuda import mma, smooth_q
from lowbit_attention.backends.cuda.instances import (
    HEAD_DIMS,
    MANIFEST,
    MMA_RECIPES,
    mma_config,
    pack_instance,
    padded_head_dim,
    smooth_q_instance,
)
from lowbit_attention.backends.cuda.kernel import _behind_blind_rows, _seen_part
from lowbit_attention.backends.cuda.launch import cache
from lowbit_attention.backends.cuda.mma import MmaAttention
from lowbit_attention.backends.cuda.packing import pack_kv
from lowbit_attention.call.masks import Masking
from lowbit_attention.call.request import make_request
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.quantize import Means
from lowbit_attention.reference.rotation import hadamard_size

ARCH = "sm_90"
MACHINE = MACHINES["sm_80"]  # as `MmaAttention().machine` says on a Hopper GPU: Ada's tiles, FP8 made of FP16
GEOMETRY = MACHINE.geometry
NAMED = {name: recipe(name) for name in MMA_RECIPES}
TESTED = NAMED | {
    name: recipe(name)
    for name in (
        "sage2_8b:smooth_v=true",
        "sage2_8b:smooth_k=false",
        "sage2_8b:row_sum=unrounded,q_granularity=per_block",
        "sage2_8b:smooth_q=true,rotation=hadamard",
        "sage2pp_8b:row_sum=unrounded,q_granularity=per_warp,k_granularity=per_block",
        "sage2_4b:smooth_q=false",
        "sage2_4b:k_sample=sampled(64)",
        "sage2pp_4b:q_granularity=per_block,k_granularity=per_warp",
        "int8_fp16:smooth_q=true",
    )
}
"""The named recipes and every option that the kernel has, in all."""
FEW = {n: NAMED[n] for n in ("sage1", "sage2_8b", "sage2pp_4b", "rotated_4b", "int8_fp16")}
"""Every kind of Q·K and of P·V once."""


# ---- the kernels


class Changed(MmaAttention):
    """The kernel, its plans made with other constants of `cuda.mma` and `cuda.smooth_q`."""

    def __init__(self, int4_mma=None, **constants):
        super().__init__(int4_mma)
        self._constants = constants

    def make_plan(self, request, recipe, packing):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._constants.items():
                patch.setattr(mma if hasattr(mma, name) else smooth_q, name, value)
            return super().make_plan(request, recipe, packing)


def careful(int4_mma=None):
    """The kernel that always takes the careful way."""
    return Changed(int4_mma, _LARGEST_FAST_FACTOR={8: 0.0, 4: 0.0})


INT8, INT4 = MmaAttention(), MmaAttention(int4_mma=True)
"""4-bit numbers in INT8 lanes (the default on a Hopper GPU), and through the INT4 MMA."""
CAREFUL = {INT8: careful(), INT4: careful(int4_mma=True)}


def kernels_for(r):
    """The kernels that a recipe is tested with."""
    return (INT8, INT4) if r.qk_bits == 4 else (INT8,)


def compile_everything():
    """Every instance that the tests use, side by side: one after the other would take minutes."""
    instances = [i for i in MANIFEST if i.arch == ARCH]
    for r, dim, int4 in itertools.product(TESTED.values(), HEAD_DIMS, (False, True)):
        config = mma_config(r, dim, ARCH, int4)
        instances += [config.instance(), *(pack_instance(dim, t, ARCH, config.form) for t in DTYPES.values())]
        instances += [smooth_q_instance(dim, t, ARCH) for t in DTYPES.values()] if r.smooth_q else []
    jobs = {str(i): i for i in instances}
    cache().get_all((i.source(), i.options()) for i in jobs.values())


# ---- cases


def fits(r, head_dims):
    """Whether the kernel has a rotation for these head dimensions."""
    return r.rotation == "none" or hadamard_size(head_dims[0]) == padded_head_dim(max(head_dims))


def _possible(values):
    """Whether the values of some of a case's fields go together."""
    return {"recipe", "head_dims"} - values.keys() != set() or fits(TESTED[values["recipe"]], values["head_dims"])


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
    return kernel_cases.covering(FACTORS, times, _possible)


# ---- answers


def request_for(q, k, v, r, *, is_causal=False, causal_alignment="bottom_right", layout="HND", return_lse=True):
    """What `attention` would ask for; all tensors ``[B, H, N, D]``, also for NHD."""
    return make_request(
        q, k, v, None, r, None,
        is_causal=is_causal, bottom_right=causal_alignment != "top_left", return_lse=return_lse, layout=layout,
    )  # fmt: skip


def run(q, k, v, r, *, kernel=INT8, sm_scale=None, **options):
    """One kernel's output and lse (``None`` if not asked for)."""
    request = request_for(q, k, v, r, **options)
    assert kernel.not_supported_reasons(request, r) == ()
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    out, lse = kernel.run(q, k, v, None, scale, request, r)
    return (out if options.get("layout") == "NHD" else out.contiguous()), lse


def answers(q, k, v, r, *, carefully=False, **options):
    """Output and lse; of a 4-bit recipe both kernels', which must be equal bit for bit."""
    found = [run(q, k, v, r, kernel=CAREFUL[n] if carefully else n, **options) for n in kernels_for(r)]
    assert all(same(other, found[0]) for other in found[1:]), "the INT4 MMA gives other bits than INT8 lanes"
    return found[0]


def in_spoilt_memory(q, k, v, r, *, kernel=INT8, sm_scale=None, garbage=0xFF, **options):
    """Output, lse and q̄ (``None`` without smooth Q) of a call whose workspace begins full of ``garbage``."""
    request = request_for(q, k, v, r, **options)
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    first, end, seen = _seen_part(request) if request.is_causal else (0, k.shape[2], request)
    if seen is not request:  # (causality leaves a part, which alone is run)
        part = q[:, :, first:], k[:, :, :end], v[:, :, :end]
        out, lse, mean = in_spoilt_memory(*part, r, kernel=kernel, sm_scale=scale, garbage=garbage, is_causal=True)
        return *_behind_blind_rows(first, out, lse), mean
    plan = kernel.plan(request, r)
    memory = torch.full((plan.workspace_size,), garbage, dtype=torch.uint8, device=q.device)
    out, lse = kernel.run_in(memory, q, k, v, scale, plan)
    mean = None
    if r.smooth_q:
        shape = (*q.shape[:2], plan.smooth_q.query_tiles, plan.config.head_dim)
        scratch = memory[plan.packing.plan.layout.size :]
        mean = scratch[: 4 * math.prod(shape)].view(torch.float32).reshape(shape)[..., : q.shape[3]]
    return out.contiguous(), lse, mean


def packed_tiles(k, v, r, kernel=INT8):
    """K and V as the kernel packs them."""
    config = mma_config(r, padded_head_dim(max(k.shape[3], v.shape[3])), ARCH, True if kernel is INT4 else None)
    return pack_kv(k, v, r, config.form, ARCH)


def kernel_means(q, k, v, r):
    """k̄, v̄ and q̄ as the kernel computes them."""
    means = packed_tiles(k, v, r).means()
    return Means(k=means.k, v=means.v, q=in_spoilt_memory(q, k, v, r)[2])


def reference(q, k, v, r, *, sm_scale=None, causal_offset=None, fidelity="step", means=None):
    """The emulation of the kernel's tiles and accumulators, with the kernel's own means."""
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    return emulate(
        q, k, v, r, sm_scale=scale, masking=Masking(causal_offset), machine=replace(MACHINE, fidelity=fidelity),
        means=kernel_means(q, k, v, r) if means is None else means,
    )  # fmt: skip


def assert_packed(packed, ref):
    """Integers, E4M3 or FP16 numbers and scales are the reference's, bit for bit."""
    for name, ours, theirs in (
        ("k", packed.k, ref.k),
        ("k_scale", packed.k_scale, ref.k_scale),
        ("v", packed.v, ref.v),
        ("v_scale", packed.v_scale, ref.v_scale[:, :, 0]),
    ):
        assert torch.equal(ours.float(), theirs), (name, int((ours.float() != theirs).sum()))
    assert packed.padding_is_zero


# ---- how far two answers may be apart


def most_units(r):
    """By how many units of a score the fast way may move a logit against another one of its row.

    A unit is q_scale · k_scale · |sm_scale| · log2 e. What is added to s · unit, 1.5 · 2²³ · unit less the row's base,
    is rounded down to a multiple of its ulp; with |s| ≤ 2²¹ it lies in 1.25 … 1.75 · 2²³ · unit, where an ulp is at
    most 1.75 units. It is the same for all keys of a K group and tile, and another for the next. The row's base itself
    is rounded down, too: that all of the row's keys have in common. Smooth Q puts ΔS, up to 2²¹ units more, in the same
    place (an ulp of at most 2 units), rounds it to a whole unit, and takes 1 / unit to 2⁻²³ of up to 2²¹ units.
    """
    return 2.0 + 0.5 + 0.25 if r.smooth_q else 1.75


def has_fast_tiles(k):
    """The last tile always takes the careful way."""
    return k.shape[2] > GEOMETRY.b_k


@dataclass(frozen=True)
class Judge:
    """How far a kernel may be from the reference ``ref``, which is ``true`` but for the method's error."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    r: object
    scale: float
    causal_offset: int | None

    def __post_init__(self):
        slices, keys = self.q.shape[0] * self.q.shape[1], self.k.shape[2]
        fidelity = "instruction" if slices * keys <= 4_000 else "step"  # (by the time it takes)
        means = kernel_means(self.q, self.k, self.v, self.r)
        ref = self._reference(self.r, means, fidelity)
        true, _ = exact(self.q, self.k, self.v, sm_scale=self.scale, masking=Masking(self.causal_offset))
        for name, value in (("ref", ref), ("true", true), ("means", means), ("seen", ref.lse > -torch.inf)):
            object.__setattr__(self, name, value)

    def _reference(self, r, means, fidelity="step"):
        return reference(
            self.q, self.k, self.v, r,
            sm_scale=self.scale, causal_offset=self.causal_offset, fidelity=fidelity, means=means,
        )  # fmt: skip

    def rounding_of_p(self, carefully):
        """The relative L1 that rounding P adds to the output, or more: at most the method's own.

        At 4 bits the method's is mostly Q's and K's. There the part is what the reference changes by if all P are
        smaller by 3.7 %, which cancels but for their rounding. They are then a third to a half of a step from where
        they were, and the difference has √2 times the error's size or more. (It also takes the row's largest P from
        P_r, which is no rounding's victim, to the middle between two E4M3 numbers, the worst that can happen to it.)
        """
        method = compare(self.true, self.ref.out, rows=self.seen).l1
        if self.r.pv_format == "fp16":
            return min(method, 2.0**-11)
        if self.r.qk_bits == 8 or carefully or not has_fast_tiles(self.k):
            return method
        smaller = self.r.replace(p_max=self.r.p_max * 431.5 / 448)
        other = self._reference(smaller, self.means)
        return compare(self.ref.out, other.out, rows=self.seen).l1 / math.sqrt(2)

    def shifts(self, carefully):
        """By how much a row's logits may be apart from the reference's, relative to each other: direct, float32's.

        The latter: the base to 2⁻²³ of the largest logit twice, ex2 to 2 ulp, ΔS as a float32 sum of products in
        another order (16 · 2⁻²⁴ of their magnitudes: the root of their number times 2⁻²⁴, and no luck).
        """
        direct = math.log(2) * most_units(self.r) * score_unit(self.ref.packed, self.scale)
        if carefully or not has_fast_tiles(self.k):
            direct = torch.zeros_like(direct)
        inside = self.ref.lse
        packed = self.ref.packed
        if packed.k_mean is not None:
            group = self.q.shape[1] // self.k.shape[1]
            mean = packed.k_mean.repeat_interleave(group, dim=1)
            inside = inside - torch.einsum("bhnd,bhd->bhn", self.q.float() * self.scale, mean)
        return direct, 2.0**-22 * (8 + inside.abs()) + 2.0**-20 * self.mean_parts()

    def mean_parts(self):
        """At most Σ |sm_scale · q̄ · (k − k̄)| of a row, ``[B, Hq, Nq]``: zeros without smooth Q."""
        packed = self.ref.packed
        if packed.q_mean is None:
            return torch.zeros(self.q.shape[:3], device=self.q.device)
        largest = packed.k_smooth.abs().amax(dim=2).repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        parts = torch.einsum("bhtd,bhd->bht", packed.q_mean.abs() * abs(self.scale), largest)
        return parts.repeat_interleave(GEOMETRY.b_q, dim=2)[:, :, : self.q.shape[2]]

    def sums(self):
        """What the sums may differ by: FP16 sums of other roundings of P; FP32 sums that an MMA truncates at 2⁻²³."""
        in_mma = self.k.shape[2] / 16 * 2.0**-22 + 2.0**-19  # (2⁻¹⁹: l, 1 / l, log2 P_r rounded down)
        return in_mma + (self.r.accumulator in ("fp8_f16", "fp16")) * 2.0**-11

    def check(self, out, lse, *, carefully):
        """``out`` and ``lse`` of the kernel are the reference's.

        With shifts of the logits d, P errs by d itself, and a share d / step of its roundings falls the other way,
        each by a step: √(d · step) of L1 where errors add like random numbers, and never more than half a step (when
        half of them do). A step is √12 of the rounding's error. A quarter is added for the samples' size.
        """
        ref, seen = self.ref, self.seen
        assert torch.equal(lse == -torch.inf, ~seen)
        assert not out[~seen].any()
        assert out.isfinite().all()
        if not seen.any():
            return
        direct, floats = self.shifts(carefully)
        d, p = float((direct + floats)[seen].mean()), self.rounding_of_p(carefully)
        flips = 1.25 * min(math.sqrt(math.sqrt(12) * d * p), math.sqrt(3) * p)
        rounding = compare(ref.out, ref.out.to(out.dtype), rows=seen).l1
        l1 = compare(ref.out, out, rows=seen).l1
        bound = 1.05 * rounding + d + flips + self.sums()
        assert l1 <= bound, {"l1": l1, "bound": bound, "rounding": rounding, "shift": d, "flips": flips, "p": p}

        # no row is lost among the others: none is further off than the method's worst and some flips of largest terms
        off = (by_row(out, ref.out) - direct - floats)[seen]
        worst, few = float(by_row(ref.out, self.true)[seen].max()), 1 / 8 if float(direct.max()) > 2.0**-6 else 1 / 16
        assert float(off.max()) <= torch.finfo(out.dtype).eps + worst + self.sums() + few, (float(off.max()), worst)
        self.check_lse(lse, direct, floats)

    def check_lse(self, lse, direct, floats):
        """The shifts; sums of N terms and of q · k̄ in float32; the row sum's P, if it sums rounded ones.

        A P rounded otherwise changes a term by a 16th at the most; on average flips leave the sum alone, but for the
        largest term's, which the fast way may take from P_r, that every format has, to any number: 2⁻⁵ on average.
        """
        size = 1 + self.k.shape[2] / 4096 + self.ref.lse.abs()
        size = size + 2 * mean_logits(self.q, self.ref.packed.k_mean, self.scale)
        error, bound = (lse - self.ref.lse).abs()[self.seen], (direct + floats + 1e-5 * size)[self.seen]
        if self.r.row_sum == "accumulator":
            coarse = float(direct.max()) > 2.0**-6  # a shift that takes P_r to another E4M3 number, 1 / 32 below
            assert float(error.mean()) <= float(bound.mean()) + (2.0**-5 if coarse else 2.0**-9) + self.sums()
            bound = bound + 2.0**-4
        assert (error <= bound).all(), float((error / bound).max())


def assert_agrees(q, k, v, r, *, sm_scale=None, is_causal=False, causal_alignment="bottom_right"):
    """Every kernel that has the recipe gives the reference's numbers, in the fast and in the careful way.

    Returns what the fast way gave.
    """
    scale = 1 / math.sqrt(q.shape[3]) if sm_scale is None else sm_scale
    offset = {False: None, True: k.shape[2] - q.shape[2] if causal_alignment != "top_left" else 0}[is_causal]
    options = {"sm_scale": scale, "is_causal": is_causal, "causal_alignment": causal_alignment}
    if (part := kernel_cases.seen_part(q, k, offset)) is not None:
        first, end, _ = part  # (as many rows as keys: both alignments are one)
        seen = q[:, :, first:], k[:, :, :end], v[:, :, :end]
        for kernel in kernels_for(r):
            out, lse = run(q, k, v, r, kernel=kernel, **options)
            assert not out[:, :, :first].any()
            assert (lse[:, :, :first] == -torch.inf).all()
            assert same(
                (out[:, :, first:], lse[:, :, first:]), run(*seen, r, kernel=kernel, sm_scale=scale, is_causal=True)
            )
        assert_agrees(*seen, r, sm_scale=scale, is_causal=True)
        return answers(q, k, v, r, **options)
    judge = Judge(q, k, v, r, scale, offset)
    for kernel in kernels_for(r):
        assert_packed(packed_tiles(k, v, r, kernel), judge.ref.packed)
        ordinary = run(q, k, v, r, kernel=kernel, **options)
        assert same(in_spoilt_memory(q, k, v, r, kernel=kernel, **options)[:2], ordinary)
    fast = answers(q, k, v, r, **options)
    judge.check(*fast, carefully=False)
    judge.check(*answers(q, k, v, r, carefully=True, **options), carefully=True)
    return fast
