"""Mistakes that a type checker must find (S21): one that it misses is an unused ``type: ignore``, an error itself."""

from torch import Tensor

import lowbit_attention
from lowbit_attention import attention, recipe, sdpa_enabled


def mistakes(q: Tensor) -> None:
    attention(q, q)  # type: ignore[call-overload]
    attention(q, q, q, layout="NDH")  # type: ignore[call-overload]
    attention(q, q, q, causal=True)  # type: ignore[call-overload]
    print(attention(q, q, q).shapes)  # type: ignore[attr-defined]
    recipe(8)  # type: ignore[arg-type]
    sdpa_enabled(recipe=8)  # type: ignore[arg-type]
    lowbit_attention.atention(q, q, q)  # type: ignore[attr-defined]
