"""One rank of several, over gloo: diffusers' context parallelism on our backend, held against one process.

``python rank.py RANK WORLD FILE``; a line ``ok NAME`` for each check that went well.
"""

from __future__ import annotations

import sys

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch.distributed.device_mesh import init_device_mesh

from lowbit_attention import UnsupportedError, attention
from lowbit_attention.integrations.diffusers import register

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
RANK, WORLD = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=WORLD)
report = register("int8_fp16")


def parallel(ring: int, ulysses: int, **more: object) -> ParallelConfig:
    """A configuration of so many ranks."""
    config = ParallelConfig(
        context_parallel_config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, **more)
    )
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    config.setup(RANK, WORLD, torch.device("cpu"), mesh=mesh)
    return config


def part(t: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    """This rank's tokens of ``[B, S, …]``."""
    pieces = t.split(lengths, dim=1) if lengths else t.chunk(WORLD, dim=1)
    return pieces[RANK].contiguous()


def check(name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-2) -> None:
    """Near enough, and of the same shape."""
    assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
    error = float((found - wanted).abs().sum() / wanted.abs().sum())
    assert error < bound, (name, error)
    print("ok", name, flush=True)


def inputs(tokens: int = 16, heads: int = 4) -> list[torch.Tensor]:
    """Q, K (with a large mean, which the lse has to hold) and V, the same on every rank."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, 16) for _ in range(3))
    return [q, k + 2.0, v]


def run(config: ParallelConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
        **kwargs: object) -> object:  # fmt: skip
    """One dispatched call."""
    with attention_backend("lowbit"), torch.no_grad():
        return dispatch_attention_fn(q, k, v, attn_mask=mask, parallel_config=config, attention_kwargs=kwargs)


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What one process gives, exact."""
    return attention(q, k, v, layout="NHD", recipe="exact", attn_mask=mask)


q, k, v = inputs()
mine = [part(t) for t in (q, k, v)]
exact, exact_lse = attention(q, k, v, layout="NHD", recipe="exact", return_lse=True)
lse = exact_lse.transpose(1, 2)
degrees = {"ulysses": (1, WORLD), "ring": (WORLD, 1)} if WORLD == 2 else {"both": (2, WORLD // 2)}
for name, (ring, ulysses) in degrees.items():
    config = parallel(ring, ulysses)
    report.clear()
    check(name, run(config, *mine), part(exact))
    assert report.ran == report.calls == ring, (name, report.counts)
    out, found = run(config, *mine, return_lse=True)
    check(f"{name} with lse", out, part(exact))
    assert (found - part(lse)).abs().max() < 5e-2
    with attention_backend("lowbit_sage2_8b"), torch.no_grad():
        out = dispatch_attention_fn(*mine, parallel_config=config)
    check(f"{name}, 8 bit", out, part(exact), 0.1)

if WORLD > 2:
    dist.destroy_process_group()
    sys.exit()

config = parallel(1, WORLD)
mask = torch.ones(2, 16, dtype=torch.bool)
mask[0, -3:] = mask[1, -5:] = False
masked = whole(q, k, v, mask[:, None, None])
check("ulysses, this rank's mask", run(config, *mine, mask=part(mask)), part(masked))
check("ulysses, this rank's mask of four dimensions", run(config, *mine, mask=part(mask)[:, None, None]), part(masked))
check("ulysses, the whole mask", run(config, *mine, mask=mask), part(masked))

ring = parallel(WORLD, 1)
with pytest.raises(UnsupportedError, match=f"attn_mask with ring_degree={WORLD}"):
    run(ring, *mine, mask=part(mask))
with pytest.raises(UnsupportedError, match="gradients are asked"), attention_backend("lowbit"):
    dispatch_attention_fn(*[t.clone().requires_grad_() for t in mine], parallel_config=ring)
print("ok refusals")

lengths = [5] * (WORLD - 1) + [3]
q, k, v = inputs(sum(lengths))
mine = [part(t, lengths) for t in (q, k, v)]
exact = part(whole(q, k, v), lengths)
check("ring of unequal parts", run(parallel(WORLD, 1, ring_anything=True), *mine), exact)
check("ulysses of unequal parts", run(parallel(1, WORLD, ulysses_anything=True), *mine), exact)

q, k, v = inputs()
mine = [part(t) for t in (q, k, v)]


def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
    return dispatch_attention_fn(q, k, v, parallel_config=config, backend=backend)


backend = diffusers.models.attention_dispatch.AttentionBackendName("lowbit")
for name, (ring_degree, ulysses) in degrees.items():
    config = parallel(ring_degree, ulysses)
    torch._dynamo.reset()
    report.clear()
    with torch.no_grad():
        out = torch.compile(compiled, backend="aot_eager")(*mine)
    check(f"{name}, compiled", out, part(whole(q, k, v)))
    assert report.ran == ring_degree, (name, report.counts)

dist.destroy_process_group()
