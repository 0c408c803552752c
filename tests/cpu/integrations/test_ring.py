"""Torch's ring attention by a recipe: `ring_op`, and the flash implementation within ``context_parallel``."""

import socket
import sys
from subprocess import run as run_program

import pytest
import torch
from torch import distributed

from lowbit_attention import UnsupportedError, attention
from lowbit_attention.integrations.ring import ring_op

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


def qkv():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 64, 16, generator=g)
    return [q, *(torch.randn(1, 4, 64, 16, generator=g) for _ in range(2))]


@pytest.mark.parametrize("causal", [True, False])
def test_a_step(causal):
    q, k, v = qkv()
    op = ring_op("sage2_8b")
    out, lse = op(q, k[:, :2], v[:, :2], is_causal=causal, scale=0.2)
    want, want_lse = attention(
        q, k[:, :2], v[:, :2], recipe="sage2_8b", is_causal=causal, sm_scale=0.2, return_lse=True
    )
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert op.report.by_implementation() == {"emulation": 1}


def test_auto_is_exact_on_a_cpu():
    q, k, v = qkv()
    out, lse = ring_op()(q, k, v)
    want, want_lse = attention(q, k, v, recipe="exact", return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_what_it_refuses():
    q, k, v = qkv()
    op = ring_op("sage2_8b")
    for options in ({"return_debug_mask": True}, {"dropout_p": 0.5}, {"attn_bias": "x"}):
        with pytest.raises(UnsupportedError, match=next(iter(options))):
            op(q, k, v, **options)
    with pytest.raises(UnsupportedError, match="gradients"):
        op(q.requires_grad_(), k, v)


RANK = """
import os, sys, torch, torch.distributed as dist
rank, port, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
torch.set_num_threads(1)
from lowbit_attention import attention, compare
from torch.distributed.tensor.experimental._context_parallel import _attention as cp
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 4, 64, 16, generator=g) for _ in range(3))
causal = way.endswith("causal")
cp._cp_options.enable_load_balance = causal
# (with a balanced load a rank has the first and the last of four parts, or the two in the middle)
order = torch.cat([torch.arange(64).chunk(4)[n] for n in (0, 3, 1, 2)]) if causal else torch.arange(64)
mine = [t[:, :, order].chunk(2, dim=2)[rank] for t in (q, k, v)]
exact = attention(q, k, v, recipe="exact", is_causal=causal)[:, :, order].chunk(2, dim=2)[rank]
if way.startswith("op"):
    from lowbit_attention.integrations.ring import ring_op
    op = ring_op("sage2_8b")
    with torch.no_grad():
        out, lse = cp._templated_ring_attention(dist.group.WORLD, 2, op, *mine, is_causal=causal)
    report = op.report
else:  # as context_parallel hands calls over on CUDA, by the very handler
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from lowbit_attention.integrations.flash_impl import register_flash_impl
    report = register_flash_impl("sage2_8b")
    torch.nn.attention.activate_flash_attention_impl("lowbit_sage2_8b")
    mesh = init_device_mesh("cpu", (2,))
    cp._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=mesh)
    parts = [DTensor.from_local(t, mesh, [Shard(2)]) for t in mine]
    call = torch.ops.aten._scaled_dot_product_flash_attention
    with torch.no_grad():
        out = call(*parts, 0.0, causal)[0].to_local()
    before = report.calls
    parts = [DTensor.from_local(t.requires_grad_(), mesh, [Shard(2)]) for t in mine]
    try:
        call(*parts, 0.0, causal)
        print("ran with gradients")
    except Exception as error:
        print("refused", type(error).__name__, report.fallbacks)
print("close", compare(exact, out).cos_sim > 0.999, "counts", report.by_implementation())
dist.destroy_process_group()
"""


@needs_gloo
@pytest.mark.parametrize("way", ["op", "op_causal", "flash", "flash_causal"])
def test_two_ranks(way):
    pytest.importorskip("torch.distributed.tensor.experimental._context_parallel", reason="this torch has it elsewhere")
    if way.startswith("flash") and not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    from concurrent.futures import ThreadPoolExecutor

    def rank(number):
        command = [sys.executable, "-c", RANK, str(number), port, way]
        return run_program(command, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(rank, range(2)))
    for each in done:
        assert each.returncode == 0, each.stderr[-3000:]
        assert "close True" in each.stdout, each.stdout
        assert "'emulation': 2" in each.stdout, each.stdout
        if way.startswith("flash"):
            assert "refused UnsupportedError {'gradients are asked for': 1}" in each.stdout, each.stdout
