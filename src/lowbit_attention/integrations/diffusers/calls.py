"""The function that diffusers calls, with its words for arguments, and what its context parallelism asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from ...call.torch_call import TorchCall
from ...errors import UnsupportedError
from ..intercept import ask
from ..with_lse import ask_with_lse
from .library import dispatch

try:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor as _Awaited
except ImportError:  # (a torch without distributed: nobody has such tensors)
    _Awaited = None  # type: ignore[assignment, misc]

Answer = Any
"""The output ``[B, S, H, D]``, or that and the lse, float32 ``[B, S, H]``."""


def make_function(name: str, number: int) -> Callable[..., Answer]:
    """What diffusers calls for the backend ``name``, whose block has this number (`intercept.ask`)."""
    library = dispatch()

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
        **undeclared: Any,
    ) -> Answer:
        if dropout_p:
            _refuse(
                f"dropout_p={dropout_p}: the backend {name!r} has no dropout; run the model in eval mode, or train it "
                'with set_attention_backend("native")'
            )
        if attn_mask is not None and not isinstance(attn_mask, Tensor):
            _refuse(
                f"attn_mask is a {type(attn_mask).__name__}, and the backend {name!r} takes tensors; leave what makes "
                "such masks on the backend that reads them"
            )
        for argument, given in undeclared.items():
            if given is not None:
                _refuse(f"{argument}={given!r} (of attention_kwargs) means nothing to the backend {name!r}")
        if _parallel_config is None:
            return run(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse)
        parallel = _parallel_config.context_parallel_config
        if attn_mask is not None and parallel.ring_degree > 1:
            _refuse(
                f"attn_mask with ring_degree={parallel.ring_degree}: a ring shows every part of the keys this rank's "
                "part of the mask; use ulysses_degree alone"
            )
        if TorchCall.of(query, key, value, attn_mask).wants_grad():
            _refuse(
                f"gradients are asked of the backend {name!r} in context parallelism: run under torch.no_grad(), or "
                'train with set_attention_backend("native")'
            )
        if attn_mask is not None:
            attn_mask = _as_bias(attn_mask, query, key)
        return library._templated_context_parallel_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, return_lse,
            forward_op=forward_op, backward_op=backward_op, _parallel_config=_parallel_config,
        )  # fmt: skip

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool,
    ) -> Answer:
        if attn_mask is not None:
            attn_mask = _as_bias(attn_mask, query, key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if return_lse:
            call = TorchCall.of(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
            out, lse = ask_with_lse(number, call)
            return out.transpose(1, 2), lse.transpose(1, 2)
        out = ask(number, query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)

    def forward_op(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _save_ctx: bool = True,
        _parallel_config: Any = None,
    ) -> Answer:
        query, key, value = _waited(query), _waited(key), _waited(value)
        return run(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse)

    def backward_op(ctx: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"the backend {name!r} has no gradients")

    return attention


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask ``[B, Sk]`` as torch takes it; others already broadcast to ``[B, H, Sq, Sk]``."""
    if mask.dim() == 2 and mask.shape[0] == query.shape[0] and mask.shape[1] == key.shape[1]:
        return mask[:, None, None, :]
    return mask[None] if mask.dim() == 1 else mask  # (torch's own function takes no single dimension)


def _waited(t: Tensor) -> Tensor:
    """The plain tensor: what a collective gives in eager mode has none until somebody waits for it."""
    if _Awaited is not None and isinstance(t, _Awaited):
        plain: Tensor = t.wait()
        return plain
    return t


def _refuse(message: str) -> NoReturn:
    raise UnsupportedError(message)
