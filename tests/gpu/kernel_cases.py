"""What the tests of every attention kernel share: inputs, cases, hostile memory, equality bit for bit.

A helper, not a test. Nothing here needs a GPU before it is called.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from lowbit_attention.call.masks import LOG2E
from lowbit_attention.evaluation.synthetic import make

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = ((64, 64), (128, 128), (40, 40), (72, 72), (96, 96), (36, 36), (64, 128), (128, 40))
"""Of K and V."""
HEADS = ((8, 2), (4, 1), (3, 3))
"""Of Q and K."""
LENGTHS = (
    (1, 1), (1, 4097), (2, 63), (63, 65), (64, 64), (65, 127), (127, 129), (129, 1000), (1000, 129), (997, 1009),
    (4097, 4097),
)  # fmt: skip
"""Queries and keys."""
CAUSAL = ("none", "bottom_right", "top_left")
HARD_FAMILIES = ("normal", "qkv_bias", "sink", "outlier_tokens")

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


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


def covering(factors, times, possible=lambda values: True):
    """Cases such that any two values of any two factors meet at least ``times`` times; always the same ones.

    ``factors``: the values of each field of `Case`. ``possible`` says of the values of some fields whether they go
    together; any two that do must be part of a possible case.
    """
    generator, names = random.Random(0), tuple(factors)

    def pairs(values):
        return list(itertools.combinations(((name, values[name]) for name in names), 2))

    columns = [[(name, value) for value in factors[name]] for name in names]
    missing = [pair for a, b in itertools.combinations(columns, 2) for pair in itertools.product(a, b)]
    missing = [pair for pair in missing if possible(dict(pair))]
    met, cases = Counter(), {}
    while missing := [pair for pair in missing if met[pair] < times]:
        tries = []
        for _ in range(20):
            values = {name: generator.choice(factors[name]) for name in names} | dict(generator.choice(missing))
            if not possible(values):
                continue
            gain = sum(met[pair] < times for pair in pairs(values))
            tries.append((gain, len(tries), values))
        fresh = [t for t in tries if Case(**t[2]) not in cases]
        if not fresh:
            continue
        best = max(fresh)[2]
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


def soil(value):
    """Freed memory full of ``value``: what the allocator hands out next."""
    for size in (128, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
        blocks = [torch.full((size,), value, device=DEVICE) for _ in range(4)]
        del blocks


def far_apart(tensors, which):
    """Views equal to ``tensors``, 4.4 · 10⁹ elements from the first token (head, batch entry) to the last, NaN between.

    Of shapes ``[1, 2, 1100, 128]`` for token, ``[1, 2, 300, 128]`` for head, ``[2, 2, 300, 128]`` for batch.
    """
    shape, strides = FAR_SHAPES[which]
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    assert sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 1 << 32
    big = torch.full((4_500_000_000,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    far = []
    for number, t in enumerate(tensors):
        assert t.shape == shape
        far.append(big.as_strided(shape, strides, storage_offset=number * (128 if which == "token" else 1_000_000)))
        far[-1].copy_(t)
    return far


FAR_SHAPES = {
    "token": ((1, 2, 1100, 128), (8, 512, 4_000_000, 1)),
    "head": ((1, 2, 300, 128), (8, 4_400_000_000, 128, 1)),
    "batch": ((2, 2, 300, 128), (4_400_000_000, 38_400, 128, 1)),
}


# ---- answers


def same(a, b):
    """Outputs with their lse, bit for bit (a NaN of the same bits is equal to itself)."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def score_unit(packed, sm_scale):
    """The largest factor of one unit of s that a row meets, in base-2 logits, ``[B, Hq, Nq]``."""
    of_keys = packed.k_scale[..., packed.k_group].amax(dim=-1)  # (only groups that hold a key)
    of_keys = of_keys.repeat_interleave(packed.q.shape[1] // packed.k.shape[1], dim=1)
    return packed.q_scale[..., packed.q_group] * of_keys[..., None] * (abs(sm_scale) * LOG2E)


def by_row(other, true):
    """Each row's relative L1."""
    return (other.double() - true.double()).abs().sum(-1) / true.double().abs().sum(-1)


def mean_logits(q, k_mean, sm_scale):
    """Σ |sm_scale · q · k̄| over the channels, ``[B, Hq, Nq]``: what float32 sums of q · k̄ err in proportion to."""
    if k_mean is None:
        return torch.zeros(q.shape[:3], device=q.device)
    mean = k_mean.repeat_interleave(q.shape[1] // k_mean.shape[1], dim=1).abs()
    return torch.einsum("bhnd,bhd->bhn", q.float().abs() * abs(sm_scale), mean)


def seen_part(q, k, causal_offset):
    """What causality leaves of a call, if not all: the first row that sees a key, how many keys some row sees, and the
    offset of these. Kernels run this part alone, so that nothing else counts in means and scales."""
    if causal_offset is None:
        return None
    first, end = max(0, -causal_offset), min(k.shape[2], q.shape[2] + causal_offset)
    if (first == 0 and end == k.shape[2]) or first >= q.shape[2] or end <= 0:
        return None
    return first, end, causal_offset + first
