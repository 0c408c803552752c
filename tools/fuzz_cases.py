"""Random calls of ``scaled_dot_product_attention``: shapes, strides, dtypes, masks, flags. Each has a number.

A case is a function of (profile, seed, number) alone. Its inputs are made in float64 on the CPU, rounded to its dtype,
and laid out in memory in one of many ways, NaN all around. `fuzz_check` says what the answer must be.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FAMILIES = ("normal", "biased", "loud", "sink", "constant", "zero", "large", "tiny")
RANDOM_FAMILIES = ("normal", "biased", "loud")
"""Families whose rounding errors are independent of each other; the others get worst-case tolerances."""
LAYOUTS = ("plain", "by_token", "offset", "channel_slice", "channels_outside", "every_second", "expanded")


@dataclass(frozen=True)
class Profile:
    """What is drawn: recipes in turn, and how large."""

    recipes: tuple[tuple[str, str | None], ...]
    """Recipe and ``like``, in turn by case number."""
    lengths: tuple[int, int]
    """The usual and the largest length."""
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    masked: float
    refused: float
    """Shares of the cases: with a mask, and of the documented refusals."""
    mask_kinds: tuple[str, ...]
    most_logits: int
    """Longer sequences are shortened until a call has no more; the oracle holds them all."""


PROFILES = {
    "cpu": Profile(
        recipes=(
            ("exact", None), ("sage2_8b", None), ("int8_fp16", None), ("sage2_8b", "sm_90a"), ("sage2pp_8b", None),
            ("fast_8b", "sm_90a"), ("sage1", None), ("auto", None),
        ),
        lengths=(24, 200),
        head_dims=(1, 3, 8, 8, 16, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256),
        dtypes=("fp32", "fp32", "bf16", "fp16"),
        masked=0.45,
        refused=0.03,
        mask_kinds=("bool", "bool", "padding", "float", "float_inf"),
        most_logits=4_000_000,
    ),
    "gpu": Profile(
        recipes=(("sage2_8b", None), ("sage2pp_8b", None), ("fast_8b", None)),
        lengths=(300, 2000),
        head_dims=(1, 8, 33, 40, 64, 64, 72, 80, 96, 128, 128, 128),
        dtypes=("bf16", "bf16", "fp16", "fp32"),
        masked=0.3,
        refused=0.01,
        mask_kinds=("bool", "bool", "padding"),  # (float masks on kernels: tests/gpu/test_masks.py)
        most_logits=16_000_000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call. Shapes are those of the arguments; layouts and families are of (query, key, value)."""

    profile: str
    seed: int
    number: int
    recipe: str
    like: str | None
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    layouts: tuple[str, str, str]
    dtype: str
    family: str
    mask_shape: tuple[int, ...] | None
    mask_kind: str
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    needs_grad: bool

    @property
    def refusal(self) -> str | None:
        """Part of the reason for which the call must go to torch, by the documents; ``None`` if it must not."""
        if self.recipe == "auto":
            return "recipe auto" if self.profile == "cpu" and not self.needs_grad else "grad"
        if self.needs_grad:
            return "gradients"
        if self.recipe == "exact":
            return None
        if self.dtype == "fp64":
            return "float64"
        dim = max(self.shapes[0][-1], self.shapes[2][-1])
        return f"head_dim {dim} is above 256" if dim > 256 else None

    def command(self) -> str:
        """How to see it again."""
        return f"python tools/fuzz.py --profile {self.profile} --seed {self.seed} --only {self.number}"


def make_case(profile: str, seed: int, number: int) -> Case:
    """Case ``number``."""
    p = PROFILES[profile]
    r = random.Random(f"{profile}-{seed}-{number}")
    recipe, like = p.recipes[number % len(p.recipes)]
    dtype, needs_grad, dim = r.choice(p.dtypes), False, r.choice(p.head_dims)
    v_dim = dim if r.random() < 0.8 else r.choice(p.head_dims)
    if r.random() < p.refused:
        kind = r.choice(("fp64", "grad", "head_dim"))
        dtype, needs_grad = ("fp64" if kind == "fp64" else dtype), kind == "grad"
        dim, v_dim = (264, 264) if kind == "head_dim" else (dim, v_dim)
    q_len, kv_len = _length(r, p), _length(r, p)
    if r.random() < 0.4:
        kv_len = q_len
    gqa = r.random() < 0.25
    lead, kv_lead = _leads(r, gqa)
    slices = math.prod(lead[0]) * (1 if gqa else math.prod(kv_lead[0]))  # (or fewer)
    while slices * q_len * kv_len > p.most_logits:
        q_len, kv_len = -(-q_len // 2), -(-kv_len // 2)
    shapes = (*lead[0], q_len, dim), (*kv_lead[0], kv_len, dim), (*kv_lead[1], kv_len, v_dim)
    layouts = tuple(r.choice(LAYOUTS) if r.random() < 0.6 else "plain" for _ in range(3))
    if profile == "gpu" and dim > 256:  # torch runs these, and its kernel reads odd views at misaligned addresses
        layouts = ("plain", "plain", "plain")
    is_causal = r.random() < 0.35
    masked = r.random() < p.masked and not (is_causal and r.random() < 0.7)
    outer: Sequence[int] = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *(shape[: -3 if gqa else -2] for shape in shapes)
    )
    full = (*outer, *(lead[0][-1:] if gqa else ()))
    case = Case(
        profile=profile,
        seed=seed,
        number=number,
        recipe=recipe,
        like=like,
        shapes=shapes,
        layouts=(layouts[0], layouts[1], layouts[2]),
        dtype=dtype,
        family=r.choice(FAMILIES) if r.random() < 0.4 else "normal",
        mask_shape=_mask_shape(r, (*full, q_len, kv_len)) if masked else None,
        mask_kind=r.choice(p.mask_kinds),
        is_causal=is_causal,
        scale=None if r.random() < 0.6 else r.choice((0.05, 0.3, 1.0, 0.0, -0.2)),
        enable_gqa=gqa,
        needs_grad=needs_grad,
    )
    if profile == "gpu" and case.needs_grad and case.mask_shape:
        # (torch runs these, too, and its kernel with a mask reads so, and one that repeats along the keys: torch 2.11)
        whole = (*case.mask_shape[:-1], kv_len)
        return replace(case, layouts=("plain", "plain", "plain"), mask_shape=whole)
    return case


def _length(r: random.Random, p: Profile) -> int:
    usual, largest = p.lengths
    x = r.random()
    if x < 0.01:
        return 0
    if x < 0.1:
        return 1
    return r.randint(1, usual if x < 0.9 else largest)


Lead = tuple[int, ...]


def _leads(r: random.Random, gqa: bool) -> tuple[tuple[Lead], tuple[Lead, Lead]]:
    """Leading dimensions of query, and of key and value: usually [B, H], sometimes fewer, more or broadcast ones."""
    batch, heads = r.choice((1, 1, 2, 2, 3)), r.choice((1, 2, 3, 4))
    if gqa:
        group = r.choice((1, 2, 3, 4))
        outer = (batch,) if r.random() < 0.9 else (2, batch)
        return ((*outer, heads * group),), ((*outer, heads), (*outer, heads))
    x = r.random()
    if x < 0.75:
        return ((batch, heads),), ((batch, heads), (batch, heads))
    if x < 0.80:
        return ((),), ((), ())
    if x < 0.85:
        return ((heads,),), ((heads,), (heads,))
    if x < 0.90:
        return ((2, batch, heads),), ((2, batch, heads), (2, batch, heads))
    if x < 0.92:
        return ((0, heads),), ((0, heads), (0, heads))
    return (_ones(r, (batch, heads)),), (_ones(r, (batch, heads)), _ones(r, (batch, heads)))


def _ones(r: random.Random, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if r.random() < 0.3 else n for n in shape)


def _mask_shape(r: random.Random, full: Sequence[int]) -> tuple[int, ...]:
    """A shape that broadcasts to ``full``, of at least two dimensions."""
    shape = _ones(r, full)
    return shape[-2:] if r.random() < 0.3 else shape


# ---- tensors


def tensors(case: Case, device: str) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value as the case wants them, and the mask."""
    g = torch.Generator().manual_seed(hash((case.seed, case.number)) & 0x7FFFFFFF)
    made = []
    for index, (shape, layout) in enumerate(zip(case.shapes, case.layouts, strict=True)):
        values = _family(torch.randn(shape, generator=g, dtype=torch.float64), index, case, g)
        t = _laid_out(values.to(DTYPES[case.dtype]).to(device), layout)
        made.append(t.detach().requires_grad_(case.needs_grad and index == 0))
    return made, _mask(case, g, device)


def _family(x: Tensor, index: int, case: Case, g: torch.Generator) -> Tensor:
    chosen = case.number // 8 % 3 == index
    channel = torch.randn(x.shape[-1], generator=g, dtype=torch.float64)
    if case.family == "biased":
        return x + channel * (0, 4, 2)[index]
    if case.family == "loud":
        return x * (4, 1, 1)[index]
    if case.family == "sink" and index == 1 and x.shape[-2]:
        x[..., 0, :] *= 6
    if case.family == "constant" and chosen:
        return torch.ones_like(x) * channel
    if case.family == "zero" and chosen:
        return torch.zeros_like(x)
    if case.family == "large" and index == 2:
        return x * (1e3 if case.dtype == "fp16" else 1e30)
    if case.family == "tiny":
        return x * ((1e-3 if case.dtype == "fp16" else 1e-12) if index == 2 or chosen else 1)
    return x


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """A view equal to ``t`` (or, expanded, to its first entry) in memory that holds NaN wherever ``t`` is not."""
    *lead, length, dim = t.shape

    def inside(shape: Sequence[int], *index: slice) -> Tensor:
        big = torch.full(tuple(shape), torch.nan, dtype=t.dtype, device=t.device)
        view = big[index]
        view.copy_(t)
        return view

    if layout == "by_token" and lead:
        return t.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "offset":
        big = torch.full((t.numel() + 13,), torch.nan, dtype=t.dtype, device=t.device)
        return big[13:].view(t.shape).copy_(t)
    if layout == "channel_slice":
        return inside((*lead, length, dim + 5), *(slice(None),) * (len(lead) + 1), slice(2, 2 + dim))
    if layout == "channels_outside":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every_second":
        return inside((*lead, 2 * length, dim), *(slice(None),) * len(lead), slice(1, None, 2), slice(None))
    if layout == "expanded" and lead and lead[0]:
        return t[:1].expand(t.shape)
    return t


def _mask(case: Case, g: torch.Generator, device: str) -> Tensor | None:
    if case.mask_shape is None:
        return None
    shape = case.mask_shape
    share = (0.2, 0.5, 0.9)[case.number % 3]
    visible = torch.rand(shape, generator=g) < share
    if case.mask_kind == "padding":
        visible = (torch.arange(shape[-1]) < max(1, int(share * shape[-1]))).expand(shape)
    elif case.number % 4 == 0 and shape[-2]:
        visible[..., 0, :] = False  # a row that sees nothing
    if case.mask_kind in ("bool", "padding"):
        return visible.to(device)
    bias = torch.randn(shape, generator=g) * 2
    if case.mask_kind == "float_inf":
        bias = bias.masked_fill(~visible, -torch.inf)
    return bias.to(DTYPES[case.dtype]).to(device)
