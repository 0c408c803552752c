"""K and V to tiles that attention kernels load: the host side of csrc/pack/pack.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...recipes.definition import Recipe
from ...recipes.granularity import PerThread
from ...recipes.options import SampledTokens
from ...reference.quantize import Means
from .arguments import Arguments, MaskArgs, PackArgs, SequenceArgs
from .instances import WGMMA_FORMAT, PackFormat, pack_instance, padded_head_dim, wgmma_format
from .launch import Kernel, load
from .layout import unpack_keys, unpack_values

_STATISTICS_THREADS, _PACK_THREADS = 256, 128
_LEAST_SPLIT = 256
"""Tokens below which a head's statistics are not split further."""
_MOST_SPLITS = 32
_MOST_CLUSTER_SPLITS = 8
"""Where the splits of a head are a thread block cluster (kMostClusterSplits). A block has 32 KB of loads under way, and
some 100 of them keep an H100's memory busy: with 13 heads or more, that many splits of V do."""
_CLUSTERED_BLOCKS = 528
"""Blocks of the statistics that run at once: 4 on each of 132 SMs. More splits gained nothing."""
_BLOCKS = 1056
"""Thread blocks that fill the card: 8 on each of 132 SMs."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class PackedLayout:
    """Where the parts of packed K and V lie in one stretch of memory: offsets in bytes, multiples of 256.

    (But those of a record's V and scales.) ``k_stride``, ``v_stride`` and ``k_scale_stride`` lead from one tile's to
    the next one's, in bytes, bytes and floats; ``size``: of all.
    """

    k_tiles: int
    v_tiles: int
    k_scales: int
    k_mean: int
    k_largest_scale: int
    v_scale: int
    v_mean: int
    v_inverse: int
    v_tile_means: int
    partials: int
    k_stride: int
    v_stride: int
    k_scale_stride: int
    size: int

    @classmethod
    def of(cls, heads: int, tiles: int, splits: int, dim: int, form: PackFormat) -> PackedLayout:
        """The layout for so many heads of K (in all batches) with so many splits of the statistics each, and so many
        tiles in all."""
        k_bytes, v_bytes, record = form.k_bytes(dim), form.v_bytes(dim), form.record_bytes(dim)
        of_tile = {"k_tiles": record} if form.is_record else {"k_tiles": k_bytes, "v_tiles": v_bytes, "k_scales": 4 * 4}
        sizes = {name: tiles * size for name, size in of_tile.items()} | {
            "k_mean": heads * dim * 4,
            "k_largest_scale": heads * 4,
            "v_scale": heads * dim * 4,
            "v_mean": heads * dim * 4,
            "v_inverse": heads * dim * 4 if form.has_clusters else 0,
            "v_tile_means": tiles * dim * 2 if form.v_tile_means else 0,
            "partials": 0 if form.has_clusters else 2 * heads * splits * 3 * dim * 4,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += aligned(size)
        if form.is_record:
            offsets |= {"v_tiles": k_bytes, "k_scales": k_bytes + v_bytes}
        return cls(
            **offsets,
            k_stride=record if form.is_record else k_bytes,
            v_stride=record if form.is_record else v_bytes,
            k_scale_stride=record // 4 if form.is_record else 4,
            size=end,
        )


@dataclass(frozen=True)
class StatisticsGrid:
    """How the statistics of K and V are shared out: splits of the tokens, each a thread block's, ``cluster`` of which
    are a thread block cluster. ``k_tokens``: of K's tokens, how many are read."""

    splits: int
    tokens_a_split: int
    k_tokens: int
    blocks: int
    cluster: int

    @classmethod
    def of(
        cls, heads: int, kv_len: int, dim: int, recipe: Recipe, form: PackFormat, split_len: int | None = None
    ) -> StatisticsGrid:
        """The grid for so many heads of K (in all batches). ``split_len``: how long they are, where ``kv_len`` is how
        many tokens all sequences have."""
        k_tokens = min(recipe.k_sample.count, kv_len) if isinstance(recipe.k_sample, SampledTokens) else kv_len
        full_reads = 2 * heads if k_tokens == kv_len else heads  # of V, and of K
        splits, tokens_a_split = _splits(full_reads, split_len or kv_len, dim, form)
        of_k = heads * splits if k_tokens == kv_len else -(-heads // splits) * splits  # (clusters are whole)
        cluster = splits if form.has_clusters else 1
        return cls(splits, tokens_a_split, k_tokens, blocks=heads * splits + of_k, cluster=cluster)


@dataclass(frozen=True)
class PackPlan:
    """Everything about packing K ``[B, Hkv, Nk, D]`` and V ``[B, Hkv, Nk, Dv]`` that their addresses do not change.

    ``heads``: B · Hkv; ``dim``: the channels of a packed head; ``tiles``: of a head, ``tiles_a_block`` of which a
    thread block of ``grid`` packs. Where B sequences of Nk tokens in all lie one behind the other (``form.mask``), a
    head's tiles are those of all of them, as many as there can be.
    """

    heads: int
    kv_heads: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dim: int
    tiles: int
    tiles_a_block: int
    grid: tuple[int, int, int]
    statistics: StatisticsGrid
    layout: PackedLayout
    recipe: Recipe
    form: PackFormat

    @classmethod
    def of(
        cls,
        batch: int,
        kv_heads: int,
        kv_len: int,
        head_dim: int,
        v_head_dim: int,
        recipe: Recipe,
        form: PackFormat | None = None,
    ) -> PackPlan:
        """The plan for these sizes. ``form``: of tiles, by default `attention_wgmma`'s."""
        form = form or wgmma_format(recipe)
        dim = padded_head_dim(max(head_dim, v_head_dim))
        if dim is None:
            raise ValueError(f"head_dim {max(head_dim, v_head_dim)} has no packed form")
        heads = batch * kv_heads
        packs_sequences = form.mask == "sequences"
        tiles = kv_len // form.tile_keys + batch if packs_sequences else -(-kv_len // form.tile_keys)
        tiles_at_once = _PACK_THREADS * 16 * 8 // (dim * form.tile_keys)  # of V, that a block packs
        # Several tiles cost a few percent, but where each block adds up its head's splits, that is worse.
        most_tiles = tiles_at_once if form.has_clusters else min(8, heads * tiles // _BLOCKS)
        tiles_a_block = _power_of_two_below(max(tiles_at_once, most_tiles))
        blocks = tiles // tiles_a_block + batch if packs_sequences else -(-tiles // tiles_a_block)
        split_len = -(-kv_len // batch) if packs_sequences else None
        statistics = StatisticsGrid.of(heads, kv_len, dim, recipe, form, split_len)
        return cls(
            heads=heads,
            kv_heads=kv_heads,
            kv_len=kv_len,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            dim=dim,
            tiles=tiles,
            tiles_a_block=tiles_a_block,
            grid=(blocks, kv_heads, 2) if packs_sequences else _pack_grid(blocks, heads),
            statistics=statistics,
            layout=PackedLayout.of(
                heads, (kv_heads if packs_sequences else heads) * tiles, statistics.splits, dim, form
            ),
            recipe=recipe,
            form=form,
        )

    @cached_property
    def arguments(self) -> Arguments[PackArgs]:
        """The kernels' arguments, but for addresses, strides and what attention wants to be zero."""
        recipe, layout, statistics = self.recipe, self.layout, self.statistics
        return Arguments(
            PackArgs(
                k_stride=layout.k_stride,
                v_stride=layout.v_stride,
                k_scale_stride=layout.k_scale_stride,
                v_max=recipe.v_max,
                heads=self.heads,
                kv_heads=self.kv_heads,
                kv_len=self.kv_len,
                k_channels=self.head_dim,
                v_channels=self.v_head_dim,
                splits=statistics.splits,
                tokens_a_split=statistics.tokens_a_split,
                k_tokens=statistics.k_tokens,
                tiles=self.tiles,
                tiles_a_block=self.tiles_a_block,
                smooth_k=recipe.smooth_k,
                smooth_v=recipe.smooth_v,
                k_max=recipe.qk_max,
                one_k_scale=not isinstance(recipe.k_granularity, PerThread),
                zero_scale_is_zero=self.form.is_record,
                v_power_of_two=recipe.v_scale_power_of_two,
            )
        )


MOST_ROWS = 65535
"""Of a grid: CUDA's limit of its second and third dimension."""


def _pack_grid(blocks: int, heads: int) -> tuple[int, int, int]:
    """Blocks of tiles, heads, and V and K; heads beyond the limit come in the third dimension."""
    return blocks, min(heads, MOST_ROWS), 2 * -(-heads // MOST_ROWS)


def aligned(size: int, to: int = _ALIGNMENT) -> int:
    """A number of bytes, rounded up to where the next part of a workspace may begin."""
    return -(-size // to) * to


def statistics_bytes(dim: int, dtype: torch.dtype) -> int:
    """Size of the statistics' ``StatisticsShared``: copies under way (or what lanes hand over), and a cluster's."""
    loads = 2 * (2 if dtype == torch.float32 else 4) * _STATISTICS_THREADS * 8 * dtype.itemsize
    lanes = _STATISTICS_THREADS * 8 // dim * dim * 3 * 4
    return max(loads, lanes) + 3 * _MOST_CLUSTER_SPLITS * dim * 4


def _tokens_at_once(dim: int) -> int:
    """Tokens that a block of the statistics loads with one instruction a thread."""
    return _STATISTICS_THREADS * 8 // dim


def _splits(reads: int, kv_len: int, dim: int, form: PackFormat) -> tuple[int, int]:
    """In how many splits statistics are taken, and how many tokens each but the last has.

    ``reads``: how many heads of K and V are read whole.
    """
    most = max(1, kv_len // _LEAST_SPLIT)
    at_once = _tokens_at_once(dim)
    if form.has_clusters:  # (a power of two: not every other size fills a GPC)
        splits = _power_of_two_below(max(1, min(_CLUSTERED_BLOCKS // reads, most, _MOST_CLUSTER_SPLITS)))
        return splits, -(-kv_len // (splits * at_once)) * at_once
    in_flight = at_once * 8
    tokens_a_split = -(-kv_len // (min(-(-_BLOCKS // reads), most, _MOST_SPLITS) * in_flight)) * in_flight
    return -(-kv_len // tokens_a_split), tokens_a_split


def _power_of_two_below(x: int) -> int:
    return 1 << (x.bit_length() - 1)


class Packer:
    """The packing kernels for one input type and padded head dimension."""

    def __init__(self, head_dim: int, dtype: torch.dtype, arch: str, form: PackFormat) -> None:
        instance = pack_instance(head_dim, dtype, arch, form)
        self._overlaps = has_dependent_launch(arch)
        self._statistics: Kernel = load(instance, "statistics", _STATISTICS_THREADS, statistics_bytes(head_dim, dtype))
        self._pack: Kernel = load(instance, "pack", _PACK_THREADS)

    def __call__(
        self,
        k: Tensor,
        v: Tensor,
        plan: PackPlan,
        address: int,
        device: int,
        zeros: int = 0,
        zero_count: int = 0,
        mask: MaskArgs | None = None,
        sequences: SequenceArgs | None = None,
    ) -> None:
        """Launch both kernels.

        ``address``: of ``plan.layout.size`` bytes; ``zeros``: of ``zero_count`` 32-bit words that attention wants to
        be 0. ``mask``: which keys count, if ``plan.form`` has a mask; ``sequences``: where they lie, if it has them.
        """
        layout, arguments = plan.layout, plan.arguments
        args = arguments.values
        args.k.point_to(k)
        args.v.point_to(v)
        args.partials = address + layout.partials
        args.k_tiles = address + layout.k_tiles
        args.k_scales = address + layout.k_scales
        args.v_tiles = address + layout.v_tiles
        args.k_mean = address + layout.k_mean
        args.k_largest_scale = address + layout.k_largest_scale
        args.v_scale = address + layout.v_scale
        args.v_mean = address + layout.v_mean
        args.v_inverse = address + layout.v_inverse
        if mask is not None:
            args.mask = mask
        if sequences is not None:
            args.sequences = sequences
        args.zeros = zeros
        args.zero_count = zero_count
        args.v_tile_means = address + layout.v_tile_means
        statistics = plan.statistics
        self._statistics((statistics.blocks, 1, 1), device, arguments.address, cluster=statistics.cluster)
        self._pack(plan.grid, device, arguments.address, overlaps=self._overlaps)


@lru_cache(maxsize=64)
def packer(
    head_dim: int, dtype: torch.dtype, device: int, arch: str = "sm_90a", form: PackFormat = WGMMA_FORMAT
) -> Packer:
    """The packing kernels, loaded once a device."""
    del device
    return Packer(head_dim, dtype, arch, form)


def has_dependent_launch(arch: str) -> bool:
    """Whether a kernel may begin while the one before it ends (griddepcontrol)."""
    return int(arch.removeprefix("sm_").rstrip("a")) >= 90


def loadable(x: Tensor) -> Tensor:
    """``x`` if kernels can load it as it is, else a copy: channels next to each other, tokens at 16-byte addresses.

    The copy's channels are padded with zeros to a multiple of 8.
    """
    b, h, n, c = x.stride()
    if c == 1 and x.shape[3] % 8 == 0 and not (x.data_ptr() | (b | h | n) * x.element_size()) & 15:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[3] % 8)).contiguous()


@dataclass(frozen=True)
class PackedTiles:
    """Packed K and V on the device.

    k ``[B, Hkv, Nk, D]`` INT8 (4-bit numbers, too), k_scale ``[B, Hkv, 4 · T]`` (four a tile), v ``[B, Hkv, Nk, Dv]``
    float32 holding E4M3 or FP16 numbers, v_scale ``[B, Hkv, Dv]``, means ``[B, Hkv, D or Dv]``, k_largest_scale
    ``[B, Hkv]``, v_tile_means ``[B, Hkv, T, Dv]`` FP16 if the form has them.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    k_mean: Tensor
    v_mean: Tensor
    k_largest_scale: Tensor
    padding_is_zero: bool
    v_tile_means: Tensor | None = None

    def means(self) -> Means:
        """The kernel's means, as the reference takes them."""
        v_tiles = None if self.v_tile_means is None else self.v_tile_means.float()
        return Means(k=self.k_mean, v=self.v_mean, v_tiles=v_tiles)


def pack_kv(k: Tensor, v: Tensor, recipe: Recipe, form: PackFormat | None = None, arch: str = "sm_90a") -> PackedTiles:
    """Pack ``[B, Hkv, Nk, D]`` tensors with the kernels and read the result back into plain order (for tests)."""
    form = form or wgmma_format(recipe)
    batch, heads, length = k.shape[:3]
    head_dim, v_head_dim = k.shape[3], v.shape[3]
    k, v = loadable(k), loadable(v)
    plan = PackPlan.of(batch, heads, length, k.shape[3], v.shape[3], recipe, form)
    workspace = torch.full((plan.layout.size,), 0xFF, dtype=torch.uint8, device=k.device)
    with torch.cuda.device(k.device):
        packer(plan.dim, k.dtype, k.device.index, arch, form)(k, v, plan, workspace.data_ptr(), k.device.index)

    layout = plan.layout

    def part(offset: int, *shape: int) -> Tensor:
        count = torch.Size(shape).numel() * 4
        return workspace[offset : offset + count].view(torch.float32).reshape(batch, heads, *shape[1:])

    def tiles(offset: int, stride: int, size: int) -> Tensor:
        rows = workspace[offset:].as_strided(
            (batch, heads, plan.tiles, size), (heads * plan.tiles * stride, plan.tiles * stride, stride, 1)
        )
        return rows.contiguous()

    pairs, dim = batch * heads, plan.dim
    keys = unpack_keys(tiles(layout.k_tiles, layout.k_stride, form.k_bytes(dim)), dim, form)
    values = unpack_values(tiles(layout.v_tiles, layout.v_stride, form.v_bytes(dim)), dim, form).float()
    k_scale = tiles(layout.k_scales, 4 * layout.k_scale_stride, 16).view(torch.float32).flatten(2)
    if form.is_record:  # where a group of zeros has the scale 0
        k_scale = torch.where(k_scale == 0, 1.0, k_scale)
    if not isinstance(recipe.k_granularity, PerThread):  # all four are the same
        k_scale = k_scale[..., ::4]
    inside = dim if form.rotate else head_dim  # (a rotation fills the padding)
    rest = [keys[..., length:, :], keys[..., inside:], values[..., length:, :], values[..., v_head_dim:]]
    v_tile_means = None
    if form.v_tile_means:
        v_tile_means = tiles(layout.v_tile_means, 2 * dim, 2 * dim).view(torch.float16)
        rest.append(v_tile_means[..., v_head_dim:])
    return PackedTiles(
        k=keys[:, :, :length, :inside],
        k_scale=k_scale,
        v=values[:, :, :length, :v_head_dim],
        v_scale=part(layout.v_scale, pairs, dim)[..., :v_head_dim],
        k_mean=part(layout.k_mean, pairs, dim)[..., :head_dim],
        v_mean=part(layout.v_mean, pairs, dim)[..., :v_head_dim],
        k_largest_scale=part(layout.k_largest_scale, pairs),
        padding_is_zero=not any(bool(x.any()) for x in rest),
        v_tile_means=None if v_tile_means is None else v_tile_means[..., :v_head_dim],
    )
