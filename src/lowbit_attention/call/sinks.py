"""Attention sinks that are learnt logits: a logit per head joins each row's softmax, and has no value.

Of a row whose keys alone give ``out`` and ``lse``, softmax with the sink's logit s gives ``out · σ(lse − s)`` and
``ln(e^lse + e^s)``: nothing of it is a matter of how the keys were summed, so every recipe takes sinks, and so does
exact attention. The output is read and written once; in compiled code it becomes part of what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .checks import check_kind, fail
from .request import wants_grad


def check_sinks(sinks: object, q_heads: int, *others: Tensor) -> Tensor:
    """A floating ``[Hq]`` tensor on the device of ``others`` (q, k, v).

    Raises:
        InvalidArgumentError: it is another thing.
        UnsupportedError: the call asks for a gradient.
    """
    if not isinstance(sinks, Tensor):
        fail(f"sinks must be a torch.Tensor [Hq] or None, got {type(sinks).__name__}")
    check_kind("sinks", sinks)
    if sinks.shape != (q_heads,) or not sinks.dtype.is_floating_point:
        fail(
            f"sinks must be floating of shape [Hq] = [{q_heads}], a logit a query head, "
            f"got {sinks.dtype} {tuple(sinks.shape)}"
        )
    if sinks.device != others[0].device:
        fail(f"sinks must be on q's device, {others[0].device}, got {sinks.device}")
    if wants_grad(sinks, *others):
        raise UnsupportedError(
            "attention with sinks has no gradient; call it under torch.no_grad(), or detach sinks, q, k and v"
        )
    return sinks


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output and lse of keys and sinks, from those of the keys; ``out`` is overwritten.

    Args:
        out: with rows and heads in some order, and channels last.
        lse: float32, heads before rows.
        sinks: ``[Hq]``.
        heads: the dimension of ``out`` that is the heads'.
    Returns:
        A row that sees no key is 0, and its lse the sink. A sink of −inf changes nothing.
    """
    logit = sinks.float()[:, None]
    share = share_of_keys(lse, logit)
    if heads != lse.dim() - 2:
        share = share.transpose(-1, -2)
    return out.mul_(share.unsqueeze(-1)), torch.logaddexp(lse, logit)


def share_of_keys(lse: Tensor, logit: Tensor) -> Tensor:
    """What of each row's softmax the keys have where a sink of this float32 logit has the rest; as lse."""
    return torch.sigmoid(lse - logit).masked_fill(lse == -torch.inf, 0.0)
