"""The functions of the package ``sageattention`` 2.x, by this library: same names, arguments and answers, but strict.

| function | ``pv_accum_dtype`` | recipe |
|---|---|---|
| `sageattn` | | ``auto``: a kernel where it is faster than torch, exact attention elsewhere |
| `sageattn_qk_int8_pv_fp16_triton`, `sageattn_varlen` | | ``sage1`` |
| `sageattn_qk_int8_pv_fp16_cuda` | "fp32" | ``int8_fp16`` |
| | "fp16+fp32", "fp16" | ``sage1``, scales per thread |
| `sageattn_qk_int8_pv_fp8_cuda` | "fp32+fp16" | ``sage2pp_8b`` |
| | "fp32+fp32" | ``sage2_8b`` |
| | "fp32" | ``sage2_8b``, never promoted |
| `sageattn_qk_int8_pv_fp8_cuda_sm90` | "fp32+fp32" | ``sage2_8b`` |

``qk_quant_gran``, ``smooth_k`` and ``smooth_v`` change the recipe; they are never ignored. Beyond the originals: any
device (emulated where no kernel runs a named method), float32, any strides, head dimensions up to 256, ``attn_mask``,
the words that flash attention and torch use (``causal``, ``softmax_scale``, ``scale``, ``enable_gqa``), a clear error
instead of an answer for everything else that is given and would be swallowed, and for a gradient.

With ``is_causal`` and Nq ≠ Nk query i sees keys j ≤ i (top-left), as the original's kernels answer;
`sageattn_qk_int8_pv_fp16_triton` refuses that, as the original does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..api import attention, attention_varlen
from ..call import checks
from ..call.request import OnEmulation
from ..errors import InvalidArgumentError, UnsupportedError
from ..functional import find_recipe_or_auto
from ..recipes.definition import Recipe
from ..recipes.granularity import TOKEN_GRANULARITIES
from ..recipes.named import RECIPES
from ..recipes.options import AllTokens
from .words import check_layout, same_words

__all__ = [
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
]

Output = Tensor | tuple[Tensor, Tensor]


def make_sageattn(recipe: str | Recipe = "auto") -> Callable[..., Output]:
    """`sageattn` that runs ``recipe``."""
    smoothed = _smoothed(recipe)

    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        *,
        smooth_k: bool | None = None,
        attn_mask: Tensor | None = None,
        on_emulation: OnEmulation = "warn",
        **others: Any,
    ) -> Output:
        """Attention by the fastest method here that keeps the default error budget.

        Args:
            q: ``[B, Hq, Nq, D]`` (HND) or ``[B, Nq, Hq, D]`` (NHD); k, v alike with Hkv heads, a divisor of Hq.
            tensor_layout: ``"HND"`` or ``"NHD"``.
            is_causal: query i sees keys j ≤ i.
            sm_scale: ``1 / √D`` if ``None``.
            return_lse: return the log-sum-exp, too.
            smooth_k: with a named recipe: whether it subtracts the mean of K over the tokens; ``None``: as the recipe
                says. "auto" keeps its error budget either way: the kernels it chooses smooth K, which never changes
                what attention is (and never k), and ``False`` does not forbid it.
            attn_mask, on_emulation: as in `lowbit_attention.attention`.
            others: ``causal``, ``softmax_scale``, ``scale`` as other words, and torch's ``enable_gqa``; see the module
                for what is refused.
        Returns:
            The output in q's shape; with ``return_lse`` also float32 ``[B, Hq, Nq]`` in both layouts, the natural
            logarithm of the softmax's denominator, k's mean included.

        >>> q = k = v = torch.randn(1, 2, 64, 32)
        >>> sageattn(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 64, 32])

        Raises:
            InvalidArgumentError: an argument that is wrong, or that would be ignored.
            UnsupportedError: nothing can run the call (a gradient of a quantised recipe, say).
            TypeError: an unknown argument.
        """
        is_causal, sm_scale = same_words("sageattn", is_causal, sm_scale, others, q, k, tensor_layout)
        chosen = recipe
        if smooth_k is not None:
            checks.check_flag("smooth_k", smooth_k)
            chosen = smoothed[smooth_k]
        return _run(chosen, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, on_emulation)

    return sageattn


def _smoothed(recipe: str | Recipe) -> dict[bool, str | Recipe]:
    """What ``smooth_k`` makes of the recipe of `sageattn`; made beforehand, as `_RECIPES` are."""
    found = find_recipe_or_auto(recipe)
    if found is None or found.is_exact:
        return {False: recipe, True: recipe}
    if found.smooth_k:
        return {False: found.replace(smooth_k=False, k_sample=AllTokens()), True: found}
    return {False: found, True: found.replace(smooth_k=True)}


sageattn = make_sageattn()


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    on_emulation: OnEmulation = "warn",
    **others: Any,
) -> Output:
    """SageAttention: INT8 Q·K per block, FP16 P·V with FP16 sums over a tile (recipe ``sage1``).

    Args:
        quantization_backend: "triton" or "cuda"; both name the same numbers here.
        smooth_k: subtract the mean of K over the tokens.
        the rest: as `sageattn`; ``is_causal`` needs Nq = Nk, as in the original.
    """
    name = "sageattn_qk_int8_pv_fp16_triton"
    is_causal, sm_scale = same_words(name, is_causal, sm_scale, others, q, k, tensor_layout)
    checks.check_choice("quantization_backend", quantization_backend, ("triton", "cuda"))
    check_layout(tensor_layout)
    tokens = 2 if tensor_layout == "HND" else 1
    four = all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in (q, k))
    if is_causal and four and q.shape[tokens] != k.shape[tokens]:
        raise InvalidArgumentError(
            f"{name}: is_causal needs equal lengths of q and k, got {q.shape[tokens]} and {k.shape[tokens]}; "
            "lowbit_attention.attention has causal_alignment for them"
        )
    return _run(
        _sage1(None, smooth_k, False), q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, on_emulation
    )


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    on_emulation: OnEmulation = "warn",
    **others: Any,
) -> Output:
    """INT8 Q·K, FP16 P·V.

    Args:
        qk_quant_gran: "per_thread" or "per_warp".
        pv_accum_dtype: "fp32": FP32 sums. "fp16+fp32": FP16 sums over a key tile, then FP32. "fp16": the same; FP16
            sums over all keys overflow, so there are none here.
        smooth_k, smooth_v: subtract the mean of K (of V) over the tokens; with every ``pv_accum_dtype``.
        the rest: as `sageattn`.
    """
    is_causal, sm_scale = same_words("sageattn_qk_int8_pv_fp16_cuda", is_causal, sm_scale, others, q, k, tensor_layout)
    checks.check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp16+fp32", "fp16"))
    checks.check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    if pv_accum_dtype == "fp32":
        recipe = _changed("int8_fp16", "tile", qk_quant_gran, smooth_k, smooth_v)
    else:
        recipe = _sage1(qk_quant_gran, smooth_k, smooth_v)
    return _run(recipe, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, on_emulation)


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    on_emulation: OnEmulation = "warn",
    **others: Any,
) -> Output:
    """SageAttention2 and SageAttention2++: INT8 Q·K, FP8 P·V.

    Args:
        qk_quant_gran: "per_thread" or "per_warp".
        pv_accum_dtype: "fp32+fp16" (++: FP16 sums over 64 keys, then FP32), "fp32+fp32" (the card's FP32 sums over a
            key tile, then FP32) or "fp32" (the card's, over all keys).
        smooth_k, smooth_v: subtract the mean of K (of V) over the tokens; with every ``pv_accum_dtype``.
        the rest: as `sageattn`.
    """
    is_causal, sm_scale = same_words("sageattn_qk_int8_pv_fp8_cuda", is_causal, sm_scale, others, q, k, tensor_layout)
    checks.check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32+fp16", "fp32+fp32", "fp32"))
    checks.check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    bases: dict[str, tuple[str, int | str]] = {
        "fp32+fp16": ("sage2pp_8b", 64),
        "fp32+fp32": ("sage2_8b", "tile"),
        "fp32": ("sage2_8b", "never"),
    }
    base, promotion = bases[pv_accum_dtype]
    recipe = _changed(base, promotion, qk_quant_gran, smooth_k, smooth_v)
    return _run(recipe, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, on_emulation)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    on_emulation: OnEmulation = "warn",
    **others: Any,
) -> Output:
    """SageAttention2 for Hopper: INT8 Q·K, FP8 P·V (recipe ``sage2_8b``); elsewhere an emulation of a Hopper kernel.

    Args:
        qk_quant_gran: "per_thread" or "per_warp".
        pv_accum_dtype: "fp32+fp32"; the original has no other for Hopper, either.
        on_emulation: as in `lowbit_attention.attention`; ``"error"`` refuses that emulation, too.
        the rest: as `sageattn`.
    """
    name = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    is_causal, sm_scale = same_words(name, is_causal, sm_scale, others, q, k, tensor_layout)
    if pv_accum_dtype != "fp32+fp32":
        raise UnsupportedError(f"{name}: pv_accum_dtype={pv_accum_dtype!r}; on Hopper there is 'fp32+fp32'")
    checks.check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    recipe = _changed("sage2_8b", "tile", qk_quant_gran, smooth_k, False)
    emulates = not (isinstance(q, Tensor) and q.is_cuda) and on_emulation != "error"
    like = "sm_90a" if emulates else None
    return _run(recipe, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, on_emulation, like)


def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    *,
    on_emulation: OnEmulation = "warn",
    **others: Any,
) -> Tensor:
    """Sequences of different lengths, packed one behind another, by recipe ``sage1``.

    Args:
        q: ``[total_q, Hq, D]``; k, v: ``[total_k, Hkv, D]``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `lowbit_attention.attention_varlen`.
        is_causal: within each sequence, query i sees keys j ≤ i.
        smooth_k: subtract the mean of K over the tokens of *each sequence* (the original takes it over all of them).
        on_emulation: as in `lowbit_attention.attention`.
    Returns:
        ``[total_q, Hq, D]``.

    >>> q = k = v = torch.randn(10, 2, 16)
    >>> cu = torch.tensor([0, 3, 10])
    >>> sageattn_varlen(q, k, v, cu, cu, 7, 7).shape
    torch.Size([10, 2, 16])
    """
    is_causal, sm_scale = same_words("sageattn_varlen", is_causal, sm_scale, others, q, k, "NHD")
    out: Tensor = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        recipe=_sage1(None, smooth_k, False), is_causal=is_causal,
        causal_alignment="top_left" if is_causal is True else None, sm_scale=sm_scale,
        on_emulation=on_emulation,
    )  # fmt: skip
    return out


# ---- what they share

_GRANULARITIES = ("per_thread", "per_warp")


def _run(
    recipe: str | Recipe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: Tensor | None,
    on_emulation: OnEmulation,
    like: str | None = None,
) -> Output:
    check_layout(tensor_layout)
    call: Any = attention  # (its overloads tell the types of return_lse apart, which is the caller's here)
    answer: Output = call(
        q, k, v, recipe=recipe, is_causal=is_causal, causal_alignment="top_left" if is_causal is True else None,
        attn_mask=attn_mask, sm_scale=sm_scale, layout=tensor_layout, return_lse=return_lse, like=like,
        on_emulation=on_emulation,
    )  # fmt: skip
    return answer


def _make(base: str, promotion: int | str, granularity: str, smooth_k: bool, smooth_v: bool) -> Recipe:
    recipe = RECIPES[base]
    wanted = {
        "q_granularity": TOKEN_GRANULARITIES[granularity],
        "k_granularity": TOKEN_GRANULARITIES[granularity],
        "smooth_k": smooth_k,
        "smooth_v": smooth_v,
        "keys_per_promotion": promotion,
        "row_sum": "unrounded" if promotion == "never" else recipe.row_sum,
    }
    changes = {name: value for name, value in wanted.items() if getattr(recipe, name) != value}
    return recipe.replace(**changes) if changes else recipe


_BASES: tuple[tuple[str, int | str], ...] = (
    ("sage1", "tile"), ("int8_fp16", "tile"), ("sage2_8b", "tile"), ("sage2_8b", "never"), ("sage2pp_8b", 64),
)  # fmt: skip
_RECIPES = {
    (base, promotion, *options): _make(base, promotion, *options)
    for base, promotion in _BASES
    for options in product(("per_block", *_GRANULARITIES), (False, True), (False, True))
}
"""All of them, made beforehand: torch.compile can look one up, and not make one."""


def _changed(base: str, promotion: int | str, granularity: str, smooth_k: bool, smooth_v: bool) -> Recipe:
    """A named recipe with the options that these functions take; the recipe itself where nothing changes."""
    checks.check_flag("smooth_k", smooth_k)
    checks.check_flag("smooth_v", smooth_v)
    return _RECIPES[base, promotion, granularity, smooth_k, smooth_v]


def _sage1(granularity: str | None, smooth_k: bool, smooth_v: bool) -> Recipe:
    return _changed("sage1", "tile", granularity or "per_block", smooth_k, smooth_v)
