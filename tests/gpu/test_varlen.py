"""Sequences packed one behind the other: each is what it is alone, and nobody reads their lengths."""

from itertools import accumulate

import pytest
import torch

from lowbit_attention import attention, attention_varlen, recipe

RECIPES = {
    "fast_8b": "attention_wgmma",
    "sage2_8b": "attention_wgmma",
    "sage2pp_8b": "attention_wgmma",
    "sage1": "attention_mma",
    "int8_fp16": "attention_mma",
    "hadamard_attn": "attention_mma",
}
SELF = ([300, 17, 1, 700, 128],) * 2
CROSS = [5, 0, 64, 200, 33], [129, 40, 0, 77, 1000]
ONE_ROW = [1] * 40, [257] * 40
CAUSAL = {
    "no": {},
    "bottom_right": {"is_causal": True},
    "top_left": {"is_causal": True, "causal_alignment": "top_left"},
}

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wants a Hopper GPU"
)


def cu(lengths, dtype=torch.int32):
    return torch.tensor([0, *accumulate(lengths)], device="cuda", dtype=dtype)


def packed(q_lengths, k_lengths, heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, tail=0, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def some(tokens, count, dim, bias):
        x = torch.randn(tokens + tail, count, dim, generator=g, device="cuda")
        return (x + bias * torch.randn(1, count, dim, generator=g, device="cuda")).to(dtype)

    return (
        some(sum(q_lengths), heads[0], dims[0], 0.0),
        some(sum(k_lengths), heads[1], dims[0], 2.0),
        some(sum(k_lengths), heads[1], dims[1], 1.0),
    )


def without_waiting(function, *arguments, **options):
    """Its answer; an error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def alone(name, q, k, v, q_lengths, k_lengths, **options):
    """Each sequence by a call of its own: output and lse of all."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype, device="cuda")
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, device="cuda")
    q_end = k_end = 0
    for rows, keys in zip(q_lengths, k_lengths, strict=True):
        mine, theirs = slice(q_end, q_end + rows), slice(k_end, k_end + keys)
        q_end, k_end = mine.stop, theirs.stop
        if rows and keys:
            one, its = attention(
                q[None, mine], k[None, theirs], v[None, theirs], recipe=name, layout="NHD", return_lse=True, **options
            )
            out[mine], lse[:, mine] = one[0], its[0]
    return out, lse


def check(name, q, k, v, lengths, **options):
    out, lse = without_waiting(
        attention_varlen, q, k, v, *map(cu, lengths), recipe=name, return_lse=True, on_emulation="error", **options
    )
    expected, its_lse = alone(name, q, k, v, *lengths, **options)
    # Sums of K's and V's means are taken in other splits, so that a mean's last bit differs, and with it a code here
    # and there: a step of 1/127 of a group in one product. Those are far below a rounding of the output to bf16.
    step = 2**-8 * v.float().abs().max()
    assert (out.float() - expected.float()).abs().max() <= step
    assert (out.bfloat16() != expected.bfloat16()).float().mean() < 0.02
    assert torch.equal(lse.isfinite(), its_lse.isfinite())
    assert torch.allclose(lse, its_lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("lengths", [SELF, CROSS, ONE_ROW], ids=["self", "cross", "one_row"])
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_its_sequences(name, lengths, causal):
    check(name, *packed(*lengths), lengths, **CAUSAL[causal])


@pytest.mark.parametrize("dims", [(64, 64), (72, 40), (128, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_head_dims_and_dtypes(name, dtype, dims):
    if "hadamard" in name and dims[0] == 72:
        pytest.skip("it rotates no 72 channels")
    check(name, *packed(*CROSS, dims=dims, dtype=dtype, heads=(3, 3)), CROSS, is_causal=True)


@pytest.mark.parametrize("name", ["fast_8b", "sage1"])
def test_long_and_many_sequences(name):
    g = torch.Generator().manual_seed(3)
    lengths = [int(n) for n in torch.randint(0, 40, (5000,), generator=g)]
    check(name, *packed(lengths, lengths, heads=(2, 1), dims=(64, 64)), (lengths, lengths))
    lengths = [9000, 3, 5000, 129]
    check(name, *packed(lengths, lengths, heads=(4, 1)), (lengths, lengths), is_causal=True)


@pytest.mark.parametrize("name", ["fast_8b", "sage2_8b", "sage1"])
def test_tokens_of_no_sequence_are_zeros_and_count_nowhere(name):
    q, k, v = packed(*SELF, tail=70)
    offsets = cu(SELF[0]) + 30  # 30 before the first, 40 behind the last
    poisoned = [t.clone() for t in (q, k, v)]
    for t in poisoned:
        t[:30], t[-40:] = torch.nan, torch.inf
    out, lse = without_waiting(attention_varlen, *poisoned, offsets, offsets, recipe=name, return_lse=True)
    assert (out[:30] == 0).all()
    assert (out[-40:] == 0).all()
    assert (lse[:, :30] == -torch.inf).all()
    assert (lse[:, -40:] == -torch.inf).all()
    inner = [t[30:-40] for t in (q, k, v)]
    expected, its_lse = attention_varlen(*inner, cu(SELF[0]), cu(SELF[0]), recipe=name, return_lse=True)
    assert torch.equal(out[30:-40], expected)
    assert torch.equal(lse[:, 30:-40], its_lse)


@pytest.mark.parametrize("name", ["fast_8b", "sage2pp_8b", "int8_fp16"])
def test_a_sequence_counts_in_no_other(name):
    q, k, v = packed(*SELF)
    offsets = cu(SELF[0])
    before = attention_varlen(q, k, v, offsets, offsets, recipe=name)
    begin, end = 318, 1018  # the fourth
    k[begin:end], v[begin:end] = torch.nan, 1e4
    after = attention_varlen(q, k, v, offsets, offsets, recipe=name)
    assert torch.equal(before[:begin], after[:begin])
    assert torch.equal(before[end:], after[end:])
    assert after[begin:end].isnan().all()


@pytest.mark.parametrize("name", ["fast_8b", "sage1"])
def test_a_graph_follows_the_lengths(name):
    q, k, v = packed(*SELF)
    total = sum(SELF[0])
    offsets = cu(SELF[0])
    attention_varlen(q, k, v, offsets, offsets, recipe=name)  # (compiled, loaded)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_varlen(q, k, v, offsets, offsets, recipe=name, is_causal=True)
    for lengths in ([1, 1, 1, 1, total - 4], [200, 0, 500, 0, 446], SELF[0]):
        offsets.copy_(cu(lengths))
        graph.replay()
        expected = attention_varlen(q, k, v, offsets, offsets, recipe=name, is_causal=True)
        assert torch.equal(out, expected), lengths


@pytest.mark.parametrize("name", ["fast_8b", "sage1"])
def test_offsets_that_are_wrong_read_and_write_nothing_else(name):
    q, k, v = packed(*SELF)
    total = len(q)
    for wrong in ([0, 900, 100, 1100, 50, total], [-7, 10, 2**31 - 1, 20, 5, -1], [total] * 6, [0] * 6):
        offsets = torch.tensor(wrong, device="cuda", dtype=torch.int32)
        attention_varlen(q, k, v, offsets, offsets, recipe=name)
        attention_varlen(q, k, v, cu(SELF[0]), offsets, recipe=name, is_causal=True)
    torch.cuda.synchronize()
    check(name, q, k, v, SELF)


def test_compiled_once_for_all_lengths():
    compiled = torch.compile(
        lambda q, k, v, c: attention_varlen(q, k, v, c, c, recipe="fast_8b", is_causal=True),
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = packed(*SELF)
    for lengths in (SELF[0], [1, 1, 1, 1, sum(SELF[0]) - 4]):
        expected = attention_varlen(q, k, v, cu(lengths), cu(lengths), recipe="fast_8b", is_causal=True)
        assert torch.equal(compiled(q, k, v, cu(lengths)), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_again_and_any_strides_and_offsets(name):
    q, k, v = packed(*CROSS, tail=9)
    first = attention_varlen(q, k, v, *map(cu, CROSS), recipe=name)
    apart = [t.new_zeros(t.shape[1], t.shape[0] + 3, t.shape[2])[:, :-3].transpose(0, 1) for t in (q, k, v)]
    for to, t in zip(apart, (q, k, v), strict=True):
        to.copy_(t)
    for _ in range(3):
        again = attention_varlen(*apart, cu(CROSS[0], torch.int64), cu(CROSS[1]), recipe=name)
        assert torch.equal(first, again)


def test_auto_takes_a_kernel_for_long_ones():
    lengths = [8192, 4096, 12000]
    q, k, v = packed(lengths, lengths, heads=(16, 16))
    out = without_waiting(attention_varlen, q, k, v, cu(lengths), cu(lengths))
    expected, _ = alone("fast_8b", q, k, v, lengths, lengths)
    assert (out.float() - expected.float()).abs().max() <= 2**-8 * v.float().abs().max()


def test_smoothed_queries_go_one_by_one():
    """A recipe that no kernel runs packed: each sequence is a call of its own, with what that gives."""
    q, k, v = packed(*SELF)
    out = attention_varlen(q, k, v, cu(SELF[0]), cu(SELF[0]), recipe=recipe("sage2_4b"))
    expected, _ = alone("sage2_4b", q, k, v, *SELF)
    assert torch.equal(out, expected)
