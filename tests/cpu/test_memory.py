"""Memory grows with the tokens, never with queries × keys: whatever the mask, and for the whole process."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_attention import attention

HEADS, Q_LEN, KV_LEN, DIM = 8, 256, 8192, 8
# What may be held at once: a tile of logits, documented as 2²¹ elements at most (8 MiB of float32). Inputs and outputs
# are 2 MiB each. One byte for each pair of query and key, over all heads, would be 16 MiB; nothing may come near.
LIMIT = 12 * 2**20
assert HEADS * Q_LEN * KV_LEN == 2**24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would make seconds of these sizes into minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LargestStorage(TorchDispatchMode):
    """The largest storage among the results of every operation that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.operation = t.untyped_storage().nbytes(), f"{func} {t.dtype} {tuple(t.shape)}"
        return result


PADDING = torch.arange(KV_LEN) < KV_LEN - 100
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool_padding": {"attn_mask": PADDING},
    "float_padding": {"attn_mask": torch.where(PADDING, 0.0, -math.inf)},
    "bias_of_keys": {"attn_mask": torch.linspace(-1, 0, KV_LEN)},
    "bool_mask_for_all_heads": {"attn_mask": torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril(KV_LEN - Q_LEN)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("recipe", ["exact", "exact_with_lse", "sage2_8b"])
def test_nothing_is_as_large_as_queries_times_keys(recipe: str, options: dict[str, Any]) -> None:
    q = torch.randn(1, HEADS, Q_LEN, DIM)
    k = torch.randn(1, HEADS, KV_LEN, DIM)
    name, _, lse = recipe.partition("_with_")
    with LargestStorage() as largest:
        attention(q, k, k, recipe=name, return_lse=bool(lse), **options)
    assert largest.bytes > 0
    assert largest.bytes < LIMIT, largest.operation


SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from lowbit_attention import attention
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
q, k = torch.randn(1, 1, {q_len}, 16), torch.randn(1, 1, {kv_len}, 16)
attention(q[:, :, :128], k[:, :, :128], k[:, :, :128], recipe="sage2_8b")
before = peak()
out = attention(q, k, k, recipe="sage2_8b")
assert out.isfinite().all()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_peak_of_the_process() -> None:
    """1024 × 65536 logits are 256 MiB of float32. Linear: K and V are 4 MiB each in float32, and the steps from them
    to their packed form (float32, minus the mean, magnitude, scaled, rounded, gathered by head) hold up to six of
    each: 48 MiB. With V's padding and tiles of logits (a few MiB), a third of 256 MiB is not reached.
    """
    script = SCRIPT.format(q_len=1024, kv_len=65536)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80 * 2**20
