"""Sequences of different lengths, packed one behind the other: the host side of csrc/sequences/sequences.cu.

No length is read here: the host knows how many tokens and sequences there are, and plans for as many tiles and work
tiles as that allows at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...call.request import Request
from .arguments import Arguments, PrepareSequencesArgs, SequenceArgs
from .configs import sequences_instance
from .launch import Kernel, load
from .packing import PackPlan, aligned

_THREADS = 1024
"""Of a thread block (kPrepareThreads)."""
_CLEARING_BLOCKS = 131
"""Beside the one that prepares: they look for rows that belong to no sequence."""
_MORE = {"q_starts": 1, "key_starts": 1, "tile_starts": 1, "pack_starts": 1, "item_starts": 1}
"""Elements that arrays have beside one a sequence."""
_ARRAYS = [name for name, *_ in SequenceArgs._fields_ if name not in ("count", "tokens")]


@dataclass(frozen=True, kw_only=True, eq=False)
class SequencesPlan:
    """The launch that prepares a request's sequences, and where what it writes lies in ``size`` bytes of memory."""

    offsets: dict[str, int]
    size: int
    arguments: Arguments[PrepareSequencesArgs]
    kernel: Kernel

    @classmethod
    def of(cls, request: Request, arch: str, pack: PackPlan, q_rows: int) -> SequencesPlan | None:
        """The plan for a request of sequences, for blocks of so many query rows."""
        if not request.sequences:
            return None
        offsets, end = {}, 0
        for name in _ARRAYS:
            offsets[name] = end
            end += aligned(4 * (request.sequences + _MORE.get(name, 0)), 16)
        arguments = PrepareSequencesArgs(
            count=request.sequences,
            q_tokens=request.q_len,
            k_tokens=request.kv_len,
            is_causal=request.is_causal,
            bottom_right=request.bottom_right,
            tile_keys=pack.form.tile_keys,
            tiles_a_block=pack.tiles_a_block,
            q_rows=q_rows,
            q_heads=request.q_heads,
            row_bytes=request.q_heads * pack.v_head_dim * request.dtype.itemsize,
        )
        kernel = _kernel(arch, request.device.index)
        return cls(offsets=offsets, size=aligned(end), arguments=Arguments(arguments), kernel=kernel)

    def prepare(
        self, cu_q: Tensor, cu_k: Tensor, address: int, out: Tensor, lse: Tensor | None, device: int
    ) -> SequenceArgs:
        """Launch it on ``cu_seqlens``; ``address``: of ``size`` bytes. Returns where everything lies."""
        args = self.arguments.values
        args.cu_q, args.cu_k = cu_q.data_ptr(), cu_k.data_ptr()
        args.long_q, args.long_k = cu_q.dtype == torch.int64, cu_k.dtype == torch.int64
        places = SequenceArgs(count=args.count, tokens=args.q_tokens)
        for name, offset in self.offsets.items():
            setattr(args, name, address + offset)
            setattr(places, name, address + offset)
        args.out, args.lse = out.data_ptr(), 0 if lse is None else lse.data_ptr()
        self.kernel((1 + _CLEARING_BLOCKS, 1, 1), device, self.arguments.address)
        return places


@lru_cache(maxsize=16)
def _kernel(arch: str, device: int) -> Kernel:
    del device
    return load(sequences_instance(arch), "prepare_sequences", _THREADS)
