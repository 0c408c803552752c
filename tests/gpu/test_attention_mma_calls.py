"""Calls of attention_mma: memory, strides, streams, threads, graphs, dispatch. The numbers never depend on them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import mma_cases
from kernel_cases import FAR_SHAPES, far_apart, hopper_only, inputs, same, soil, views
from mma_cases import FEW, INT4, INT8, NAMED, Changed, answers, assert_agrees, in_spoilt_memory, request_for, run

from lowbit_attention import UnsupportedError, attention, attention_varlen, explain, recipe
from lowbit_attention.backends.cuda import kernel as host
from lowbit_attention.backends.cuda import launch, mma, packing, smooth_q
from lowbit_attention.backends.cuda.jit import cache as cache_module
from lowbit_attention.backends.cuda.jit.cache import CaptureError, KernelCache
from lowbit_attention.backends.cuda.mma import MMA_KERNEL, MmaAttention

pytestmark = hopper_only

PLAIN = pytest.mark.parametrize("r", FEW.values(), ids=FEW)
SMOOTH = recipe("sage2pp_4b:smooth_v=true")  # everything has a mean
ROTATED = NAMED["rotated_4b"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    mma_cases.compile_everything()


def busy(head_dim=128):
    """More work than the card runs at once, ragged, grouped heads."""
    return inputs("qkv_bias", batch=2, heads=(16, 4), lengths=(1500, 1111), head_dims=(head_dim, head_dim))


# ---- memory


@PLAIN
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 64), (40, 36)])
def test_every_element_is_written_and_none_is_read_before(r, head_dims):
    q, k, v = inputs("qkv_bias", heads=(4, 2), lengths=(333, 257), head_dims=head_dims)
    before = [t.clone() for t in (q, k, v)]
    found = []
    for garbage in (torch.nan, 1e30, -torch.inf, 0.0):
        soil(garbage)
        found.append(answers(q, k, v, r, is_causal=True))
    for byte in (0x00, 0x7F, 0xFF):
        found.append(in_spoilt_memory(q, k, v, r, garbage=byte, is_causal=True)[:2])
    assert all(t.isfinite().all() for t in (found[0][0], found[0][1][:, :, 333 - 257 :]))
    assert all(same(other, found[0]) for other in found[1:])
    assert all(torch.equal(t, b) for t, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 64), (40, 33)])
@pytest.mark.parametrize("r", [SMOOTH, ROTATED, NAMED["int8_fp16"]], ids=str)
def test_strides_change_nothing(r, head_dims, dtype):
    """Q, K and V as views of every kind, in memory that is NaN all around them."""
    q, k, v = inputs("qkv_bias", dtype, batch=2, heads=(4, 2), lengths=(200, 300), head_dims=head_dims)
    expected = run(q, k, v, r, is_causal=True)
    assert expected[0].isfinite().all()
    q_views, k_views, v_views = views(q), views(k), views(v)
    for name in q_views:
        assert same(run(q_views[name], k_views[name], v_views[name], r, is_causal=True), expected), name
        assert same(run(q_views[name], k, v, r, is_causal=True), expected), f"{name}, Q only"


def test_expanded_tensors():
    """A stride of 0: one batch entry for all, one head for all."""
    q, k, v = inputs(batch=3, heads=(4, 4))
    for index in ((slice(1),), (slice(None), slice(1))):
        expanded = [t[index].expand(t.shape) for t in (q, k, v)]
        assert same(run(*expanded, ROTATED), run(*(t.contiguous() for t in expanded), ROTATED))


@pytest.mark.parametrize("head_dims", [(128, 128), (64, 40), (33, 36)])
@PLAIN
def test_both_layouts_are_equal(r, head_dims):
    q, k, v = inputs("qkv_bias", batch=2, heads=(6, 3), lengths=(150, 300), head_dims=head_dims)
    expected = run(q, k, v, r)
    nhd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    out, lse = run(*nhd, r, layout="NHD")
    assert out.shape == expected[0].shape
    if head_dims[1] % 8 == 0:  # (others are a slice of a wider output)
        assert out.transpose(1, 2).is_contiguous()
    assert same((out.contiguous(), lse), expected)
    without, none = run(q, k, v, r, return_lse=False)
    assert none is None
    assert torch.equal(without, expected[0])


@pytest.mark.parametrize("which", FAR_SHAPES)
@pytest.mark.parametrize("r", [SMOOTH, NAMED["int8_fp16"]], ids=str)
def test_offsets_beyond_32_bits(r, which):
    """4.4 · 10⁹ elements from the first token (head, batch entry) to the last, NaN in between."""
    shape = FAR_SHAPES[which][0]
    tensors = inputs(batch=shape[0], heads=(2, 2), lengths=(shape[2],) * 2)
    expected = run(*tensors, r)
    assert same(run(*far_apart(tensors, which), r), expected)


# ---- ΔS in pieces


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "parts"),
    [(1, (4, 1), 64, True), (1, (2, 1), 128, True), (4, (8, 4), 64, False), (1, (3, 3), 128, False)],
)
@pytest.mark.parametrize("name", ["sage2_4b", "rotated_4b", "sage2_8b:smooth_q=true", "int8_fp16:smooth_q=true"])
def test_chunks_of_delta_change_nothing(name, batch, heads, head_dim, parts, causal):
    """With a few KB for ΔS (or what a quarter of packed K and V gives): some heads at a time, or parts of one head."""
    r = recipe(name)
    q, k, v = inputs("qkv_bias", batch=batch, heads=heads, lengths=(4000, 333), head_dims=(head_dim, head_dim))
    expected = run(q, k, v, r, is_causal=causal)
    kernels = [(INT8, Changed(_MOST_DELTA_BYTES=4096))]
    kernels += [(INT4, Changed(int4_mma=True, _MOST_DELTA_BYTES=4096))] if r.qk_bits == 4 else []
    for whole, chunked in kernels:
        request = request_for(q, k, v, r, is_causal=causal)
        plan, undivided = chunked.plan(request, r), whole.plan(request, r)
        of_all, of_some = undivided.smooth_q, plan.smooth_q
        assert (of_all.heads_a_chunk, of_all.levels_a_chunk) == (batch * heads[0], undivided.q_blocks)
        assert of_some.heads_a_chunk < batch * heads[0]
        if parts:
            assert of_some.heads_a_chunk == 1
            assert of_some.levels_a_chunk < plan.q_blocks
        assert plan.workspace_size < undivided.workspace_size
        assert same(run(q, k, v, r, kernel=chunked, is_causal=causal), expected)
        assert same(in_spoilt_memory(q, k, v, r, kernel=chunked, is_causal=causal)[:2], expected)


# ---- the same numbers again


@PLAIN
@pytest.mark.parametrize("causal", [False, True])
def test_repeats_are_equal(r, causal):
    tensors = busy()
    for kernel in mma_cases.kernels_for(r):
        first = run(*tensors, r, kernel=kernel, is_causal=causal)
        for _ in range(20):
            assert same(run(*tensors, r, kernel=kernel, is_causal=causal), first)


@pytest.mark.parametrize("r", [SMOOTH, ROTATED, NAMED["sage1"]], ids=str)
def test_permuted_entries_give_permuted_outputs(r):
    """No entry of the batch, and no head, knows of the others."""
    q, k, v = inputs("qkv_bias", batch=5, heads=(6, 3), lengths=(300, 400))
    out, lse = run(q, k, v, r)
    order = torch.tensor([3, 0, 4, 1, 2], device=q.device)
    assert same(run(q[order], k[order], v[order], r), (out[order], lse[order]))
    kv_order = torch.tensor([2, 0, 1], device=q.device)
    q_order = torch.tensor([4, 5, 0, 1, 2, 3], device=q.device)
    permuted = run(q[:, q_order], k[:, kv_order], v[:, kv_order], r)
    assert same(permuted, (out[:, q_order], lse[:, q_order]))


@pytest.mark.parametrize("name", ["sage2_4b", "sage1"])
def test_the_kernel_alone_is_the_call(name):
    q, k, v = inputs("qkv_bias", lengths=(500, 700))
    call = MMA_KERNEL.kernel_alone(q, k, v, name, is_causal=True)
    expected = run(q, k, v, NAMED[name], is_causal=True)[0]
    assert all(torch.equal(call(), expected) for _ in range(3))


@pytest.mark.parametrize("r", [SMOOTH, ROTATED, NAMED["sage1"]], ids=str)
def test_packed_once_and_attended_by_several_q(r):
    """Bit for bit as whole calls, in any order of sizes."""
    q, k, v = inputs("qkv_bias", heads=(8, 2), lengths=(1500, 777))
    for kernel in mma_cases.kernels_for(r):
        packed = kernel.pack(k, v, r)
        for rows in (1500, 1, 300, 1500):
            some = q[:, :, :rows]
            found = kernel.attend(some, packed, 0.1, request_for(some, k, v, r))
            assert same(found, run(some, k, v, r, kernel=kernel, sm_scale=0.1)), rows


@PLAIN
def test_two_streams_at_once(r):
    """Each call has its own workspace: calls that run at the same time do not meet."""
    tensors = [inputs(family, batch=2, heads=(8, 2), lengths=(1000, 1111)) for family in ("normal", "qkv_bias")]
    expected = [run(*three, r) for three in tensors]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in tensors], []
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((number, run(*tensors[number], r)))
    torch.cuda.synchronize()
    assert all(same(answer, expected[number]) for number, answer in found)


def test_other_threads():
    """A fresh thread, for which nothing of CUDA is set up; and four at once, each with its own call and stream."""
    tensors = [inputs("qkv_bias", lengths=(300 + n, 400)) for n in range(4)]
    expected = [run(*three, ROTATED) for three in tensors]
    torch.cuda.synchronize()
    found = []
    thread = threading.Thread(target=lambda: found.append(run(*tensors[0], ROTATED)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert same(found[0], expected[0])

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = [run(*tensors[number], ROTATED) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(same(answer, expected[number]) for answer in mine)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@PLAIN
def test_a_call_after_another_of_any_size(r):
    """Plans and workspaces of one call leave nothing behind for the next."""
    for lengths in ((1, 1), (500, 3000), (1, 129), (3000, 1), (64, 64), (129, 127)):
        q, k, v = inputs("normal", heads=(4, 2), lengths=lengths)
        assert_agrees(q, k, v, r)


# ---- CUDA graphs


@PLAIN
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 36)])
def test_a_graph_replays_with_new_inputs(r, head_dims):
    static = inputs("normal", heads=(8, 2), lengths=(300, 500), head_dims=head_dims)
    kernel = Changed(_MOST_DELTA_BYTES=4096)  # (several pieces of ΔS, where there is one)
    run(*static, r, kernel=kernel, is_causal=True)  # what is compiled and loaded now is not during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static, r, kernel=kernel, is_causal=True)
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
    for loaded in (mma._kernel, smooth_q._kernels, packing.packer):
        loaded.cache_clear()
    tensors = inputs(lengths=(77, 99))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="run the call once"), torch.cuda.graph(graph):
        run(*tensors, ROTATED, kernel=MmaAttention())
    torch.cuda.synchronize()


# ---- through the public functions


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("name", ["sage1", "sage2_v1_4b", "sage2_4b", "sage2pp_4b", "rotated_4b", "int8_fp16"])
def test_attention_runs_it_for_what_the_hopper_kernel_has_not(name, layout, causal):
    """Bit for bit, in both layouts, contiguous, also where the width is no multiple of 8."""
    q, k, v = inputs("qkv_bias", heads=(4, 2), lengths=(150, 300), head_dims=(64, 36))
    given = [t.transpose(1, 2) for t in (q, k, v)] if layout == "NHD" else [q, k, v]
    options = {"recipe": name, "is_causal": causal, "layout": layout}
    explanation = explain(*given, **options, return_lse=True)
    assert explanation.implementation == "attention_mma", str(explanation)
    out, lse = attention(*given, **options, return_lse=True)
    assert out.is_contiguous()
    out = out.transpose(1, 2).contiguous() if layout == "NHD" else out
    assert same((out, lse), run(q, k, v, NAMED[name], is_causal=causal))


@pytest.mark.parametrize("name", ["sage2_8b", "sage2pp_8b", "fast_8b"])
def test_the_hopper_kernel_comes_first(name):
    explanation = explain(*inputs(lengths=(64, 64)), recipe=name)
    assert explanation.implementation == "attention_wgmma"


def test_auto_leaves_it_alone_here():
    """FP8 by FP16 MMAs gains nothing over exact attention, and `explain` says so."""
    explanation = explain(*inputs(lengths=(4200, 4200)))
    assert explanation.implementation != "attention_mma"
    reasons = [reason for v in explanation.verdicts if v.implementation == "attention_mma" for reason in v.reasons]
    assert any("no gain over exact attention" in reason for reason in reasons)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["sage2pp_4b", "sage1"])
def test_varlen_is_its_sequences(name, causal):
    lengths_q, lengths_k = (1, 200, 64, 0, 513), (300, 200, 129, 0, 77)
    q = inputs("qkv_bias", heads=(4, 4), lengths=(sum(lengths_q),) * 2)[0][0].transpose(0, 1)
    k, v = (t[0].transpose(0, 1) for t in inputs("qkv_bias", heads=(2, 2), lengths=(sum(lengths_k),) * 2)[1:])
    cu_q, cu_k = (torch.tensor((0, *lengths), device=q.device).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, recipe=name, is_causal=causal, return_lse=True)
    assert out.shape == q.shape
    for n in range(len(lengths_q)):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        if rows.start < rows.stop:
            one = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])]
            expected_out, expected_lse = run(*one, NAMED[name], is_causal=causal)
            assert torch.equal(out[rows].transpose(0, 1), expected_out[0]), n
            assert torch.equal(lse[:, rows], expected_lse[0]), n


def test_gradients_are_refused_with_the_kernels_reason():
    q, k, v = inputs(lengths=(64, 64))
    with pytest.raises(UnsupportedError, match="gradient") as refused:
        attention(q.requires_grad_(), k, v, recipe="sage2_4b")
    assert any("gradient" in reason for reason in refused.value.reasons["attention_mma"])
    with torch.no_grad():
        attention(q, k, v, recipe="sage2_4b")


def test_the_kernel_alone_refuses_with_every_reason():
    q, k, v = inputs(lengths=(64, 64), head_dims=(64, 128))
    with pytest.raises(UnsupportedError) as refused:
        MMA_KERNEL.kernel_alone(q, k, v, "rotated_4b:pv_format=e5m2,p_max=57344,v_max=1,accumulator=fp8_f32")
    reasons = " ".join(refused.value.reasons["attention_mma"])
    assert "e5m2" in reasons
    assert "head_dim 64 wants 64" in reasons
