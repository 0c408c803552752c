"""Masks said in a few numbers mean what the tensor of every pair means, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch

import lowbit_attention as la
from lowbit_attention import ALiBi, BlockMask, InvalidArgumentError, KeyPadding, UnsupportedError, Window
from lowbit_attention.call.mask_types import from_text, tensors_of, to_text

B, HQ, HKV, NQ, NK, D = 2, 4, 2, 24, 40, 16


def tensors(layout: str = "HND") -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(B, HQ, NQ, D), (B, HKV, NK, D), (B, HKV, NK, D)]
    made = [torch.randn(shape) for shape in shapes]
    return [t.transpose(1, 2).contiguous() for t in made] if layout == "NHD" else made


def pairs(rule) -> torch.Tensor:
    """A tensor of every pair, from a rule on batch, head, query and key."""
    return torch.tensor(
        [[[[rule(b, h, i, j) for j in range(NK)] for i in range(NQ)] for h in range(HQ)] for b in range(B)]
    )


LENS = torch.tensor([NK, 7])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 2.0])
BLOCKS = torch.rand(B, 1, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.4
SHIFT = NK - NQ

CASES = {
    "padding": (KeyPadding(LENS), lambda b, h, i, j: j < int(LENS[b])),
    "padding, nobody": (KeyPadding(torch.tensor([-3, 0])), lambda b, h, i, j: False),
    "padding, longer than all": (KeyPadding(torch.tensor([NK + 5, NK])), lambda b, h, i, j: True),
    "window": (Window(5, 3), lambda b, h, i, j: -5 <= j - i - SHIFT <= 3),
    "window to the left": (Window(5), lambda b, h, i, j: j - i - SHIFT >= -5),
    "causal window": (Window(9, 0), lambda b, h, i, j: -9 <= j - i - SHIFT <= 0),
    "no window": (Window(), lambda b, h, i, j: True),
    "window of one": (Window(0, 0), lambda b, h, i, j: j == i + SHIFT),
    "alibi": (ALiBi(SLOPES), lambda b, h, i, j: float(-SLOPES[h] * abs(i + SHIFT - j))),
    "alibi by entry": (
        ALiBi(torch.stack([SLOPES, SLOPES.flip(0)])),
        lambda b, h, i, j: float(-(SLOPES if b == 0 else SLOPES.flip(0))[h] * abs(i + SHIFT - j)),
    ),
    "blocks": (BlockMask(BLOCKS, 8, 16), lambda b, h, i, j: bool(BLOCKS[b, 0, i // 8, j // 16])),
}


@pytest.mark.parametrize("recipe", ["exact", "sage2_8b"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_mask_of_every_pair(case, layout, recipe):
    mask, rule = CASES[case]
    q, k, v = tensors(layout)
    expected = la.attention(q, k, v, recipe=recipe, attn_mask=pairs(rule), layout=layout, return_lse=True)
    got = la.attention(q, k, v, recipe=recipe, attn_mask=mask, layout=layout, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        # (a mask of equal rows counts as key padding or not by its shape alone: then statistics differ in their order)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["padding", "window", "alibi", "blocks"])
def test_with_causality_both_hold(case):
    mask, rule = CASES[case]
    q, k, v = tensors()
    every = pairs(rule)
    seen = torch.ones(NQ, NK, dtype=torch.bool).tril(SHIFT)
    both = every & seen if every.dtype == torch.bool else every.masked_fill(~seen, -math.inf)
    got = la.attention(q, k, v, recipe="exact", attn_mask=mask, is_causal=True)
    torch.testing.assert_close(got, la.attention(q, k, v, recipe="exact", attn_mask=both))


@pytest.mark.parametrize("case", CASES)
def test_text_and_tensors_bring_it_back(case):
    mask, _ = CASES[case]
    again = from_text(to_text(mask), tensors_of(mask))
    assert type(again) is type(mask)
    for name, value in vars(mask).items():
        assert vars(again)[name] is value or vars(again)[name] == value


@pytest.mark.parametrize("case", ["padding", "causal window", "alibi", "blocks"])
def test_compiled_it_is_the_same(case):
    mask, _ = CASES[case]
    q, k, v = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: la.attention(q, k, v, recipe="sage2_8b", attn_mask=mask), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), la.attention(q, k, v, recipe="sage2_8b", attn_mask=mask))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: KeyPadding(torch.ones(2)),
            r"kv_lens must be an int32 or int64 tensor of shape \[B\], got torch.float32",
        ),
        (lambda: KeyPadding([3, 4]), "got list"),
        (lambda: Window(-1, 0), "left=-1 is neither None nor a number of tokens"),
        (lambda: Window(0, True), "right=True"),
        (lambda: Window(1.5), "left=1.5"),
        (lambda: ALiBi(torch.ones(4, dtype=torch.float64)), "slopes must be a float32 tensor"),
        (lambda: BlockMask(torch.ones(2, 2, dtype=torch.bool)), "four dimensions"),
        (lambda: BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0), "q_block=0 is no number of tokens"),
    ],
)
def test_what_cannot_be_a_mask(make, says):
    with pytest.raises(InvalidArgumentError, match=says):
        make()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (KeyPadding(torch.tensor([1, 2, 3])), "kv_lens has 3 lengths, and q has a batch of 2"),
        (ALiBi(torch.ones(3)), r"slopes of shape \(3,\), and q has a batch of 2 and 4 heads"),
        (BlockMask(torch.ones(1, 1, 2, 3, dtype=torch.bool), 8, 16), r"do not broadcast to \[2, 4, 3, 3\]"),
        (KeyPadding(torch.tensor([1, 2], device="meta")), "attn_mask is on meta, q on cpu"),
        ("causal", "KeyPadding, Window, ALiBi, BlockMask or None, got str"),
    ],
)
def test_what_does_not_fit_the_call(mask, says):
    with pytest.raises(InvalidArgumentError, match=says):
        la.attention(*tensors(), attn_mask=mask)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (
            Window(128, 0),
            r"tiled_exact: the window: written out as a tensor it takes 1.5 GB \(more than 1 GB is refused",
        ),
        (ALiBi(torch.ones(1)), r"tiled_exact: ALiBi: written out as a tensor it takes 11.9 GB"),
        (BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 40_000, 40_000), r"BlockMask: written out .* 1.5 GB"),
    ],
)
@pytest.mark.parametrize("recipe", ["exact", "auto"])
def test_what_would_take_gigabytes_is_refused_by_who_would_write_it_out(mask, says, recipe):
    q = torch.empty(1, 1, 1, 16).expand(1, 1, 40_000, 16)
    with pytest.raises(UnsupportedError, match=says):
        la.attention(q, q, q, recipe=recipe, attn_mask=mask)


def test_compiled_code_asks_the_machine_that_runs_it():
    """Traced on fake tensors, a kernel may read what would take gigabytes written out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 1, 40_000, 64, dtype=torch.bfloat16, device="meta")
        assert la.attention(q, q, q, recipe="sage2_8b", attn_mask=Window(128, 0)).shape == q.shape


def test_slopes_that_want_a_gradient_are_refused_as_masks_are():
    q, k, v = tensors()
    slopes = SLOPES.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="gradient"):
        la.attention(q, k, v, recipe="sage2_8b", attn_mask=ALiBi(slopes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qk_norm", (torch.ones(D), torch.ones(D))),
        ("rope", (torch.ones(NK, D), torch.zeros(NK, D))),
        ("out_dtype", torch.float32),
    ],
)
def test_what_is_not_built_says_so(name, value):
    with pytest.raises(UnsupportedError, match=f"{name}: not yet"):
        la.attention(*tensors(), **{name: value})


def test_pack_kv_says_so():
    _, k, v = tensors()
    with pytest.raises(UnsupportedError, match="pack_kv: not yet"):
        la.pack_kv(k, v, recipe="fast_8b")
