"""Sequences of different lengths, packed: on a kernel that takes them and does not look at them, or one by one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..call import checks
from ..call.request import OnEmulation, make_request, of_sequences
from ..errors import InvalidArgumentError
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .base import Output
from .cuda.kernel import CudaKernel
from .dispatch import Chosen, Ran, attempt, choose, run_request


def run_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    recipe: Recipe | None,
    machine: Machine | None,
    sm_scale: float | None,
    *,
    is_causal: bool,
    bottom_right: bool,
    return_lse: bool,
    on_emulation: OnEmulation,
) -> tuple[Output, Chosen | None]:
    """`attention_varlen` by a recipe that was found (``None`` is auto), and the choice that ran the first sequence.

    Raises:
        InvalidArgumentError, UnsupportedError: as `attention_varlen`.
    """
    checks.check_tensors(q, k, v, 3, "[tokens, heads, head_dim]")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} (as [tokens, heads, head_dim])"
    if k.shape[:2] != v.shape[:2]:
        raise InvalidArgumentError(f"k and v must have the same tokens and heads: {shapes}")
    checks.check_heads(q.shape[1], k.shape[1], shapes)
    checks.check_head_dims(q.shape[2], k.shape[2], v.shape[2], shapes)
    scale = checks.resolve_scale("sm_scale", sm_scale, q.shape[2])
    recipe = checks.for_scale("sm_scale", scale, recipe)
    options = {
        "is_causal": is_causal, "bottom_right": bottom_right, "return_lse": return_lse, "on_emulation": on_emulation,
    }  # fmt: skip
    for name, cu, most in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        checks.check_cu_kind(f"cu_seqlens_{name}", cu, q.device)
        checks.check_max_kind(f"max_seqlen_{name}", most)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InvalidArgumentError(
            f"cu_seqlens_q has {len(cu_seqlens_q) - 1} sequences, cu_seqlens_k has {len(cu_seqlens_k) - 1}"
        )
    if (answer := on_a_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, recipe, machine, **options)) is not None:
        return answer
    starts_q = checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q, starts_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k, starts_k)
    first: Chosen | None = None
    outs = [q.new_zeros(starts_q[0], q.shape[1], v.shape[2])]
    lses = [q.new_full((q.shape[1], starts_q[0]), -math.inf, dtype=torch.float32)]
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        one_q, one_k, one_v = (t[None].transpose(1, 2) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        request = make_request(one_q, one_k, one_v, None, recipe, machine, **options)
        (out, lse), choice = run_request(one_q, one_k, one_v, None, scale, request)
        first = first or choice
        outs.append(out[0].transpose(0, 1))
        lses += [promised(lse)[0]] if return_lse else []
    rest = len(q) - starts_q[-1]
    packed = torch.nn.functional.pad(torch.cat(outs), (0, 0, 0, 0, 0, rest))
    whole = torch.nn.functional.pad(torch.cat(lses, dim=1), (0, rest), value=-math.inf) if return_lse else None
    return (packed, whole), first


def promised(lse: Tensor | None) -> Tensor:
    """The lse that a call asked for, and dispatch chose who gives it."""
    if lse is None:
        raise RuntimeError("an implementation accepted return_lse and gave none: a defect of ours")
    return lse


def on_a_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    sm_scale: float,
    recipe: Recipe | None,
    machine: Machine | None,
    **options: Any,
) -> Ran | None:
    """The output of checked ``[tokens, heads, channels]`` tensors, and lse, and who ran it; ``None`` if no kernel can.

    What is chosen is what would be for as many sequences of the mean length. ``options``: those of `Request`.
    """
    count = len(cu_q) - 1
    if q.device.type != "cuda" or count == 0 or 0 in (len(q), len(k)):
        return None
    typical = of_sequences(q, k, v, count, False, recipe, machine, **options)
    choice = choose(typical)
    kernel = choice.implementation
    if not isinstance(kernel, CudaKernel) or not kernel.takes_sequences:
        return None
    request = of_sequences(q, k, v, count, True, recipe, machine, **options)
    if kernel.not_supported_reasons(request, choice.recipe):
        return None
    arguments = q, k, v, cu_q, cu_k, sm_scale, request, choice.recipe
    if recipe is not None:
        return kernel.run_sequences(*arguments), choice
    answer = attempt(choice, typical, kernel.run_sequences, *arguments)
    return None if isinstance(answer, str) else (answer, choice)
