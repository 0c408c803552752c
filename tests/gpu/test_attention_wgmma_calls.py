"""Calls of the Hopper kernel: memory, strides, streams, threads, graphs, refusals. The numbers never depend on them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import FAR_SHAPES, far_apart, hopper_only, inputs, same, soil, views
from wgmma_cases import KERNEL, TESTED, assert_agrees, run

from lowbit_attention import UnsupportedError, attention, attention_varlen, compare, explain, recipe
from lowbit_attention.backends.cuda import hopper, launch, packing
from lowbit_attention.backends.cuda import kernel as host
from lowbit_attention.backends.cuda.jit import cache as cache_module
from lowbit_attention.backends.cuda.jit.cache import CaptureError, KernelCache
from lowbit_attention.call.memo import IdentityMemo, Memo
from lowbit_attention.call.request import make_request

pytestmark = hopper_only

SAGE = TESTED["sage2_8b"]
SMOOTH = TESTED["sage2_8b:smooth_v=true"]
PLAIN = pytest.mark.parametrize("r", [TESTED[n] for n in ("sage2_8b", "sage2pp_8b", "fast_8b")], ids=str)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


def busy():
    """More work than the card has multiprocessors, ragged, grouped heads."""
    return inputs("qkv_bias", batch=2, heads=(16, 4), lengths=(1500, 1111))


# ---- memory


@PLAIN
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 64), (40, 36)])
def test_every_element_is_written_and_none_is_read_before(r, head_dims):
    q, k, v = inputs("qkv_bias", heads=(4, 2), lengths=(333, 257), head_dims=head_dims)
    before = [t.clone() for t in (q, k, v)]
    answers = []
    for garbage in (torch.nan, 1e30, -torch.inf, 0.0):
        soil(garbage)
        answers.append(run(q, k, v, r, is_causal=True))
    assert all(t.isfinite().all() for t in (answers[0][0], answers[0][1][:, :, 333 - 257 :]))
    assert all(same(answer, answers[0]) for answer in answers[1:])
    assert all(torch.equal(t, b) for t, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 64), (40, 33)])
def test_strides_change_nothing(head_dims, dtype):
    """Q, K and V as views of every kind, in memory that is NaN all around them."""
    q, k, v = inputs("qkv_bias", dtype, batch=2, heads=(4, 2), lengths=(200, 300), head_dims=head_dims)
    expected = run(q, k, v, SMOOTH, is_causal=True)
    assert expected[0].isfinite().all()
    q_views, k_views, v_views = views(q), views(k), views(v)
    for name in q_views:
        assert same(run(q_views[name], k_views[name], v_views[name], SMOOTH, is_causal=True), expected), name
        assert same(run(q_views[name], k, v, SMOOTH, is_causal=True), expected), f"{name}, Q only"


def test_expanded_tensors():
    """A stride of 0: one batch entry for all, one head for all."""
    q, k, v = inputs(batch=3, heads=(4, 4))
    for index in ((slice(1),), (slice(None), slice(1))):
        expanded = [t[index].expand(t.shape) for t in (q, k, v)]
        assert same(run(*expanded, SAGE), run(*(t.contiguous() for t in expanded), SAGE))


@pytest.mark.parametrize("head_dims", [(128, 128), (64, 40), (33, 36)])
@pytest.mark.parametrize("r", [SAGE, SMOOTH], ids=str)
def test_both_layouts_are_equal(r, head_dims):
    q, k, v = inputs("qkv_bias", batch=2, heads=(6, 3), lengths=(150, 300), head_dims=head_dims)
    expected = run(q, k, v, r)
    for tensors in ((q, k, v), [t.contiguous() for t in (q.clone(), k.clone(), v.clone())]):
        nhd = [t.transpose(1, 2) for t in tensors]
        for given in (nhd, [t.contiguous() for t in nhd]):
            out, lse = run(*given, r, layout="NHD")
            assert out.shape == (2, 150, 6, head_dims[1])
            assert out.is_contiguous()
            assert same((out.transpose(1, 2).contiguous(), lse), expected)
    assert torch.equal(attention(q, k, v, recipe=r), expected[0])  # without lse


@pytest.mark.parametrize("which", FAR_SHAPES)
def test_offsets_beyond_32_bits(which):
    """4.4 · 10⁹ elements from the first token (head, batch entry) to the last, NaN in between."""
    shape = FAR_SHAPES[which][0]
    tensors = inputs(batch=shape[0], heads=(2, 2), lengths=(shape[2],) * 2)
    expected = run(*tensors, SMOOTH)
    assert same(run(*far_apart(tensors, which), SMOOTH), expected)


# ---- the same numbers again


@PLAIN
@pytest.mark.parametrize("causal", [False, True])
def test_repeats_are_equal(r, causal):
    tensors = busy()
    first = run(*tensors, r, is_causal=causal)
    for _ in range(20):
        assert same(attention(*tensors, recipe=r, is_causal=causal, return_lse=True), first)


def test_permuted_entries_give_permuted_outputs():
    """No entry of the batch, and no head, knows of the others."""
    q, k, v = inputs("qkv_bias", batch=5, heads=(6, 3), lengths=(300, 400))
    out, lse = run(q, k, v, SMOOTH)
    order = torch.tensor([3, 0, 4, 1, 2], device=q.device)
    assert same(run(q[order], k[order], v[order], SMOOTH), (out[order], lse[order]))
    kv_order = torch.tensor([2, 0, 1], device=q.device)
    q_order = torch.tensor([4, 5, 0, 1, 2, 3], device=q.device)
    permuted = run(q[:, q_order], k[:, kv_order], v[:, kv_order], SMOOTH)
    assert same(permuted, (out[:, q_order], lse[:, q_order]))


def test_the_kernel_alone_is_the_call():
    q, k, v = inputs("qkv_bias", lengths=(500, 700))
    call = hopper.KERNEL.kernel_alone(q, k, v, "sage2_8b", is_causal=True)
    expected = attention(q, k, v, recipe="sage2_8b", is_causal=True)
    assert all(torch.equal(call(), expected) for _ in range(3))


@PLAIN
def test_packed_once_and_attended_by_several_q(r):
    """Bit for bit as whole calls, in any order of sizes; also where keys are split."""
    q, k, v = inputs("qkv_bias", heads=(8, 2), lengths=(1500, 3000))
    packed = hopper.KERNEL.pack(k, v, r)
    for rows in (1500, 1, 300, 1500):
        some = q[:, :, :rows]
        request = make_request(
            some, k, v, None, r, None, is_causal=False, bottom_right=True, return_lse=True, layout="HND"
        )
        found = hopper.KERNEL.attend(some, packed, 0.1, request)
        assert same(found, run(some, k, v, r, sm_scale=0.1)), rows


@PLAIN
def test_two_streams_at_once(r):
    """Each stream has its own workspace: calls that run at the same time do not meet."""
    tensors = [inputs(family, batch=2, heads=(8, 2), lengths=(1000, 1111)) for family in ("normal", "qkv_bias")]
    expected = [run(*three, r) for three in tensors]
    torch.cuda.synchronize()
    streams, answers = [torch.cuda.Stream() for _ in tensors], []
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                answers.append((number, attention(*tensors[number], recipe=r, return_lse=True)))
    torch.cuda.synchronize()
    assert all(same(answer, expected[number]) for number, answer in answers)


def test_other_threads():
    """A fresh thread, for which nothing of CUDA is set up; and four at once, each with its own call and stream."""
    tensors = [inputs("qkv_bias", lengths=(300 + n, 400)) for n in range(4)]
    expected = [run(*three, SAGE) for three in tensors]
    torch.cuda.synchronize()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(attention(*tensors[0], recipe=SAGE, return_lse=True)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert same(answers[0], expected[0])

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [attention(*tensors[number], recipe=SAGE, return_lse=True) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(same(answer, expected[number]) for answer in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# ---- CUDA graphs


@PLAIN
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 36)])
def test_a_graph_replays_with_new_inputs(r, head_dims):
    static = inputs("normal", heads=(8, 2), lengths=(300, 500), head_dims=head_dims)
    run(*static, r, is_causal=True)  # what is compiled and loaded now is not during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*static, recipe=r, is_causal=True, return_lse=True)
    for family in ("qkv_bias", "sink", "normal"):
        fresh = inputs(family, heads=(8, 2), lengths=(300, 500), head_dims=head_dims)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, run(*fresh, r, is_causal=True)), family


def test_nothing_is_compiled_during_a_capture(monkeypatch, tmp_path):
    """A kernel that is not in memory yet is refused with a reason, not compiled or loaded into the graph."""

    def compile_source(*_):
        raise AssertionError("compiled while a graph was being captured")

    fresh = KernelCache(tmp_path)
    monkeypatch.setattr(cache_module, "compile_source", compile_source)
    monkeypatch.setattr(launch, "cache", lambda: fresh)
    monkeypatch.setattr(host, "cache", lambda: fresh)
    monkeypatch.setattr(hopper.KERNEL, "_plans", IdentityMemo())
    monkeypatch.setattr(hopper.KERNEL, "_packings", Memo())
    for loaded in (hopper._kernel, packing.packer):
        loaded.cache_clear()
    q, k, v = inputs(lengths=(77, 99))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="run the call once"), torch.cuda.graph(graph):
        attention(q, k, v, recipe=SAGE)
    torch.cuda.synchronize()


# ---- the other entrances


@PLAIN
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_its_sequences(r, causal):
    lengths_q, lengths_k = (1, 200, 64, 0, 513), (300, 200, 129, 0, 77)
    q = inputs("qkv_bias", heads=(4, 4), lengths=(sum(lengths_q),) * 2)[0][0].transpose(0, 1)
    k, v = (t[0].transpose(0, 1) for t in inputs("qkv_bias", heads=(2, 2), lengths=(sum(lengths_k),) * 2)[1:])
    cu_q, cu_k = (torch.tensor((0, *lengths), device=q.device).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, recipe=r, is_causal=causal, return_lse=True)
    assert out.shape == q.shape
    for n in range(len(lengths_q)):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        if rows.start < rows.stop:
            one = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])]
            expected_out, expected_lse = run(*one, r, is_causal=causal)
            assert torch.equal(out[rows].transpose(0, 1), expected_out[0]), n
            assert torch.equal(lse[:, rows], expected_lse[0]), n


def test_gradients_are_refused_with_the_kernels_reason():
    q, k, v = inputs(lengths=(64, 64))
    with pytest.raises(UnsupportedError, match="gradient") as refused:
        attention(q.requires_grad_(), k, v, recipe=SAGE)
    assert any("gradient" in reason for reason in refused.value.reasons[KERNEL])
    with torch.no_grad():
        run(q, k, v, SAGE)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_runs_and_is_explained(kind):
    q, k, v = inputs(lengths=(64, 64))
    mask = torch.ones(64, 64, dtype=torch.bool, device=q.device).tril()
    if kind == "float":
        mask = torch.zeros(64, 64, device=q.device, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    explanation = explain(q, k, v, recipe=SAGE, attn_mask=mask)
    (verdict,) = (verdict for verdict in explanation.verdicts if verdict.implementation == KERNEL)
    assert verdict.chosen
    assert any("mask" in reason for reason in verdict.reasons)
    masked = attention(q, k, v, recipe=SAGE, attn_mask=mask)
    assert compare(run(q, k, v, SAGE, is_causal=True)[0], masked).l1 < 0.1  # (both err by about 0.03)


@pytest.mark.parametrize(
    ("spec", "instead"),
    [
        ("sage2_4b", "attention_mma"),
        ("sage2_8b:pv_format=e5m2", "emulation"),
        ("sage2_8b:keys_per_promotion=never,row_sum=unrounded", "attention_mma"),
        ("int8_u8", "emulation"),
        ("sage2_8b:smooth_q=true", "attention_mma"),
    ],
)
def test_other_recipes_are_refused_with_a_reason(spec, instead):
    q, k, v = inputs(lengths=(64, 64))
    explanation = explain(q, k, v, recipe=recipe(spec))
    assert explanation.implementation == instead
    assert any(v.implementation == KERNEL and v.reasons and not v.chosen for v in explanation.verdicts)


@PLAIN
def test_a_call_after_another_of_any_size(r):
    """Plans, workspaces and rings of stages of one call leave nothing behind for the next."""
    for lengths in ((1, 1), (500, 3000), (1, 129), (3000, 1), (64, 64), (129, 127)):
        q, k, v = inputs("normal", heads=(4, 2), lengths=lengths)
        assert_agrees(*run(q, k, v, r), q, k, v, r)
