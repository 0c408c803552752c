"""yunchang's processor and xDiT's backend, by their words; with the packages, through their own code."""

import sys
import types
from importlib.util import find_spec

import pytest
import torch

from lowbit_attention import MissingExtraError, UnsupportedError, attention
from lowbit_attention.integrations import xdit
from lowbit_attention.integrations.yunchang import attn_processor


def by_token(rows=40, keys=40, heads=(4, 2)):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, h, 16, generator=g) for n, h in ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]))]


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_in_flash_attns_words(causal):
    q, k, v = by_token()
    process = attn_processor("sage2_8b")
    out, lse = process(
        q, k, v, dropout_p=0.0, softmax_scale=0.3, causal=causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    )  # fmt: skip
    want, want_lse = attention(
        q, k, v, recipe="sage2_8b", is_causal=causal, sm_scale=0.3, layout="NHD", return_lse=True
    )
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert process.report.by_implementation() == {"emulation": 1}


@pytest.mark.parametrize(
    "words",
    [{"window_size": (8, 0)}, {"softcap": 3.0}, {"alibi_slopes": torch.ones(4)}, {"return_softmax": True}, {"x": 1},
     {"dropout_p": 0.5}],
    ids=lambda words: next(iter(words)),
)  # fmt: skip
def test_what_a_processor_refuses_by_name(words):
    with pytest.raises(UnsupportedError, match=next(iter(words))):
        attn_processor("sage2_8b")(*by_token(), **words)


def test_a_processor_has_no_gradients_and_no_unequal_causality():
    q, k, v = by_token(rows=30)
    with pytest.raises(UnsupportedError, match="30 queries and 40 keys"):
        attn_processor("sage2_8b")(q, k, v, causal=True)
    with pytest.raises(UnsupportedError, match="gradients"):
        attn_processor("sage2_8b")(q.requires_grad_(), k, v)


@pytest.fixture
def table(monkeypatch):
    """XDiT's registry: the package's, or (it is not imported where there is no accelerator) its place alone."""
    if find_spec("xfuser") is None or not torch.cuda.is_available():
        for name in ("xfuser", "xfuser.core", "xfuser.core.distributed"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules[name].__spec__ = types.SimpleNamespace(name=name)
        registry = types.ModuleType("xfuser.core.distributed.attention_backend")
        registry.ATTENTION_FUNCTION_REGISTRY = {"SDPA": print}
        state = types.ModuleType("xfuser.core.distributed.parallel_state")
        for module in (registry, state):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

    before = dict(ATTENTION_FUNCTION_REGISTRY)
    yield ATTENTION_FUNCTION_REGISTRY
    xdit.unregister()
    assert before == ATTENTION_FUNCTION_REGISTRY


def test_xdits_backend(table):
    q, k, v = (t.transpose(1, 2) for t in by_token())
    report = xdit.register("sage2_8b")
    out, lse = table["lowbit"](q, k, v, dropout_p=None, is_causal=None, attention_kwargs=None)
    want, want_lse = attention(q, k, v, recipe="sage2_8b", return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    mask = torch.ones(40, 40, dtype=torch.bool).tril(3)
    out, _ = table["lowbit"](q, k, v, 0.0, False, {"attn_mask": mask, "other": None})
    torch.testing.assert_close(out, attention(q, k, v, recipe="sage2_8b", attn_mask=mask))
    assert report.by_implementation() == {"emulation": 2}
    with pytest.raises(UnsupportedError, match="attention_kwargs sparsity"):
        table["lowbit"](q, k, v, 0.0, False, {"sparsity": 0.5})


def test_xdits_picked_keys(table):
    q, k, v = (t.transpose(1, 2) for t in by_token())
    xdit.register("sage2_8b")
    picked = torch.cat([torch.arange(25), 40 + torch.arange(33)])
    cu_k = torch.tensor([0, 25, 58], dtype=torch.int32)
    given = {"indices_k": picked, "cu_seqlens_k": cu_k, "max_seqlen_k": 33}
    out, lse = table["lowbit"](q, k, v, 0.0, False, given)
    for b, n in ((0, 25), (1, 33)):
        want, want_lse = attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], recipe="sage2_8b", return_lse=True
        )
        torch.testing.assert_close(out[b], want[0])
        torch.testing.assert_close(lse[b], want_lse[0])


def test_xdits_own_backend_may_be_replaced_and_comes_back(table):
    key = next(iter(table))
    there = table[key]
    xdit.register("sage2_8b", key)
    xdit.register("int8_fp16", key)
    assert isinstance(table[key], xdit.Attends)
    xdit.unregister(key)
    assert table[key] is there


def test_without_xfuser(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="xfuser"):
        xdit.register()


RANK = """
import os, sys, torch, torch.distributed as dist
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.set_grad_enabled(False)
from yunchang import LongContextAttention, set_seq_parallel_pg
from lowbit_attention import attention, compare
from lowbit_attention.integrations.yunchang import attn_processor
set_seq_parallel_pg(1, 2, rank, 2)  # (a ring of two)
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 64, 4, 16, generator=g) for _ in range(3))
process = attn_processor("sage2_8b")
layer = LongContextAttention(attn_type="lowbit", attn_processor=process)
for causal in (False, True):
    out = layer(*(t.chunk(2, dim=1)[rank] for t in (q, k, v)), causal=causal)
    exact = attention(q, k, v, recipe="exact", is_causal=causal, layout="NHD").chunk(2, dim=1)[rank]
    print("close", compare(exact, out).cos_sim > 0.999)
print(process.report.by_implementation())
dist.destroy_process_group()
"""


@pytest.mark.skipif(find_spec("yunchang") is None, reason="needs yunchang (pip install --no-deps yunchang)")
def test_a_ring_of_yunchangs():
    import socket
    from concurrent.futures import ThreadPoolExecutor
    from subprocess import run

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(number):
        command = [sys.executable, "-c", RANK, str(number), port]
        return run(command, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(rank, range(2)))
    for number, each in enumerate(done):
        assert each.returncode == 0, each.stderr[-3000:]
        assert each.stdout.count("close True") == 2, each.stdout
        assert f"{{'emulation': {3 + number}}}" in each.stdout, each.stdout  # (rank 0 sees nothing of rank 1's, causal)
