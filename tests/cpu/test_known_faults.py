"""Faults that were known, each with the right answer: who mends one takes its mark away.

S4, S5, S6: places that nobody sees; S14: a NaN that spreads; S9: packed sequences (mended). S11
(mended), S18: what other packages ask of the alias.
"""

import importlib

import pytest
import torch
from torch import Tensor

from lowbit_attention import attention, attention_varlen, compare, make_sdpa
from lowbit_attention.call.masks import Masking
from lowbit_attention.compat import install_as_sageattention
from lowbit_attention.compat.sageattention import sageattn
from lowbit_attention.reference.exact import exact

RECIPES = ["sage2_8b", "fast_8b", "sage2_4b"]


def known(case: str, what: str):
    return pytest.mark.xfail(strict=True, reason=f"{case}: {what}")


def qkv(q_len: int, kv_len: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, 64, generator=g) for n in (q_len, kv_len, kv_len)]


def with_garbage(x: Tensor, first: int, value: float) -> Tensor:
    x = x.clone()
    x[:, :, first:] = value
    return x


def unseen_change_nothing(call, masking: Masking, q: Tensor, k: Tensor, v: Tensor, first: int, rows: int) -> None:
    """The same numbers whatever the unseen tokens hold, and as near to exact attention as without them."""
    want, _ = exact(q, k, v, sm_scale=64**-0.5, masking=masking)
    answers = [call(q, with_garbage(k, first, value), with_garbage(v, first, value)) for value in (0.0, 50.0, 1e4)]
    for answer in answers[1:]:
        assert torch.equal(answer[:, :, :rows], answers[0][:, :, :rows])
    assert compare(want[:, :, :rows], answers[-1][:, :, :rows]).l1 < 0.3  # (4 bits; 8 bits have .04)


@pytest.mark.parametrize("name", RECIPES)
def test_s4_keys_that_a_mask_hides_from_every_query(name):
    q, k, v = qkv(64, 192)
    mask = torch.ones(64, 192, dtype=torch.bool).tril(64)
    unseen_change_nothing(
        lambda *t: attention(*t, recipe=name, attn_mask=mask), Masking(None, mask[None, None]), q, k, v, 128, 64
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("door", ["attention", "make_sdpa"])
def test_s5_keys_behind_top_left_causality(name, door):
    q, k, v = qkv(64, 192)
    call = {
        "attention": lambda *t: attention(*t, recipe=name, is_causal=True, causal_alignment="top_left"),
        "make_sdpa": lambda *t: make_sdpa(name)(*t, is_causal=True),
    }[door]
    unseen_change_nothing(call, Masking(0), q, k, v, 64, 64)


@pytest.mark.parametrize("name", RECIPES)
def test_s6_padded_tokens_of_self_attention(name):
    q, k, v = qkv(100, 100)
    see = torch.zeros(100, 100, dtype=torch.bool)
    see[:90, :90] = True
    want, _ = exact(q, k, v, sm_scale=64**-0.5, masking=Masking(None, see[None, None]))
    answers = []
    for value in (0.0, 50.0):
        padded = [with_garbage(t, 90, value) for t in (q, k, v)]
        answers.append(attention(*padded, recipe=name, attn_mask=see)[:, :, :90])
    assert torch.equal(*answers)
    assert compare(want[:, :, :90], answers[1]).l1 < 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_s14_a_nan_in_one_query(name):
    q, k, v = qkv(128, 128)
    want, _ = exact(q, k, v, sm_scale=64**-0.5)
    q[0, 0, 77, 3] = torch.nan
    got = attention(q, k, v, recipe=name)
    spoilt = got.isnan().any(dim=-1)
    assert spoilt.nonzero().tolist() == [[0, 0, 77]]
    assert compare(want, got, ~spoilt).l1 < 0.3


@pytest.mark.parametrize("name", ["sage2_8b", "exact"])
def test_s9_a_tail_that_belongs_to_no_sequence(name):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, 32, generator=g) for _ in range(3))
    cu = torch.tensor([0, 12, 30], dtype=torch.int32)
    out, lse = attention_varlen(q, k, v, cu, cu, recipe=name, return_lse=True)
    want, want_lse = attention_varlen(q[:30], k[:30], v[:30], cu, cu, recipe=name, return_lse=True)
    assert torch.equal(out[:30], want)
    assert not out[30:].any()
    assert torch.equal(lse[:, :30], want_lse)


def test_s9_a_longest_length_that_is_a_tensor():
    q = torch.randn(30, 2, 32, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 12, 30], dtype=torch.int32)
    longest = torch.tensor(18)
    got = attention_varlen(q, q, q, cu, cu, longest, longest, recipe="sage2_8b")
    assert torch.equal(got, attention_varlen(q, q, q, cu, cu, 18, 18, recipe="sage2_8b"))


NAMES = [
    ("sageattention.core", "get_cuda_arch_versions"), ("sageattention.core", "SM89_ENABLED"),
    ("sageattention.core", "per_thread_int8_triton"), ("sageattention.quant", "per_block_int8"),
    ("sageattention", "__file__"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_s11_names_that_consumers_import(module, name):
    with install_as_sageattention():
        assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("options", [{"enable_gqa": False}, {"smooth_k": False}, {"return_softmax": False}])
def test_s11_arguments_that_consumers_pass(options):
    q = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    got = sageattn(q, q, q, **options)
    assert compare(exact(q, q, q, sm_scale=32**-0.5)[0], got).l1 < 0.1


@known("S18", "a tensor that a collective still fills is refused, not waited for")
def test_s18_a_tensor_that_is_still_under_way():
    functional = pytest.importorskip("torch.distributed._functional_collectives")
    q = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    under_way = functional.AsyncCollectiveTensor(q)
    for call in (sageattn, lambda *t: attention(*t, recipe="sage2_8b"), make_sdpa("sage2_8b")):
        assert torch.equal(call(q, under_way, under_way), call(q, q, q))
