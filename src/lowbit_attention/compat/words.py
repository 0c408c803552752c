"""The words that callers of ``sageattention`` use: other packages', and those that ask for nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call import checks
from ..errors import InvalidArgumentError, UnsupportedError

_ALIASES = {"causal": "is_causal", "softmax_scale": "sm_scale", "scale": "sm_scale"}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "dropout_p": (0, 0.0, None),
    "window_size": (None, -1, (-1, -1), [-1, -1]),
    "softcap": (None, 0, 0.0),
    "alibi_slopes": (None,),
    "return_attn_probs": (False, None),
    "return_softmax": (False, None),
    "block_table": (None,),
    "deterministic": (False, True),
}
"""What flash attention's callers pass along, and the values that ask for nothing."""


def check_layout(tensor_layout: object) -> None:
    """Whether it is a layout.

    Raises:
        InvalidArgumentError: it is not; a mask in its place is told apart.
    """
    if isinstance(tensor_layout, Tensor):
        raise InvalidArgumentError(
            f"tensor_layout is a tensor of shape {tuple(tensor_layout.shape)}: the fourth argument is the layout, "
            "'HND' or 'NHD'; a mask is given as attn_mask="
        )
    checks.check_choice("tensor_layout", tensor_layout, checks.LAYOUTS)


def same_words(
    function: str, is_causal: bool, sm_scale: float | None, others: dict[str, Any], q: Any, k: Any, layout: str
) -> tuple[bool, float | None]:
    """``is_causal`` and ``sm_scale``, which may come under other names; everything else must ask for nothing.

    Raises:
        InvalidArgumentError: two words that contradict each other, or ``enable_gqa`` the heads of q and k.
        UnsupportedError: a word whose value would change the answer.
        TypeError: a word that nobody uses.
    """
    found: dict[str, Any] = {"is_causal": is_causal, "sm_scale": sm_scale}
    for name, value in others.items():
        if name in _ALIASES:
            ours = _ALIASES[name]
            default = False if ours == "is_causal" else None
            if value is not None and found[ours] not in (default, value):
                raise InvalidArgumentError(f"{function}: {name}={value!r} contradicts {ours}={found[ours]!r}")
            found[ours] = found[ours] if value is None else value
        elif name == "enable_gqa":
            _check_gqa(function, value, q, k, layout)
        elif name not in _HARMLESS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        elif isinstance(value, Tensor) or value not in _HARMLESS[name]:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UnsupportedError(f"{function}: {name}={shown} is not supported, and would change the answer")
    return found["is_causal"], found["sm_scale"]


def _check_gqa(function: str, enable_gqa: Any, q: Any, k: Any, layout: str) -> None:
    """Torch's flag: groups of query heads share a head of k and v here anyway, and ``False`` says that none do."""
    checks.check_flag("enable_gqa", enable_gqa)
    if enable_gqa or not (isinstance(q, Tensor) and isinstance(k, Tensor)):
        return
    axis = -3 if layout == "HND" else -2
    if q.dim() >= 3 and q.dim() == k.dim() and q.shape[axis] != k.shape[axis]:
        raise InvalidArgumentError(
            f"{function}: enable_gqa=False, and q has {q.shape[axis]} heads and k {k.shape[axis]}: pass True, or leave "
            "it out"
        )
