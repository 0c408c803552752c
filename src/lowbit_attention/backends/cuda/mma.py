"""`attention_mma`: the kernel for Ampere, Ada and Blackwell as an implementation (csrc/mma/attention.cu).

It also runs on Hopper, where it is tested and serves the recipes that `attention_wgmma` does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...call.request import Request
from ...recipes.definition import Recipe
from ...recipes.granularity import PerBlock, PerChannel, PerThread, PerWarp
from ...recipes.machine import MACHINES, Machine
from ...recipes.named import RECIPES
from ...recipes.options import AllTokens, RunningMax
from ...reference.rotation import hadamard_size
from .arguments import Arguments, MmaArgs
from .instances import (
    DTYPE_CODES,
    INT4_MMA_ARCHS,
    MMA_GEOMETRY,
    Instance,
    MaskForm,
    MmaConfig,
    PackFormat,
    mma_config,
    packed_mask,
    padded_head_dim,
    smooth_q_instance,
)
from .jit.bindings import compiler_reasons
from .kernel import AttentionPlan, CudaKernel, PackedKV, Packing, out_strides, point_to_call, sizes
from .launch import Kernel, load
from .mask import MaskPlan, mask_form, mask_remark
from .packing import has_dependent_launch
from .schedule import heads_side_by_side, log2_rounded_down, schedule
from .sequences import SequencesPlan
from .smooth_q import SmoothQ
from .support import EXACT, number_reasons, option_reasons

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
"""Units of a score in logits, above which tiles take the exact path, by bits: a score's own rounding errs by hundreds
of units at 8 bits and by tens at 4, and the fast path adds at most 1.75."""


class MmaAttention(CudaKernel):
    """INT8 or INT4 Q·K and FP8 or FP16 P·V by mma.sync.

    ``int4_mma``: whether 4-bit numbers go through the INT4 MMA (by default where the card has one).
    """

    name = "attention_mma"
    takes_sequences = True

    def __init__(self, int4_mma: bool | None = None) -> None:
        super().__init__()
        self._int4_mma = int4_mma

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
        return f"runs it, with tiles of {MMA_GEOMETRY}{how}{mask_remark(request)}"

    def machine(self, device: torch.device) -> Machine:
        """Whose numbers its results have: tiles and accumulators."""
        return MACHINES[{"sm_89": "sm_89", "sm_120": "sm_120a"}.get(_arch(device) or "", "sm_80")]

    def device_reasons(self, device: torch.device) -> tuple[str, ...]:
        return _device_reasons(device)

    def recipe_reasons(self, recipe: Recipe, device: torch.device) -> tuple[str, ...]:
        return _recipe_reasons(recipe, _arch(device))

    def call_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        if request.sequences and recipe.smooth_q:
            return ("of sequences of different lengths it smooths no Q",)
        padded = padded_head_dim(max(request.head_dim, request.v_head_dim))
        if recipe.rotation != "hadamard" or padded is None or (wanted := hadamard_size(request.head_dim)) == padded:
            return ()
        return (f"it rotates {padded} channels, and head_dim {request.head_dim} wants {wanted}",)

    def _config(self, recipe: Recipe, dim: int, device: torch.device, mask: MaskForm) -> MmaConfig:
        arch = _arch(device)
        if arch is None:
            raise ValueError(f"{self.name} cannot run on {device}")
        return mma_config(recipe, dim, arch, self._int4_mma, mask)

    def pack_format(self, recipe: Recipe, dim: int, device: torch.device, mask: MaskForm) -> tuple[str, PackFormat]:
        config = self._config(recipe, dim, device, mask)
        return config.arch, config.form

    def work_rows(self, recipe: Recipe, dim: int, device: torch.device) -> int:
        return self._config(recipe, dim, device, "none").q_rows

    def instances(self, request: Request, recipe: Recipe) -> list[Instance]:
        dim = padded_head_dim(max(request.head_dim, request.v_head_dim))
        assert dim is not None  # (else the request is not supported)
        config = self._config(recipe, dim, request.device, mask_form(request))
        smooth_q = (
            [smooth_q_instance(dim, request.dtype, config.arch, packed_mask(config.mask))] if recipe.smooth_q else []
        )
        return [config.instance(), *smooth_q]

    def make_plan(self, request: Request, recipe: Recipe, packing: Packing) -> MmaPlan:
        pack, device = packing.plan, request.device.index
        config = self._config(recipe, pack.dim, request.device, mask_form(request))
        # (of sequences, as many as they can have)
        q_blocks = (
            request.q_len // config.q_rows + request.sequences
            if request.sequences
            else -(-request.q_len // config.q_rows)
        )
        smooth_q = SmoothQ.of(request, config, pack, q_blocks) if recipe.smooth_q else None
        section = 1 if smooth_q else heads_side_by_side(request, pack, device, equal=True)
        arguments = MmaArgs(
            **sizes(request, pack),
            **out_strides(request, pack),
            log2_p_max=log2_rounded_down(recipe.p_max),
            largest_fast_factor=_LARGEST_FAST_FACTOR[recipe.qk_bits or 8],
            tile_count=pack.tiles,
            dtype=DTYPE_CODES[request.dtype],
            q_max=recipe.qk_max,
            q_granularity=_GRANULARITIES[recipe.q_granularity],
            schedule=schedule(request, q_blocks, section),
        )
        return MmaPlan(
            request=request,
            recipe=recipe,
            packing=packing,
            scratch_size=smooth_q.scratch_size if smooth_q else 0,
            config=config,
            kernel=_kernel(config, device),
            can_overlap=has_dependent_launch(config.arch),
            q_blocks=q_blocks,
            arguments=Arguments(arguments),
            smooth_q=smooth_q,
            mask=MaskPlan.of(request, config.arch, MMA_GEOMETRY.b_k, config.q_rows),
            sequences=SequencesPlan.of(request, config.arch, pack, config.q_rows),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class MmaPlan(AttentionPlan):
    """One launch; or, with smooth Q, one for every chunk of ΔS. ``q_blocks``: blocks of rows of a head."""

    config: MmaConfig
    kernel: Kernel
    can_overlap: bool
    q_blocks: int
    arguments: Arguments[MmaArgs]
    smooth_q: SmoothQ | None

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
        arguments, smooth_q = self.arguments, self.smooth_q
        args = arguments.values
        point_to_call(args, q, packed, out, lse, sm_scale)
        args.tiles = packed.address + packed.plan.layout.k_tiles
        if smooth_q is None:
            batch = 1 if self.request.sequences else self.request.batch
            blocks = batch * self.request.q_heads * self.q_blocks
            self.kernel((blocks, 1, 1), device, arguments.address, overlaps=after_packing and self.can_overlap)
            return
        args.q_mean = scratch
        args.delta = scratch + smooth_q.delta
        for first, count in smooth_q.chunks(q, packed, scratch, sm_scale, device):
            args.first_item = first
            self.kernel((count, 1, 1), device, arguments.address)


@lru_cache(maxsize=64)
def _kernel(config: MmaConfig, device: int) -> Kernel:
    del device
    return load(config.instance(), "attention_mma", config.threads, config.shared_bytes)


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


_TAKEN: dict[str, tuple[object, ...]] = {
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
"""The values of a recipe's options that it takes; of the others see `_recipe_reasons`."""


@lru_cache(maxsize=1024)
def _recipe_reasons(recipe: Recipe, arch: str | None) -> tuple[str, ...]:
    """What of a recipe the kernel does not do."""
    if recipe.is_exact:
        return EXACT
    reasons = list(option_reasons(recipe, _TAKEN))
    if recipe.pv_format == "e4m3" and arch in ("sm_80", "sm_86"):
        reasons.append(f"{arch} has no FP8")
    if recipe.pv_format == "e4m3" and recipe.accumulator == "fp32":
        reasons.append("it has no e4m3 P·V with fp32 sums")
    tile, keys = MMA_GEOMETRY.b_k, recipe.promotion_keys(MMA_GEOMETRY)
    if recipe.accumulator in ("fp8_f16", "fp16") and keys != tile:
        reasons.append(f"it adds {recipe.accumulator} sums every {tile} keys, not after {keys or 'all'}")
    if recipe.accumulator == "fp8_f32" and keys not in (tile, None):
        reasons.append(f"it adds fp8_f32 sums every {tile} keys or never, not every {keys}")
    if recipe.row_sum == "rounded" or (
        recipe.row_sum == "accumulator" and (recipe.pv_format != "e4m3" or keys is None)
    ):
        reasons.append(
            f"it has no row_sum={recipe.row_sum} with {recipe.pv_format} and promotion after {keys or 'all'}"
        )
    return (*reasons, *number_reasons(recipe, MMA_GEOMETRY))


MMA_KERNEL = MmaAttention()
