"""A caller's mask to what the kernels read: the host side of csrc/mask/mask.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...call.mask_types import ALiBi, KeyPadding, Mask, Window, from_text
from ...call.masks import lists_keys
from ...call.request import Request
from .arguments import Arguments, MaskArgs, PrepareArgs
from .configs import DTYPE_CODES, MaskForm, mask_instance
from .launch import Kernel, load
from .packing import aligned

_ROWS = 64
"""Rows of a block of bits (kMaskRows)."""
_PREPARED = {field[0] for field in MaskArgs._fields_}
_LIST_THREADS, _PACK_THREADS, _TILES_A_BLOCK = 1024, 256, 16
"""Of a thread block (kListThreads, kPackThreads), and of one that packs a tensor (kTilesABlock)."""
_PACK_WARPS = _PACK_THREADS // 32
_PLACE_THREADS, _MOST_PLACE_BLOCKS = 256, 1024
"""Of a thread block (kPlaceThreads), and blocks a plane; more rows or keys are more turns."""


def mask_form(request: Request) -> MaskForm:
    """How a request's mask reaches the kernels (or that it is of sequences, which have none)."""
    if request.sequences:
        return "sequences"
    if request.mask_shape is None:
        return "none"
    if request.mask == "float":
        return "bias"
    return "keys" if lists_keys(request.mask_shape, request.q_heads, request.kv_heads, request.is_causal) else "bits"


def is_by_place(request: Request) -> bool:
    """Whether the mask is prepared from its few numbers, so that it is never a tensor of every pair.

    Not ALiBi where a row may see keys but not the one that its distances are from: how far its largest bias is from the
    others is then no matter of key − row.
    """
    text = request.mask_text
    if text == "key_padding":
        return mask_form(request) == "keys"
    if text == "alibi":
        return request.q_len <= request.kv_len or (request.is_causal and request.bottom_right)
    return text.startswith("window")


_REMARKS: dict[MaskForm, str] = {
    "none": "",
    "sequences": "; statistics and tiles by sequence, whose lengths stay on the device",
    "keys": "; only the keys that the mask shows are packed",
    "bits": "; the mask as a bit a score, and only the key tiles that some of a block's queries see",
    "bias": "; the mask as FP16 biases, and only the key tiles that some of a block's queries see",
}


def mask_remark(request: Request) -> str:
    """What `explain` says of a request's mask."""
    how = ""
    if request.mask_text != "tensor":
        how = ", from its numbers alone" if is_by_place(request) else ", written out as a tensor first"
    return _REMARKS[mask_form(request)] + how


class _Kernels(NamedTuple):
    list_keys: Kernel
    pack_bits: Kernel
    largest_biases: Kernel
    pack_biases: Kernel
    list_tiles: Kernel
    list_by_place: Kernel
    pack_diagonals: Kernel


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskPlan:
    """The launches that prepare a request's mask, and where what they write lies in ``size`` bytes of memory.

    The first ``zeroed`` bytes are zeros before them. ``lists``, ``planes``: how many there are (csrc/common/masks.cuh).
    """

    form: MaskForm
    by_place: bool
    lists: int
    planes: int
    tile_chunks: int
    place_chunks: int
    offsets: dict[str, int]
    zeroed: int
    size: int
    arguments: Arguments[PrepareArgs]
    mask: MaskArgs
    kernels: _Kernels

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
        by_place, blocks = is_by_place(request), _Blocks.of(row_blocks, tiles)
        if by_place:
            blocks = _Blocks.of_diagonals(row_blocks, tiles, tile_keys, request.kv_len)
        list_size = 2 if by_place else 1 + tiles
        sizes = {"key_counts": 4 * lists, "keys": 4 * lists * request.kv_len}
        if form != "keys":
            places = planes * blocks.total * _ROWS * tile_keys
            sizes = {
                "key_seen": lists * tiles * tile_keys // 8,
                "row_seen": planes * row_blocks * _ROWS,
                **sizes,
                "tile_lists": 4 * planes * q_blocks * list_size,
                "tile_seen": 0 if by_place else planes * row_blocks * tiles,
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
        first, last = _window(request)
        arguments = PrepareArgs(
            q_len=request.q_len,
            kv_len=request.kv_len,
            causal_offset=last,
            first_offset=first,
            planes_a_batch=heads,
            lists_a_batch=heads // group,
            group=group,
            dtype=DTYPE_CODES.get(request.mask_dtype or request.dtype, 0),
            tiles=tiles,
            row_blocks=row_blocks,
            lists_seen=form != "keys",
            q_blocks=q_blocks,
            row_blocks_a_block=q_rows // _ROWS,
            shift=request.kv_len - request.q_len,
            nearest=max(0, request.kv_len - request.q_len - last),
            diagonals=blocks.diagonals,
            blocks=blocks.total,
        )
        mask = MaskArgs(
            list_batch=heads // group if batches > 1 else 0,
            list_head=int(heads > 1),
            plane_batch=heads if batches > 1 else 0,
            plane_head=int(heads > 1),
            row_blocks=row_blocks,
            tile_list_size=list_size,
            row_step=blocks.row_step,
            tile_step=blocks.tile_step,
            last_step=blocks.last_step,
            plane_step=blocks.total - row_blocks * blocks.row_step,
            first_block=blocks.first,
            last_tile=tiles - 1,
        )
        rows_and_keys = max(row_blocks * _ROWS, tiles * tile_keys)
        return cls(
            form=form,
            by_place=by_place,
            lists=lists,
            planes=planes,
            tile_chunks=-(-tiles // _TILES_A_BLOCK),
            place_chunks=min(-(-rows_and_keys // _PLACE_THREADS), _MOST_PLACE_BLOCKS),
            offsets=offsets,
            zeroed=0 if form == "keys" or by_place else offsets["key_counts"],
            size=end,
            arguments=Arguments(arguments),
            mask=mask,
            kernels=_kernels(tile_keys, arch, request.device.index),
        )

    def prepare(self, mask: Mask, memory: Tensor, first: int, device: int) -> MaskArgs:
        """Launch the kernels on a mask of four dimensions, ``[B or 1, Hq or 1, Nq or 1, Nk or 1]``, or of few numbers.

        ``memory``: of which ``size`` bytes from ``first`` on are written. Returns where everything lies.
        """
        if isinstance(mask, Tensor) == self.by_place:
            raise ValueError(f"the plan is for a mask {'of few numbers' if self.by_place else 'written out'}")
        args, address = self.arguments.values, memory.data_ptr() + first
        place = {name: address + offset for name, offset in self.offsets.items()}
        for name, at in place.items():
            setattr(args, name, at)
        if isinstance(mask, Tensor):
            self._prepare_tensor(mask, memory[first : first + self.zeroed], device)
        else:
            self._prepare_by_place(mask, device)
        out = MaskArgs.from_buffer_copy(self.mask)
        for name in _PREPARED & place.keys():
            setattr(out, name, place[name])
        return out

    def _prepare_tensor(self, mask: Tensor, zeros: Tensor, device: int) -> None:
        args, address = self.arguments.values, self.arguments.address
        args.mask = mask.data_ptr()
        args.batch, args.head, args.row, args.key = (
            0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        if self.form != "keys":
            zeros.zero_()
            row_blocks = self.planes * args.row_blocks
            if self.form == "bits":
                self.kernels.pack_bits((row_blocks, self.tile_chunks, 1), device, address)
            else:
                self.kernels.largest_biases((row_blocks, _ROWS // _PACK_WARPS, 1), device, address)
                self.kernels.pack_biases((row_blocks, self.tile_chunks, 1), device, address)
            self.kernels.list_tiles((self.planes * args.q_blocks, 1, 1), device, address)
        self.kernels.list_keys((self.lists, 1, 1), device, address)

    def _prepare_by_place(self, mask: Mask, device: int) -> None:
        args, address = self.arguments.values, self.arguments.address
        if isinstance(mask, ALiBi):
            args.slopes = mask.slopes.data_ptr()
            *batch, args.head = mask.slopes.stride()
            args.batch = batch[0] if batch else 0
        elif isinstance(mask, KeyPadding):
            args.kv_lens, args.batch = mask.kv_lens.data_ptr(), mask.kv_lens.stride(0)
            args.long_lens = mask.kv_lens.dtype == torch.int64
        self.kernels.list_by_place((self.planes, self.place_chunks, 1), device, address)
        if self.form != "keys":
            self.kernels.pack_diagonals((self.planes * -(-args.blocks // _PACK_WARPS), 1, 1), device, address)


class _Blocks(NamedTuple):
    """How many blocks of bits or biases a plane has, of these as diagonals, and which are where (`MaskArgs`)."""

    total: int
    diagonals: int
    first: int
    row_step: int
    tile_step: int
    last_step: int

    @classmethod
    def of(cls, row_blocks: int, tiles: int) -> _Blocks:
        """Each has its own."""
        return cls(row_blocks * tiles, 0, 0, tiles if row_blocks > 1 else 0, 1, 0)

    @classmethod
    def of_diagonals(cls, row_blocks: int, tiles: int, tile_keys: int, kv_len: int) -> _Blocks:
        """Those on a diagonal are one, but for a last tile that is not full: behind them for each block of rows."""
        step = tile_keys // _ROWS
        diagonals = row_blocks + (tiles - 1) * step
        own = row_blocks if kv_len % tile_keys else 0
        return cls(diagonals + own, diagonals, row_blocks - 1, -1, step, own)


def _window(request: Request) -> tuple[int, int]:
    """Row i sees keys from i + the first to i + the second of these, as far as there are any."""
    first, last = -request.q_len, request.kv_len if request.causal_offset is None else request.causal_offset
    if request.mask_text.startswith("window"):
        window = from_text(request.mask_text, [])
        assert isinstance(window, Window)
        shift = request.kv_len - request.q_len
        first = first if window.left is None else max(first, shift - window.left)
        last = last if window.right is None else min(last, shift + window.right)
    return first, last


@lru_cache(maxsize=32)
def _kernels(tile_keys: int, arch: str, device: int) -> _Kernels:
    del device
    instance = mask_instance(tile_keys, arch)
    return _Kernels(
        load(instance, "list_keys", _LIST_THREADS),
        load(instance, "pack_bits", _PACK_THREADS),
        load(instance, "largest_biases", _PACK_THREADS),
        load(instance, "pack_biases", _PACK_THREADS),
        load(instance, "list_tiles", 32),
        load(instance, "list_by_place", _PLACE_THREADS),
        load(instance, "pack_diagonals", _PACK_THREADS),
    )
