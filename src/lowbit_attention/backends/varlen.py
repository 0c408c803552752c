"""Sequences of different lengths on a kernel that takes them packed, without a look at their lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call.request import of_sequences
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .cuda.kernel import CudaKernel
from .dispatch import Ran, attempt, choose


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
