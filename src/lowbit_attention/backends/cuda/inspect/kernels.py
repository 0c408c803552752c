"""What a kernel's main loop costs, read from its machine code: instructions, registers, and which unit limits it.

No GPU is needed. The counts are facts of this compiler; the rates of the units are the vendors' published figures, so
the modelled TOPS are an upper bound, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....errors import UnsupportedError
from ....recipes.definition import Recipe
from ....reference.rotation import hadamard_size
from ..instances import MMA_GEOMETRY, MmaConfig, mma_config
from ..jit.compiler import compile_source
from ..mma import MMA_KERNEL, _recipe_reasons
from .machine_code import Loop, disassemble, loops


@dataclass(frozen=True)
class Rates:
    """What a multiprocessor does in a clock: multiply-adds of its tensor cores by operand and sum, dense.

    ``int8``, ``int4``, ``fp8_f32``, ``fp8_f16``, ``fp16_f32``, ``fp16_f16`` (0: none of its own); ``mufu``: results of
    the special-function unit; ``issue``: instructions (of a warp). ``card``, ``multiprocessors`` and ``mhz`` (boost)
    turn clocks into TOPS.
    """

    card: str
    multiprocessors: int
    mhz: int
    int8: int
    int4: int
    fp8_f32: int
    fp8_f16: int
    fp16_f32: int
    fp16_f16: int
    mufu: int = 16
    issue: int = 4


RATES = {
    "sm_80": Rates("A100", 108, 1410, 2048, 4096, 0, 0, 1024, 1024),
    "sm_86": Rates("RTX 3090", 82, 1695, 1024, 2048, 0, 0, 256, 512),
    "sm_89": Rates("RTX 4090", 128, 2520, 1024, 2048, 512, 1024, 256, 512),
    "sm_120": Rates("RTX 5090", 170, 2407, 1024, 0, 512, 1024, 256, 512),
}
"""Published figures: dense TOPS ÷ (2 · multiprocessors · boost clock)."""


@dataclass(frozen=True)
class KernelCost:
    """`attention_mma` for one recipe: what its unmasked iteration takes, a thread and 64 keys.

    ``elements``: scores of a thread; ``tensor_clocks``, ``issue_clocks``, ``mufu_clocks``: a multiprocessor's clocks
    for a warp's iteration, ``None`` where the unit's rate is not known; ``bound_tops``: what the slowest allows.
    """

    recipe: str
    arch: str
    head_dim: int
    tile: str
    smooth_q: bool
    causal: bool
    registers: int
    spill_bytes: int
    smem_bytes: int
    mma: int
    other: int
    elements: int
    tensor_clocks: float | None
    issue_clocks: float | None
    mufu_clocks: float | None
    bound_tops: float | None
    card: str | None

    @property
    def other_per_element(self) -> float:
        """Instructions that are no MMAs, per score."""
        return self.other / self.elements


def main_loop(sass: str, mma: int) -> Loop:
    """The unmasked loop: of those with at least ``mma`` tensor-core instructions, the shortest.

    Raises:
        ValueError: there is none.
    """
    candidates = [loop for loop in loops(sass) if loop.mma >= mma]
    if not candidates:
        raise ValueError(f"no loop holds {mma} MMAs")
    return min(candidates, key=lambda loop: loop.other)


def check_runs(recipe: Recipe, head_dim: int, arch: str) -> None:
    """Whether there is such a kernel: `attention_mma` runs the recipe on the architecture, in these channels.

    Raises:
        UnsupportedError: it does not, and every reason.
    """
    reasons = list(_recipe_reasons(recipe, arch))
    if recipe.rotation == "hadamard" and hadamard_size(head_dim) != head_dim:
        reasons.append(f"it rotates {hadamard_size(head_dim)} channels, not {head_dim}")
    if reasons:
        why = {MMA_KERNEL.name: tuple(reasons)}
        raise UnsupportedError(f"there is no kernel for recipe {recipe} on {arch} to inspect:", why)


def inspect(recipe: Recipe, head_dim: int, arch: str) -> KernelCost:
    """Compile `attention_mma` for a recipe and read its main loop.

    Raises:
        UnsupportedError: as `check_runs`. CompileError, MissingExtraError: as `compile_source` and `nvdisasm`.
    """
    check_runs(recipe, head_dim, arch)
    config = mma_config(recipe, head_dim, arch)
    instance = config.instance()
    compiled = compile_source(instance.source(), instance.options())
    used = compiled.resources["attention_mma"]
    loop = main_loop(disassemble(compiled.cubin), config.own_mmas)
    tensor, issue, mufu, bound = _clocks(config, loop, RATES.get(arch))
    return KernelCost(
        recipe=recipe.name,
        arch=arch,
        head_dim=head_dim,
        tile=f"{config.q_rows}×{MMA_GEOMETRY.b_k}",
        smooth_q=recipe.smooth_q,
        causal=False,  # (the loop is the same; the masked one runs for the tiles at the diagonal)
        registers=used.registers,
        spill_bytes=used.spill_stores + used.spill_loads,
        smem_bytes=config.shared_bytes,
        mma=loop.mma,
        other=loop.other,
        elements=MMA_GEOMETRY.warp_rows * MMA_GEOMETRY.b_k // 32,
        tensor_clocks=tensor,
        issue_clocks=issue,
        mufu_clocks=mufu,
        bound_tops=bound,
        card=RATES[arch].card if arch in RATES else None,
    )


def _clocks(
    config: MmaConfig, loop: Loop, rates: Rates | None
) -> tuple[float | None, float | None, float | None, float | None]:
    if rates is None:
        return None, None, None, None
    products = MMA_GEOMETRY.warp_rows * MMA_GEOMETRY.b_k * config.head_dim  # of Q·K, and of P·V
    qk_rate = rates.int4 if config.qk_lanes == 4 else rates.int8
    kind = ("fp16_" if config.v_half else "fp8_") + ("f16" if config.sums_f16 else "f32")
    pv_rate: int = getattr(rates, kind)
    if not (qk_rate and pv_rate):
        return None, None, None, None
    ones = MMA_GEOMETRY.warp_rows * MMA_GEOMETRY.b_k * 8 / pv_rate if config.sum_in_mma else 0.0
    tensor = products / qk_rate + products / pv_rate + ones
    issue = (loop.mma + loop.other) / rates.issue
    mufu = loop.counts["MUFU"] * 32 / rates.mufu
    tops = 4 * products / max(tensor, issue, mufu) * rates.multiprocessors * rates.mhz * 1e6 / 1e12
    return tensor, issue, mufu, tops
