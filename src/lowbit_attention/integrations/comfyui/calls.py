"""What ComfyUI's attention functions are asked, as a `TorchCall`, and the answer in the shape that they give.

``f(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs)``: q, k and
v are ``[B, N, H · D]``, or ``[B, H, N, D]`` with ``skip_reshape``; so is the output with ``skip_output_reshape``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...call.torch_call import TorchCall
from ...errors import InvalidArgumentError

LOW_PRECISION = "the model rules low precision out for this call (low_precision_attention=False)"


class Asked(NamedTuple):
    """One call. ``split``: the output is wanted as ``[B, H, N, D]``; ``options``: ComfyUI's ``transformer_options``."""

    call: TorchCall
    split: bool
    options: Mapping[str, Any]

    def shaped(self, out: Tensor) -> Tensor:
        """The output ``[B, H, N, D]`` as it is wanted."""
        return out if self.split else out.transpose(1, 2).flatten(2)


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    low_precision_attention: bool | None = True,
    transformer_options: Mapping[str, Any] | None = None,
    _inside_attn_wrapper: Any = None,
    **others: Any,
) -> Asked | str:
    """The call, or in a few words why it is not one for a recipe: it means more than is known, or rules it out.

    ``attn_precision`` asks for logits and sums in FP32, as every recipe has them.

    Raises:
        TypeError: more arguments by position than are known.
    """
    del attn_precision, _inside_attn_wrapper
    if others:
        return f"arguments that are not known: {', '.join(sorted(others))}"
    if low_precision_attention is not None and not low_precision_attention:
        return LOW_PRECISION
    try:
        if not skip_reshape:
            kv_heads = _heads_of(q, k, heads) if enable_gqa else heads
            q, k, v = _by_head(q, heads), _by_head(k, kv_heads), _by_head(v, kv_heads)
        elif q.dim() != 4 or q.shape[1] != heads:
            return f"heads={heads} is not what q of shape [B, H, N, D] has"
        mask = _four_dims(mask)
    except InvalidArgumentError as error:
        return str(error)
    call = TorchCall(q, k, v, mask, 0.0, False, scale, bool(enable_gqa))
    return Asked(call, bool(skip_output_reshape), transformer_options or {})


def _heads_of(q: Tensor, k: Tensor, heads: int) -> int:
    """How many heads ``[B, N, H · D]`` has whose head dimension is q's."""
    dim = q.shape[-1] // heads
    if dim == 0 or k.shape[-1] % dim:
        raise InvalidArgumentError("the width of k is no multiple of q's head dimension")
    return k.shape[-1] // dim


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H · D]`` as a view ``[B, H, N, D]``."""
    if x.dim() != 3 or x.shape[2] % heads:
        raise InvalidArgumentError("q, k or v is not of shape [B, N, heads · D]")
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """A mask ``[Nq, Nk]``, ``[B, Nq, Nk]`` or ``[B, H, Nq, Nk]`` with all four dimensions."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
        raise InvalidArgumentError("a mask that has not 2, 3 or 4 dimensions")
    mask = mask if mask.dim() > 2 else mask[None]
    return mask if mask.dim() > 3 else mask[:, None]
