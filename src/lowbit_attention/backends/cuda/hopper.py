"""`attention_wgmma`: the Hopper kernel as an implementation (csrc/hopper/attention.cu)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...call.masks import LOG2E
from ...call.request import Request, make_request
from ...errors import InvalidRecipeError, UnsupportedError
from ...recipes.definition import Recipe
from ...recipes.formats import round_e4m3
from ...recipes.granularity import PerChannel, PerThread
from ...recipes.named import RECIPES
from ...recipes.named import recipe as find_recipe
from ...recipes.options import AllTokens, RestartedMax, RunningMax
from ..base import Implementation, Output, inference_only
from .instances import TILE_KEYS, WgmmaConfig, pack_instance, padded_head_dim, wgmma_config
from .jit.bindings import compiler_reasons
from .launch import Arguments, Kernel, cache, load
from .packing import Packer, PackPlan, loadable, packer, sample_reasons
from .schedule import Pieces, cut, heads_side_by_side, log2_rounded_down, multiprocessors, request_reasons, schedule
from .speeds import speedup

ARGUMENTS = Arguments("P3q P3q P 7P 6f 11i 4i 8I P i 2P P".replace(" ", ""))
"""``AttentionArgs``; an instance without V's means by tile takes all but the last."""


@dataclass(frozen=True)
class _Plan:
    """One call's launches, but for addresses and strides."""

    request: Request
    recipe: Recipe
    pack: PackPlan
    packer: Packer
    kernel: Kernel
    grid: tuple[int, int, int]
    log2_p_max: float
    max_options: tuple[float, float]
    integers: tuple[int, ...]
    v_head_dim: int
    key_splits: int
    partials: int
    workspace_bytes: int


class HopperAttention(Implementation):
    """INT8 Q·K and FP8 P·V by wgmma on a Hopper GPU."""

    name = "attention_wgmma"
    is_kernel = True
    auto_recipes = (RECIPES["fast_8b"], RECIPES["sage2pp_8b"], RECIPES["sage2_8b"])

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def remark(self, request: Request) -> str:
        return f"runs it, with tiles of {WgmmaConfig.geometry}"

    def measured_speedup(self, request: Request, recipe: Recipe) -> float | None:
        return speedup(request, recipe)

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        reasons = list(_device_reasons(request.device))
        reasons += _recipe_reasons(recipe)
        reasons += request_reasons(request)
        return (*reasons, *inference_only(request))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        index = q.device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.run(q, k, v, mask, sm_scale, request, recipe)
        q, k, v = loadable(q), loadable(k), loadable(v)
        plan = self._plan(request, recipe, index)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)
        address = workspace.data_ptr()
        plan.packer(k, v, plan.pack, address, index)
        out, lse = self._attend(q, plan, address, sm_scale, index)
        return (out if out.shape[3] == plan.v_head_dim else out[..., : plan.v_head_dim]), lse

    def _attend(
        self, q: Tensor, plan: _Plan, workspace: int, sm_scale: float, index: int, overlaps: bool = True
    ) -> Output:
        """``overlaps``: the kernel before this one on the stream is the packing, which Q's writer did not outlast."""
        request, pack = plan.request, plan.pack
        batch, heads, length, _ = q.shape
        if request.layout == "NHD":
            out = q.new_empty(batch, length, heads, pack.v_head_dim).transpose(1, 2)
        else:
            out = q.new_empty(batch, heads, length, pack.v_head_dim)
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device) if request.return_lse else None
        arguments = ARGUMENTS.pointer(
            (
                q.data_ptr(), *q.stride()[:3],
                out.data_ptr(), *out.stride()[:3],
                0 if lse is None else lse.data_ptr(),
                workspace + pack.k_tiles, workspace + pack.k_scales, workspace + pack.v_tiles,
                workspace + pack.k_mean, workspace + pack.k_largest_scale,
                workspace + pack.v_scale, workspace + pack.v_mean,
                sm_scale, abs(sm_scale) * LOG2E, plan.log2_p_max, plan.recipe.p_max, *plan.max_options,
                *plan.integers,
                workspace + pack.zeros, plan.key_splits, workspace + plan.partials, workspace + pack.zeros + 4,
                workspace + pack.v_tile_means,
            )
        )  # fmt: skip
        plan.kernel(plan.grid, index, arguments, overlaps=overlaps)
        return out, lse

    def _plan(self, request: Request, recipe: Recipe, index: int) -> _Plan:
        key = (id(request), id(recipe))
        found = self._plans.get(key)
        if found is None or found.request is not request or found.recipe is not recipe:
            if len(self._plans) > 1024:
                self._plans.clear()
            found = self._plans[key] = _make_plan(request, recipe, index)
        return found


def _make_plan(request: Request, recipe: Recipe, index: int) -> _Plan:
    head_dim, v_head_dim = (-(-d // 8) * 8 for d in (request.head_dim, request.v_head_dim))
    dim = padded_head_dim(max(head_dim, v_head_dim))
    assert dim is not None  # (else the request is not supported)
    config = wgmma_config(recipe, dim, request.dtype)
    pieces, q_blocks = pieces_of(request, config, multiprocessors(index))
    warps = pieces.rest * config.consumers * 4 * (pieces.key_splits > 1)
    pack = PackPlan.of(
        request.batch, request.kv_heads, request.kv_len, head_dim, v_head_dim, recipe, zero_count=1 + warps
    )
    partials = -(-pack.workspace_bytes // 16) * 16
    instances = (pack_instance(pack.dim, request.dtype, "sm_90a", pack.form), config.instance())
    cache().get_all((i.source(), i.options()) for i in instances)  # (side by side, the first time)
    section = heads_side_by_side(request, pack, index, equal=request.q_len % config.q_rows == 0)
    offset = request.kv_len if request.causal_offset is None else request.causal_offset
    integers = (
        request.q_heads, request.kv_heads, request.q_len, request.kv_len, head_dim, v_head_dim,
        offset, pack.tiles, pieces.count, pieces.whole, pieces.rest,
        *schedule(request, q_blocks, section),
    )  # fmt: skip
    kind = recipe.softmax_max
    return _Plan(
        request=request,
        recipe=recipe,
        pack=pack,
        packer=packer(pack.dim, request.dtype, index, form=pack.form),
        kernel=_kernel(config, index),
        grid=(min(pieces.count, multiprocessors(index)), 1, 1),
        log2_p_max=log2_rounded_down(recipe.p_max),
        max_options=(kind.slack, kind.headroom) if isinstance(kind, RestartedMax) else (0.0, 0.0),
        integers=integers,
        v_head_dim=request.v_head_dim,
        key_splits=pieces.key_splits,
        partials=partials,
        workspace_bytes=partials + pieces.key_splits * warps * (dim // 8 + 1) * 32 * 16,
    )


def pieces_of(request: Request, config: WgmmaConfig, places: int) -> tuple[Pieces, int]:
    """How a call's blocks of rows are cut for so many multiprocessors; and how many blocks a head has."""
    q_blocks = -(-request.q_len // config.q_rows)
    can_split = config.output_in_shared and not request.is_causal
    key_tiles = -(-request.kv_len // TILE_KEYS) if can_split else 0
    return cut(q_blocks * request.q_heads * request.batch, places, config.consumers, key_tiles), q_blocks


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


@lru_cache(maxsize=256)
def _recipe_reasons(recipe: Recipe) -> tuple[str, ...]:
    """What of a recipe the kernel does not do."""
    if recipe.is_exact:
        return ("it quantises, and recipe exact does not",)
    wanted = {
        "qk_bits": 8,
        "q_granularity": PerThread(),
        "k_granularity": PerThread(),
        "smooth_q": False,
        "rotation": "none",
        "smoothquant_alpha": None,
        "pv_format": "e4m3",
        "v_granularity": PerChannel(),
        "v_headroom": 1.0,
        "v_scale_power_of_two": False,
        "v_sample": AllTokens(),
    }
    reasons = [
        f"it has no {name}={getattr(recipe, name)} (only {value})"
        for name, value in wanted.items()
        if getattr(recipe, name) != value
    ]
    reasons += sample_reasons(recipe)
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
    if float(round_e4m3(torch.tensor(recipe.v_max, dtype=torch.float32, device="cpu"))) != recipe.v_max:
        reasons.append(f"v_max={recipe.v_max} is no E4M3 number")
    try:
        recipe.check_geometry(WgmmaConfig.geometry)
    except InvalidRecipeError as error:
        reasons += error.reasons
    return tuple(reasons)


def kernel_alone(
    q: Tensor, k: Tensor, v: Tensor, recipe: str | Recipe, is_causal: bool = False, sm_scale: float | None = None
) -> Callable[[], object]:
    """A call of the attention kernel alone on K and V packed once (for benchmarks).

    Args:
        q, k, v: ``[B, H, N, D]`` on a Hopper GPU.

    Raises:
        UnsupportedError: the kernel cannot run it, with every reason.
    """

    chosen = find_recipe(recipe)
    request = make_request(
        q, k, v, None, chosen, None, is_causal=is_causal, bottom_right=True, return_lse=False, layout="HND"
    )
    if reasons := KERNEL.not_supported_reasons(request, chosen):
        raise UnsupportedError(f"{KERNEL.name} cannot run this call ({request})", {KERNEL.name: reasons})
    scale = sm_scale if sm_scale is not None else 1.0 / math.sqrt(q.shape[3])
    q, k, v = loadable(q), loadable(k), loadable(v)
    index = q.device.index
    with torch.cuda.device(index):
        plan = KERNEL._plan(request, chosen, index)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)
        plan.packer(k, v, plan.pack, workspace.data_ptr(), index)

    def call() -> object:
        with torch.cuda.device(index):
            return KERNEL._attend(q, plan, workspace.data_ptr(), scale, index, overlaps=False)[0]

    return call


KERNEL = HopperAttention()
