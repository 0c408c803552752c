"""A caller's bool mask to what the kernels read: the host side of csrc/mask/mask.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ...call.masks import lists_keys
from ...call.request import Request
from .arguments import Arguments, MaskArgs, PrepareArgs
from .configs import DTYPE_CODES, MaskForm, mask_instance
from .launch import Kernel, load
from .packing import aligned

_ROWS = 64
"""Rows of a block of bits (kMaskRows)."""
_PREPARED = {field[0] for field in MaskArgs._fields_}
_LIST_THREADS, _BITS_THREADS, _TILES_A_BLOCK = 1024, 256, 16
"""Of a thread block (kListThreads, kBitsThreads), and of one of ``pack_bits`` (kTilesABlock)."""


def mask_form(request: Request) -> MaskForm:
    """How a request's mask reaches the kernels (or that it is of sequences, which have none)."""
    if request.sequences:
        return "sequences"
    if request.mask_shape is None:
        return "none"
    if request.mask == "float":
        return "bias"
    return "keys" if lists_keys(request.mask_shape, request.q_heads, request.kv_heads, request.is_causal) else "bits"


_REMARKS: dict[MaskForm, str] = {
    "none": "",
    "sequences": "; statistics and tiles by sequence, whose lengths stay on the device",
    "keys": "; only the keys that the mask shows are packed",
    "bits": "; the mask as a bit a score, and only the key tiles that some of a block's queries see",
    "bias": "; the mask as FP16 biases, and only the key tiles that some of a block's queries see",
}


def mask_remark(request: Request) -> str:
    """What `explain` says of a request's mask."""
    return _REMARKS[mask_form(request)]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskPlan:
    """The launches that prepare a request's mask, and where what they write lies in ``size`` bytes of memory.

    The first ``zeroed`` bytes are zeros before them. ``lists``, ``planes``: how many there are (csrc/common/masks.cuh).
    """

    form: MaskForm
    lists: int
    planes: int
    tile_chunks: int
    offsets: dict[str, int]
    zeroed: int
    size: int
    arguments: Arguments[PrepareArgs]
    mask: MaskArgs
    kernels: tuple[Kernel, Kernel, Kernel, Kernel]

    @classmethod
    def of(cls, request: Request, arch: str, tile_keys: int, q_rows: int) -> MaskPlan | None:
        """The plan for a request with a mask, for key tiles and blocks of query rows of that size."""
        form = mask_form(request)
        if form in ("none", "sequences") or request.mask_shape is None:
            return None
        batches, heads = request.mask_shape[:2]  # (of the mask: 1 where it is broadcast)
        group = request.q_heads // request.kv_heads if heads > 1 else 1
        lists, planes = batches * (heads // group), batches * heads
        tiles, row_blocks, q_blocks = (
            -(-request.kv_len // tile_keys),
            1 if request.mask_shape[2] == 1 and not request.is_causal else -(-request.q_len // _ROWS),
            -(-request.q_len // q_rows),
        )
        sizes = {"key_counts": 4 * lists, "keys": 4 * lists * request.kv_len}
        if form != "keys":
            places = planes * row_blocks * tiles * _ROWS * tile_keys
            sizes = {
                "key_seen": lists * tiles * tile_keys // 8,
                "row_seen": planes * row_blocks * _ROWS,
                **sizes,
                "tile_lists": 4 * planes * q_blocks * (1 + tiles),
                "tile_seen": planes * row_blocks * tiles,
                **(
                    {"bits": places // 8}
                    if form == "bits"
                    else {"bias": 2 * places, "row_bias": 4 * planes * row_blocks * _ROWS}
                ),
            }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += aligned(size)
        arguments = PrepareArgs(
            q_len=request.q_len,
            kv_len=request.kv_len,
            causal_offset=request.kv_len if request.causal_offset is None else request.causal_offset,
            first_offset=-request.q_len,
            planes_a_batch=heads,
            lists_a_batch=heads // group,
            group=group,
            dtype=DTYPE_CODES.get(request.mask_dtype or request.dtype, 0),
            tiles=tiles,
            row_blocks=row_blocks,
            lists_seen=form != "keys",
            q_blocks=q_blocks,
            row_blocks_a_block=q_rows // _ROWS,
        )
        mask = MaskArgs(
            list_batch=heads // group if batches > 1 else 0,
            list_head=int(heads > 1),
            plane_batch=heads if batches > 1 else 0,
            plane_head=int(heads > 1),
            row_blocks=row_blocks,
        )
        return cls(
            form=form,
            lists=lists,
            planes=planes,
            tile_chunks=-(-tiles // _TILES_A_BLOCK),
            offsets=offsets,
            zeroed=0 if form == "keys" else offsets["key_counts"],
            size=end,
            arguments=Arguments(arguments),
            mask=mask,
            kernels=_kernels(tile_keys, arch, request.device.index),
        )

    def prepare(self, mask: Tensor, memory: Tensor, first: int, device: int) -> MaskArgs:
        """Launch the kernels on a mask of four dimensions, ``[B or 1, Hq or 1, Nq or 1, Nk or 1]``.

        ``memory``: of which ``size`` bytes from ``first`` on are written. Returns where everything lies.
        """
        args, address = self.arguments.values, memory.data_ptr() + first
        place = {name: address + offset for name, offset in self.offsets.items()}
        for name, at in place.items():
            setattr(args, name, at)
        args.mask = mask.data_ptr()
        args.batch, args.head, args.row, args.key = (
            0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        list_keys, pack_bits, pack_biases, list_tiles = self.kernels
        if self.form != "keys":
            memory[first : first + self.zeroed].zero_()
            if self.form == "bits":
                pack_bits((self.planes * args.row_blocks, self.tile_chunks, 1), device, self.arguments.address)
            else:
                pack_biases((self.planes * args.row_blocks, 1, 1), device, self.arguments.address)
            list_tiles((self.planes * args.q_blocks, 1, 1), device, self.arguments.address)
        list_keys((self.lists, 1, 1), device, self.arguments.address)
        out = MaskArgs.from_buffer_copy(self.mask)
        for name in _PREPARED & place.keys():
            setattr(out, name, place[name])
        return out


@lru_cache(maxsize=32)
def _kernels(tile_keys: int, arch: str, device: int) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    del device
    instance = mask_instance(tile_keys, arch)
    return (
        load(instance, "list_keys", _LIST_THREADS),
        load(instance, "pack_bits", _BITS_THREADS),
        load(instance, "pack_biases", _BITS_THREADS),
        load(instance, "list_tiles", 32),
    )
