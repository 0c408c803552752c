"""Partial results merged are the attention over all keys."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit_attention import InvalidArgumentError, attention, merge_state

INF = math.inf


def parts(cut: int, dtype: torch.dtype = torch.float32, n: int = 48):
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 3, length, 16, dtype=dtype) for length in (20, n, n))
    both = [attention(q, k[:, :, s], v[:, :, s], recipe="exact", return_lse=True) for s in (slice(cut), slice(cut, n))]
    return both, attention(q, k, v, recipe="exact", return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [0, 1, 24, 47, 48])
def test_it_is_the_attention_over_all(cut, dtype):
    (first, second), (out, lse) = parts(cut, dtype)
    merged, merged_lse = merge_state(*first, *second)
    # parts and result are rounded to dtype once each: three half units in the last place of numbers up to 4
    tolerance = max(6 * torch.finfo(dtype).eps, 1e-6)
    assert merged.dtype == dtype
    assert merged_lse.dtype == torch.float32
    torch.testing.assert_close(merged, out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(merged_lse, lse, atol=2e-6, rtol=1e-6)


def test_a_part_that_saw_nothing_changes_no_bit():
    (first, _), _ = parts(24)
    nothing = torch.zeros_like(first[0]), torch.full_like(first[1], -INF)
    for merged in (merge_state(*first, *nothing), merge_state(*nothing, *first)):
        assert torch.equal(merged[0], first[0])
        assert torch.equal(merged[1], first[1])


def test_two_that_saw_nothing_are_nothing_and_not_nan():
    out, lse = torch.zeros(1, 1, 4, 8), torch.full((1, 1, 4), -INF)
    merged, merged_lse = merge_state(out, lse, out, lse)
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_what_a_part_without_weight_holds_does_not_matter():
    """A buffer nobody has written may hold NaN; its row saw no key."""
    (first, _), _ = parts(24)
    garbage = torch.full_like(first[0], math.nan), torch.full_like(first[1], -INF)
    merged, _ = merge_state(*first, *garbage)
    assert torch.equal(merged, first[0])


@pytest.mark.parametrize("shift", [-3e4, 3e4, 88.0, -104.0])
def test_large_and_small_logits(shift):
    out = torch.randn(1, 1, 4, 8)
    lse = torch.randn(1, 1, 4) + shift
    merged, merged_lse = merge_state(out, lse, out, lse)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse + math.log(2))


def test_many_parts_in_any_order():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (8, 64, 64))
    whole, whole_lse = attention(q, k, v, recipe="exact", return_lse=True)
    for order in (range(8), reversed(range(8)), (3, 1, 4, 0, 7, 6, 2, 5)):
        state = None
        for i in order:
            part = attention(q, k[:, :, 8 * i : 8 * i + 8], v[:, :, 8 * i : 8 * i + 8], recipe="exact", return_lse=True)
            state = part if state is None else merge_state(*state, *part)
        torch.testing.assert_close(state[0], whole, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(state[1], whole_lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o, s: (o, s.double(), o, s), "lse and other_lse must be float32"),
        (lambda o, s: (o, s, o.half(), s), "one shape and dtype"),
        (lambda o, s: (o, s, o[:, :1], s), "one shape and dtype"),
        (lambda o, s: (o, s[..., None], o, s), "must have out's shape without its last dimension"),
        (lambda o, s: (o, None, o, s), "lse must be a torch.Tensor, got NoneType"),
    ],
)
def test_what_does_not_fit(change, says):
    out, lse = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4)
    with pytest.raises(InvalidArgumentError, match=says):
        merge_state(*change(out, lse))
