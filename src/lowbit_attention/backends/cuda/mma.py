"""`attention_mma`: the kernel for Ampere, Ada and Blackwell as an implementation (csrc/mma/attention.cu).

It also runs on Hopper, where it is tested and serves the recipes that `attention_wgmma` does not have.
"""

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
from ...recipes.granularity import PerBlock, PerChannel, PerThread, PerWarp
from ...recipes.machine import MACHINES, Machine
from ...recipes.named import RECIPES
from ...recipes.named import recipe as find_recipe
from ...recipes.options import AllTokens, RunningMax
from ...reference.rotation import hadamard_size
from ..base import Implementation, Output, inference_only
from .instances import (
    DTYPE_CODES,
    INT4_MMA_ARCHS,
    MMA_GEOMETRY,
    MmaConfig,
    mma_config,
    pack_instance,
    padded_head_dim,
    smooth_q_instance,
)
from .jit.bindings import compiler_reasons
from .launch import Arguments, Kernel, cache, load
from .packing import Packer, PackPlan, has_dependent_launch, loadable, packer, sample_reasons
from .schedule import heads_side_by_side, log2_rounded_down, request_reasons, schedule

ARCH_OF = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90",
    (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip
"""Compute capability → what its machine code is compiled for."""

_AUTO = {"sm_80": ("int8_fp16",), "sm_86": ("int8_fp16",), "sm_89": ("sage2pp_8b",), "sm_120": ("sage2pp_8b",)}
"""What ``auto`` may run, the fastest first; elsewhere FP8 MMAs are emulated, and nothing is gained."""

_GRANULARITIES = {PerThread(): 0, PerWarp(): 1, PerBlock(): 2}
"""`QGranularity` of csrc/mma/quantize_q.cuh."""

_LARGEST_FAST_FACTOR = {8: 0.0625, 4: 0.5}
"""Units of a score in logits, above which tiles take the careful way, by bits: a score's own rounding errs by hundreds
of units at 8 bits and by tens at 4, and the fast way adds at most 1.75."""

_MOST_DELTA_BYTES = 64 << 20
"""ΔS held at once, if a quarter of packed K and V is not more."""
_DELTA_TILES = 32
"""Query tiles of a block of ``delta_s`` (kTiles)."""

ARGUMENTS = Arguments("P3q P3q 8P 4f 12i 4i 8I 0q".replace(" ", ""))
"""``MmaArgs``."""
SMOOTH_ARGUMENTS = Arguments("P3q P3q 3P q f 12i 0q".replace(" ", ""))
"""``SmoothArgs``."""


@dataclass(frozen=True)
class _Plan:
    """One call's launches, but for addresses and strides."""

    request: Request
    recipe: Recipe
    config: MmaConfig
    pack: PackPlan
    packer: Packer
    kernel: Kernel
    smooth_q: tuple[Kernel, Kernel] | None  # query_means, delta_s
    q_blocks: int
    query_tiles: int
    heads_a_chunk: int
    levels_a_chunk: int
    q_mean: int  # offsets in the workspace
    delta: int
    workspace_bytes: int
    floats: tuple[float, float]
    integers: tuple[int, ...]
    schedule: tuple[int, ...]


class MmaAttention(Implementation):
    """INT8 or INT4 Q·K and FP8 or FP16 P·V by mma.sync.

    ``int4_mma``: whether 4-bit numbers go through the INT4 MMA (by default where the card has one).
    """

    name = "attention_mma"
    is_kernel = True

    def __init__(self, int4_mma: bool | None = None) -> None:
        self._int4_mma = int4_mma
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def auto_recipes_for(self, request: Request) -> tuple[Recipe, ...]:
        return tuple(RECIPES[name] for name in _AUTO.get(_arch(request.device) or "", ("sage2pp_8b",)))

    def not_worth_reasons(self, request: Request) -> tuple[str, ...]:
        arch = _arch(request.device)
        if arch is None or arch in _AUTO:
            return ()
        return (f"on {arch} FP8 MMAs by mma.sync are made of FP16 ones: no gain over exact attention",)

    def remark(self, request: Request) -> str:
        arch = _arch(request.device)
        how = "" if arch in _AUTO else f"; on {arch} FP8 and INT4 MMAs are made of others: right, not fast"
        if request.recipe is not None and request.recipe.qk_bits == 4 and arch not in INT4_MMA_ARCHS:
            how += f"; 4-bit numbers lie in INT8 lanes on {arch}: INT8's speed"
        return f"runs it, with tiles of {MMA_GEOMETRY}{how}"

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        reasons = list(_device_reasons(request.device))
        reasons += _recipe_reasons(recipe, _arch(request.device))
        reasons += request_reasons(request)
        padded = padded_head_dim(max(request.head_dim, request.v_head_dim))
        if recipe.rotation == "hadamard" and padded is not None and hadamard_size(request.head_dim) != padded:
            reasons.append(
                f"it rotates {padded} channels, and head_dim {request.head_dim} wants {hadamard_size(request.head_dim)}"
            )
        return (*reasons, *inference_only(request))

    def machine(self, device: torch.device) -> Machine:
        """Whose numbers its results have: tiles and accumulators."""
        return MACHINES[{"sm_89": "sm_89", "sm_120": "sm_120a"}.get(_arch(device) or "", "sm_80")]

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
        plan.packer(k, v, plan.pack, workspace.data_ptr(), index)
        out, lse = self._attend(q, k, plan, workspace.data_ptr(), sm_scale, index)
        return (out if out.shape[3] == request.v_head_dim else out[..., : request.v_head_dim]), lse

    def _attend(self, q: Tensor, k: Tensor, plan: _Plan, workspace: int, sm_scale: float, index: int) -> Output:
        request, pack = plan.request, plan.pack
        batch, heads, length, _ = q.shape
        if request.layout == "NHD":
            out = q.new_empty(batch, length, heads, pack.v_head_dim).transpose(1, 2)
        else:
            out = q.new_empty(batch, heads, length, pack.v_head_dim)
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device) if request.return_lse else None

        def launch(first: int, items: int, overlaps: bool) -> None:
            arguments = ARGUMENTS.pointer(
                (
                    q.data_ptr(), *q.stride()[:3],
                    out.data_ptr(), *out.stride()[:3],
                    0 if lse is None else lse.data_ptr(),
                    workspace + pack.k_tiles,
                    workspace + pack.k_mean, workspace + pack.k_largest_scale,
                    workspace + pack.v_scale, workspace + pack.v_mean,
                    workspace + plan.q_mean, workspace + plan.delta,
                    sm_scale, abs(sm_scale) * LOG2E, *plan.floats,
                    *plan.integers[:8], first, *plan.integers[8:], *plan.schedule,
                )
            )  # fmt: skip
            plan.kernel((items, 1, 1), index, arguments, overlaps=overlaps)

        total = batch * heads
        if plan.smooth_q is None:
            launch(0, total * plan.q_blocks, has_dependent_launch(plan.config.arch))
            return out, lse
        query_means, delta_s = plan.smooth_q
        for head in range(0, total, plan.heads_a_chunk):
            chunk = min(plan.heads_a_chunk, total - head)
            for level in range(0, plan.q_blocks, plan.levels_a_chunk):
                levels = min(plan.levels_a_chunk, plan.q_blocks - level)
                arguments = SMOOTH_ARGUMENTS.pointer(
                    (
                        q.data_ptr(), *q.stride()[:3],
                        k.data_ptr(), *k.stride()[:3],
                        workspace + plan.q_mean, workspace + pack.k_mean, workspace + plan.delta,
                        pack.tiles * MMA_GEOMETRY.b_k,
                        sm_scale * LOG2E,
                        request.q_heads, request.kv_heads, request.q_len, request.kv_len, q.shape[3], plan.query_tiles,
                        plan.integers[6],
                        head, level, levels, plan.config.groups, plan.q_blocks,
                    )
                )  # fmt: skip
                if head == level == 0:
                    query_means((plan.query_tiles, total, 1), index, arguments)
                delta_s((pack.tiles, -(-levels * plan.config.groups // _DELTA_TILES), chunk), index, arguments)
                launch(head * plan.q_blocks + level, chunk * levels, False)
        return out, lse

    def _plan(self, request: Request, recipe: Recipe, index: int) -> _Plan:
        key = (id(request), id(recipe))
        found = self._plans.get(key)
        if found is None or found.request is not request or found.recipe is not recipe:
            if len(self._plans) > 1024:
                self._plans.clear()
            found = self._plans[key] = _make_plan(request, recipe, index, self._int4_mma)
        return found


def _make_plan(request: Request, recipe: Recipe, index: int, int4_mma: bool | None) -> _Plan:
    arch = _arch(request.device)
    dim = padded_head_dim(max(request.head_dim, request.v_head_dim))
    if arch is None or dim is None:
        raise ValueError(f"attention_mma cannot run {request}")
    head_dim, v_head_dim = (-(-d // 8) * 8 for d in (request.head_dim, request.v_head_dim))
    config = mma_config(recipe, dim, arch, int4_mma)
    form = config.form
    pack = PackPlan.of(request.batch, request.kv_heads, request.kv_len, head_dim, v_head_dim, recipe, form)
    instances = [pack_instance(dim, request.dtype, arch, form), config.instance()]
    instances += [smooth_q_instance(dim, request.dtype, arch)] if recipe.smooth_q else []
    cache().get_all((i.source(), i.options()) for i in instances)  # (side by side, the first time)
    q_blocks = -(-request.q_len // config.q_rows)
    query_tiles = -(-request.q_len // MMA_GEOMETRY.b_q)
    total = request.batch * request.q_heads
    heads_a_chunk, levels_a_chunk, delta_bytes = total, q_blocks, 0
    if recipe.smooth_q:
        most = max(_MOST_DELTA_BYTES, pack.workspace_bytes // 4)
        block_bytes = config.groups * pack.tiles * MMA_GEOMETRY.b_k * 4
        heads_a_chunk, levels_a_chunk = delta_chunk(total, q_blocks, block_bytes, most)
        delta_bytes = heads_a_chunk * levels_a_chunk * block_bytes
    q_mean = pack.workspace_bytes
    delta = q_mean + (total * query_tiles * dim * 4 if recipe.smooth_q else 0)
    delta = -(-delta // 256) * 256
    offset = request.kv_len if request.causal_offset is None else request.causal_offset
    section = 1 if recipe.smooth_q else heads_side_by_side(request, pack, index, equal=True)
    return _Plan(
        request=request,
        recipe=recipe,
        config=config,
        pack=pack,
        packer=packer(dim, request.dtype, index, arch, form),
        kernel=_kernel(config, index),
        smooth_q=_smooth_q_kernels(dim, request.dtype, arch, index) if recipe.smooth_q else None,
        q_blocks=q_blocks,
        query_tiles=query_tiles,
        heads_a_chunk=heads_a_chunk,
        levels_a_chunk=levels_a_chunk,
        q_mean=q_mean,
        delta=delta,
        workspace_bytes=delta + delta_bytes,
        floats=(log2_rounded_down(recipe.p_max), _LARGEST_FAST_FACTOR[recipe.qk_bits or 8]),
        integers=(
            request.q_heads, request.kv_heads, request.q_len, request.kv_len, head_dim, v_head_dim, offset, pack.tiles,
            DTYPE_CODES[request.dtype], recipe.qk_max, _GRANULARITIES[recipe.q_granularity],
        ),
        schedule=schedule(request, q_blocks, section),
    )  # fmt: skip


def delta_chunk(heads: int, q_blocks: int, block_bytes: int, most_bytes: int) -> tuple[int, int]:
    """For how many heads, and for how many query blocks of each, ΔS is made at once: whole heads, or a part of one.

    Args:
        heads: batch × query heads; q_blocks: of a head; block_bytes: of a query block's ΔS.
        most_bytes: held at once, if one block is not more.
    """
    blocks = most_bytes // block_bytes
    return max(1, min(heads, blocks // q_blocks)), min(q_blocks, max(1, blocks))


@lru_cache(maxsize=64)
def _kernel(config: MmaConfig, device: int) -> Kernel:
    del device
    return load(config.instance(), "attention_mma", config.threads, config.shared_bytes)


@lru_cache(maxsize=64)
def _smooth_q_kernels(dim: int, dtype: torch.dtype, arch: str, device: int) -> tuple[Kernel, Kernel]:
    del device
    instance = smooth_q_instance(dim, dtype, arch)
    return load(instance, "query_means", 128), load(instance, "delta_s", 128)


@lru_cache(maxsize=16)
def _arch(device: torch.device) -> str | None:
    """What the kernels are compiled for on this device; ``None`` if it is none of theirs."""
    if device.type != "cuda":
        return None
    return ARCH_OF.get(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=16)
def _device_reasons(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return (f"it runs on NVIDIA GPUs, not on {device.type}",)
    if _arch(device) is None:
        major, minor = torch.cuda.get_device_capability(device)
        known = ", ".join(f"{a}.{b}" for a, b in ARCH_OF)
        return (f"it runs on compute capabilities {known}, and this card has {major}.{minor}", *compiler_reasons())
    return compiler_reasons()


@lru_cache(maxsize=1024)
def _recipe_reasons(recipe: Recipe, arch: str | None) -> tuple[str, ...]:
    """What of a recipe the kernel does not do."""
    if recipe.is_exact:
        return ("it quantises, and recipe exact does not",)
    wanted: dict[str, tuple[object, ...]] = {
        "qk_bits": (8, 4),
        "q_granularity": tuple(_GRANULARITIES),
        "k_granularity": tuple(_GRANULARITIES),
        "smoothquant_alpha": (None,),
        "pv_format": ("e4m3", "fp16"),
        "v_granularity": (PerChannel(),),
        "v_headroom": (1.0,),
        "v_sample": (AllTokens(),),
        "v_tile_means": (False,),
        "softmax_max": (RunningMax(),),
        "accumulator": ("fp8_f32", "fp8_f16", "fp16", "fp32"),
    }
    reasons = [
        f"it has no {name}={getattr(recipe, name)} (only {' or '.join(map(str, values))})"
        for name, values in wanted.items()
        if getattr(recipe, name) not in values
    ]
    reasons += sample_reasons(recipe)
    if recipe.pv_format == "e4m3" and arch in ("sm_80", "sm_86"):
        reasons.append(f"{arch} has no FP8")
    if recipe.pv_format == "e4m3" and recipe.accumulator == "fp32":
        reasons.append("it has no e4m3 P·V with fp32 sums")
    keys = recipe.promotion_keys(MMA_GEOMETRY)
    if recipe.accumulator in ("fp8_f16", "fp16") and keys != MMA_GEOMETRY.b_k:
        reasons.append(f"it adds {recipe.accumulator} sums every {MMA_GEOMETRY.b_k} keys, not after {keys or 'all'}")
    if recipe.accumulator == "fp8_f32" and keys not in (MMA_GEOMETRY.b_k, None):
        reasons.append(f"it adds fp8_f32 sums every {MMA_GEOMETRY.b_k} keys or never, not every {keys}")
    if recipe.row_sum == "rounded" or (
        recipe.row_sum == "accumulator" and (recipe.pv_format != "e4m3" or keys is None)
    ):
        reasons.append(
            f"it has no row_sum={recipe.row_sum} with {recipe.pv_format} and promotion after {keys or 'all'}"
        )
    if (
        recipe.pv_format == "e4m3"
        and float(round_e4m3(torch.tensor(recipe.v_max, dtype=torch.float32, device="cpu"))) != recipe.v_max
    ):
        reasons.append(f"v_max={recipe.v_max} is no E4M3 number")
    try:
        recipe.check_geometry(MMA_GEOMETRY)
    except InvalidRecipeError as error:
        reasons += error.reasons
    return tuple(reasons)


def kernel_alone(
    q: Tensor, k: Tensor, v: Tensor, recipe: str | Recipe, is_causal: bool = False, sm_scale: float | None = None
) -> Callable[[], object]:
    """A call of the attention kernel alone (with ΔS, if Q is smoothed) on K and V packed once (for benchmarks).

    Args:
        q, k, v: ``[B, H, N, D]`` on a GPU.

    Raises:
        UnsupportedError: the kernel cannot run it, with every reason.
    """

    chosen = find_recipe(recipe)
    request = make_request(
        q, k, v, None, chosen, None, is_causal=is_causal, bottom_right=True, return_lse=False, layout="HND"
    )
    if reasons := MMA_KERNEL.not_supported_reasons(request, chosen):
        raise UnsupportedError(f"{MMA_KERNEL.name} cannot run this call ({request})", {MMA_KERNEL.name: reasons})
    scale = sm_scale if sm_scale is not None else 1.0 / math.sqrt(q.shape[3])
    q, k, v = loadable(q), loadable(k), loadable(v)
    index = q.device.index
    with torch.cuda.device(index):
        plan = MMA_KERNEL._plan(request, chosen, index)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)
        plan.packer(k, v, plan.pack, workspace.data_ptr(), index)

    def call() -> object:
        with torch.cuda.device(index):
            return MMA_KERNEL._attend(q, k, plan, workspace.data_ptr(), scale, index)[0]

    return call


MMA_KERNEL = MmaAttention()
