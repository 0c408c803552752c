"""`compat.quant`: numbers times scales are what was given, in the original's shapes and orders."""

import math

import pytest
import torch

from lowbit_attention import InvalidArgumentError
from lowbit_attention.compat import quant

PACKERS = [quant.per_block_int8, quant.per_warp_int8, quant.per_thread_int8]
IDS = [f.__name__ for f in PACKERS]
SCALES = {  # scales of 200 queries and 150 keys a head, in tiles of 128 and 64
    "per_block_int8": (2, 3),
    "per_warp_int8": (8, 3),
    "per_thread_int8": (64, 12),
}


def qk(layout="HND", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 200, 32, generator=g).to(dtype), torch.randn(2, 2, 150, 32, generator=g).to(dtype) + 2
    return (q, k) if layout == "HND" else (q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous())


def of_token(name, which, n):
    """Which scale token ``n`` has, by the names alone."""
    if name == "per_thread_int8":
        return n // 32 * 8 + n % 8 if which == "q" else n // 64 * 4 + n % 8 // 2
    if name == "per_warp_int8" and which == "q":
        return n // 32
    return n // (128 if which == "q" else 64)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("packer", PACKERS, ids=IDS)
def test_numbers_times_scales(packer, layout):
    """Within half a step, and the largest of a group at 127: no other scale does both."""
    q, k = qk(layout)
    got = packer(q, k, tensor_layout=layout)
    assert [t.dtype for t in got] == [torch.int8, torch.float32, torch.int8, torch.float32]
    assert (got[1].shape, got[3].shape) == tuple(
        (2, h, n) for h, n in zip((4, 2), SCALES[packer.__name__], strict=True)
    )
    for which, x, numbers, scales in (("q", q, *got[:2]), ("k", k, *got[2:])):
        assert numbers.shape == x.shape
        assert numbers.is_contiguous()
        first, given = (t if layout == "HND" else t.transpose(1, 2) for t in (numbers, x))
        if which == "q" and packer is quant.per_block_int8:
            given = given * (32**-0.5 / math.log(2))
        group = torch.tensor([of_token(packer.__name__, which, n) for n in range(given.shape[2])])
        step = scales[:, :, group, None]
        assert ((first * step - given).abs() <= step * 0.5001).all()
        largest = torch.zeros_like(scales).scatter_reduce(
            2, group.expand(*first.shape[:2], -1), first.abs().amax(-1).float(), "amax"
        )
        assert (largest[:, :, group] == 127).all()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("packer", PACKERS, ids=IDS)
def test_the_mean_of_k_is_taken(packer, layout, keep):
    q, k = qk(layout)
    axis = 2 if layout == "HND" else 1
    km = k.mean(dim=axis, keepdim=True)
    want = packer(q, k - km, tensor_layout=layout)
    got = packer(q, k, km if keep else km.squeeze(axis), tensor_layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[2], packer(q, k, tensor_layout=layout)[2])


def test_sm_scale_is_part_of_per_block_only():
    q, k = qk()
    assert torch.allclose(quant.per_block_int8(q, k, sm_scale=1.0)[1], quant.per_block_int8(q, k)[1] * 32**0.5)
    assert torch.equal(quant.per_thread_int8(q, k, sm_scale=1.0)[1], quant.per_thread_int8(q, k)[1])


@pytest.mark.parametrize("smooth_v", [False, True])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_per_channel_fp8(layout, smooth_v):
    _, v = qk(layout, torch.bfloat16)
    numbers, scales, mean = quant.per_channel_fp8(v, layout, smooth_v=smooth_v)
    first = v.float() if layout == "HND" else v.float().transpose(1, 2)
    assert numbers.dtype == torch.float8_e4m3fn
    assert numbers.shape == ((2, 2, 32, 192) if layout == "HND" else (2, 32, 2, 192))  # padded to 3 · 64 tokens
    assert (scales.shape, scales.dtype) == ((2, 2, 32), torch.float32)
    by_head = (numbers if layout == "HND" else numbers.transpose(1, 2)).float()
    out = torch.empty_like(by_head)
    for place, token in enumerate((0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)):
        out[..., token::16] = by_head[..., place::16]
    assert (out[..., 150:] == 0).all()
    back = (out[..., :150] * scales[..., None]).transpose(2, 3)
    if smooth_v:
        assert torch.allclose(mean, first.mean(2))
        back = back + mean[:, :, None]
    else:
        assert mean is None
    assert ((back - first).abs() <= first.abs().amax(2, keepdim=True) / 16).all()
    assert (by_head.abs().amax(-1) == 448).all()
    assert quant.per_channel_fp8(v, layout, scale_max=2.25)[0].float().abs().max() == 2.25


def test_sub_mean():
    _, v = qk(dtype=torch.bfloat16)
    rest, mean = quant.sub_mean(v)
    assert (rest.dtype, mean.dtype, mean.shape) == (torch.float16, torch.bfloat16, (2, 2, 32))
    assert torch.equal(rest, (v.float() - mean.float()[:, :, None]).half())
    again, _ = quant.sub_mean(v.transpose(1, 2), "NHD")
    assert torch.equal(again, rest.transpose(1, 2))
    spread = torch.tensor([1e30, -1e30]).reshape(1, 1, 2, 1).bfloat16()
    assert quant.sub_mean(spread)[0].flatten().tolist() == [65504, -65504]


def test_nothing_is_not_nan():
    zero = torch.zeros(1, 1, 5, 16)
    for packer in PACKERS:
        for t in packer(zero, zero):
            assert t.float().isfinite().all()
        assert packer(zero[:, :, :0], zero)[1].shape[2] == 0
    assert (quant.per_channel_fp8(zero)[0].float() == 0).all()


WRONG = [
    ("per_block_int8", {"tensor_layout": "NHDD"}, "NHDD"),
    ("per_block_int8", {"BLKQ": 0}, "0 tokens"),
    ("per_warp_int8", {"WARPQ": 48}, "parts of 48"),
    ("per_thread_int8", {"sm_scale": math.nan}, "nan"),
    ("per_thread_int8", {"km": torch.zeros(3)}, r"km .* \[2, 2, 32\]"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_values(name, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        getattr(quant, name)(*qk(), **options)


def test_wrong_tensors():
    q, k = qk()
    with pytest.raises(InvalidArgumentError, match=r"q must be a tensor with 4 dimensions, got shape \(4, 200, 32\)"):
        quant.per_warp_int8(q[0], k)
    with pytest.raises(InvalidArgumentError, match="float64"):
        quant.per_warp_int8(q, k.double())
    with pytest.raises(InvalidArgumentError, match="scale_max=500"):
        quant.per_channel_fp8(k, scale_max=500)
    with pytest.raises(InvalidArgumentError, match="smooth_v"):
        quant.per_channel_fp8(k, smooth_v=1)
