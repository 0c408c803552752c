"""`attention_wgmma`: the Hopper kernel as an implementation (csrc/hopper/attention.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...call.request import Request
from ...recipes.definition import Recipe
from ...recipes.granularity import PerChannel, PerThread
from ...recipes.named import RECIPES
from ...recipes.options import AllTokens, RestartedMax, RunningMax
from .arguments import Arguments, AttentionArgs
from .instances import (
    TILE_KEYS,
    Instance,
    MaskForm,
    PackFormat,
    WgmmaConfig,
    padded_head_dim,
    wgmma_config,
    wgmma_format,
)
from .jit.bindings import compiler_reasons
from .kernel import AttentionPlan, CudaKernel, PackedKV, Packing, out_strides, point_to_call, sizes
from .launch import Kernel, load
from .mask import MaskPlan, mask_form, mask_remark
from .packing import aligned
from .schedule import WorkTiles, heads_side_by_side, log2_rounded_down, schedule, sm_count, work_tiles
from .sequences import SequencesPlan
from .support import EXACT, number_reasons, option_reasons


class HopperAttention(CudaKernel):
    """INT8 Q·K and FP8 P·V by wgmma on a Hopper GPU."""

    name = "attention_wgmma"
    takes_sequences = True
    auto_recipes = (RECIPES["fast_8b"], RECIPES["sage2pp_8b"], RECIPES["sage2_8b"])

    def remark(self, request: Request) -> str:
        return f"runs it, with tiles of {WgmmaConfig.geometry}{mask_remark(request)}"

    def device_reasons(self, device: torch.device) -> tuple[str, ...]:
        return _device_reasons(device)

    def recipe_reasons(self, recipe: Recipe, device: torch.device) -> tuple[str, ...]:
        return _recipe_reasons(recipe)

    def pack_format(self, recipe: Recipe, dim: int, device: torch.device, mask: MaskForm) -> tuple[str, PackFormat]:
        return "sm_90a", wgmma_format(recipe, mask)

    def work_rows(self, recipe: Recipe, dim: int, device: torch.device) -> int:
        return wgmma_config(recipe, dim, torch.bfloat16).q_rows

    def instances(self, request: Request, recipe: Recipe) -> list[Instance]:
        return [_config(request, recipe).instance()]

    def make_plan(self, request: Request, recipe: Recipe, packing: Packing) -> WgmmaPlan:
        config, pack, device = _config(request, recipe), packing.plan, request.device.index
        if request.sequences:  # (how many work tiles there are, the device knows)
            most = (request.q_len // config.q_rows + request.sequences) * request.q_heads
            tiles, q_blocks = WorkTiles(most, 0, most), 1
        else:
            tiles, q_blocks = work_tiles_of(request, config, sm_count(device))
        warps = tiles.tail * config.consumers * 4 if tiles.key_splits > 1 else 0
        zero_count = 1 + warps  # work tiles taken, and the splits that have come for each warp
        section = heads_side_by_side(request, pack, device, equal=request.q_len % config.q_rows == 0)
        arguments = AttentionArgs(
            **sizes(request, pack),
            **out_strides(request, pack),
            log2_p_max=log2_rounded_down(recipe.p_max),
            p_max=recipe.p_max,
            **_max_options(recipe),
            tiles=pack.tiles,
            items=tiles.count,
            whole_items=tiles.whole,
            rest=tiles.tail,
            schedule=schedule(request, q_blocks, section),
            key_splits=tiles.key_splits,
        )
        partial_sums = tiles.key_splits * warps * (config.head_dim // 8 + 1) * 32 * 16
        return WgmmaPlan(
            request=request,
            recipe=recipe,
            packing=packing,
            zero_count=zero_count,
            scratch_size=aligned(4 * zero_count) + partial_sums,
            kernel=_kernel(config, device),
            grid=(min(tiles.count, sm_count(device)), 1, 1),
            arguments=Arguments(arguments),
            partials=aligned(4 * zero_count),
            mask=MaskPlan.of(request, "sm_90a", TILE_KEYS, config.q_rows),
            sequences=SequencesPlan.of(request, "sm_90a", pack, config.q_rows),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class WgmmaPlan(AttentionPlan):
    """One launch. ``partials``: where the split-KV work tiles' sums lie in the scratch memory, behind the zeros."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Arguments[AttentionArgs]
    partials: int

    def launch(
        self,
        q: Tensor,
        packed: PackedKV,
        scratch: int,
        out: Tensor,
        lse: Tensor | None,
        sm_scale: float,
        device: int,
        after_packing: bool,
    ) -> None:
        arguments, layout, address = self.arguments, packed.plan.layout, packed.address
        args = arguments.values
        point_to_call(args, q, packed, out, lse, sm_scale)
        args.k_tiles = address + layout.k_tiles
        args.k_scales = address + layout.k_scales
        args.v_tiles = address + layout.v_tiles
        args.v_tile_means = address + layout.v_tile_means
        args.taken = scratch
        args.arrivals = scratch + 4
        args.partials = scratch + self.partials
        self.kernel(self.grid, device, arguments.address, overlaps=after_packing)


def _config(request: Request, recipe: Recipe) -> WgmmaConfig:
    dim = padded_head_dim(max(request.head_dim, request.v_head_dim))
    assert dim is not None  # (else the request is not supported)
    return wgmma_config(recipe, dim, request.dtype, mask_form(request))


def _max_options(recipe: Recipe) -> dict[str, float]:
    """The fields of a restarted maximum."""
    kind = recipe.softmax_max
    if not isinstance(kind, RestartedMax):
        return {}
    bits = recipe.jump_bits(WgmmaConfig.geometry)
    return {
        "slack": kind.slack,
        "headroom": kind.headroom,
        "jump": kind.jump or 0.0,
        "jump_bits": float(bits or 0),
    }


def work_tiles_of(request: Request, config: WgmmaConfig, sms: int) -> tuple[WorkTiles, int]:
    """A call's work tiles for so many SMs, and how many blocks of rows a head has."""
    q_blocks = -(-request.q_len // config.q_rows)
    can_split = config.output_in_shared and not request.is_causal
    key_tiles = -(-request.kv_len // TILE_KEYS) if can_split else 0
    return work_tiles(q_blocks * request.q_heads * request.batch, sms, config.consumers, key_tiles), q_blocks


@lru_cache(maxsize=64)
def _kernel(config: WgmmaConfig, device: int) -> Kernel:
    del device
    return load(config.instance(), "attention_wgmma", config.threads, config.shared_bytes)


@lru_cache(maxsize=16)
def _device_reasons(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return (f"it runs on Hopper GPUs, not on {device.type}",)
    reasons = []
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        reasons.append(
            f"it runs on Hopper GPUs (compute capability 9.0), and this one has {'.'.join(map(str, capability))}"
        )
    reasons += compiler_reasons()
    return tuple(reasons)


_TAKEN: dict[str, tuple[object, ...]] = {
    "qk_bits": (8,),
    "q_granularity": (PerThread(),),
    "k_granularity": (PerThread(),),
    "smooth_q": (False,),
    "rotation": ("none",),
    "smoothquant_alpha": (None,),
    "pv_format": ("e4m3",),
    "v_granularity": (PerChannel(),),
    "v_headroom": (1.0,),
    "v_scale_power_of_two": (False,),
    "v_sample": (AllTokens(),),
}
"""The values of a recipe's options that it takes; of the others see `_recipe_reasons`."""


@lru_cache(maxsize=256)
def _recipe_reasons(recipe: Recipe) -> tuple[str, ...]:
    """What of a recipe the kernel does not do."""
    if recipe.is_exact:
        return EXACT
    reasons = list(option_reasons(recipe, _TAKEN))
    keys = recipe.promotion_keys(WgmmaConfig.geometry)
    if recipe.accumulator not in ("fp8_f32", "fp8_f16"):
        reasons.append(f"it has no {recipe.accumulator} sums")
    tile = WgmmaConfig.geometry.b_k
    if recipe.accumulator == "fp8_f32" and keys != tile:
        # (longer sums gave wrong numbers on the card, and spilled: they are slower and less accurate than a tile's)
        reasons.append(f"it promotes FP32-typed sums after {tile} keys, not after {keys or 'all'}")
    elif keys is None or (keys % tile and keys != 64):
        reasons.append(f"it promotes after 64 keys or a multiple of {tile}, not after {keys or 'all'}")
    if recipe.v_tile_means and (recipe.accumulator != "fp8_f16" or (keys or 0) <= tile):
        multiple = f"fp8_f16 sums over more than {tile} keys"
        reasons.append(f"it has v_tile_means only with {multiple}, not {recipe.accumulator} over {keys or 'all'}")
    if not isinstance(recipe.softmax_max, RunningMax | RestartedMax):
        reasons.append(f"it has no softmax_max={recipe.softmax_max}")
    if recipe.row_sum == "rounded":
        reasons.append("it has no row_sum=rounded")
    if recipe.row_sum == "unrounded" and isinstance(recipe.softmax_max, RestartedMax):
        reasons.append("it has no restarted maximum with row_sum=unrounded")
    return (*reasons, *number_reasons(recipe, WgmmaConfig.geometry))


KERNEL = HopperAttention()
