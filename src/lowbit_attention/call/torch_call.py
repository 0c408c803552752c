"""`TorchCall`: the arguments of one ``torch.nn.functional.scaled_dot_product_attention``, spelled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import checks
from .request import has_tangent, wants_grad

Answer = TypeVar("Answer")

OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa"
"""The arguments of an operator that stands for a call without dropout, as a schema has them (`TorchCall.operands`)."""


class TorchCall(NamedTuple):
    """One call of torch's function: as it came, or as an integration has translated it into torch's words.

    (A named tuple: torch.compile traces it, and it costs the host 0.3 µs, where a frozen dataclass costs 1.5.)
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> TorchCall:
        """From the arguments as torch's function takes them.

        Raises:
            TypeError: too few, too many or unknown ones, in torch's words.
        """
        return TorchCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def run(self, function: Callable[..., Answer], *first: Any) -> Answer:
        """What a function of torch's signature answers; ``first``: what it takes in front of that."""
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = self
        return function(*first, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float | None, bool]:
        """The arguments of an operator (`OPERANDS`)."""
        return self.query, self.key, self.value, self.attn_mask, self.is_causal, self.scale, self.enable_gqa

    def wants_grad(self) -> bool:
        """Whether a derivative is asked for."""
        return wants_grad(self.query, self.key, self.value, self.attn_mask)

    def has_tangent(self) -> bool:
        """Whether a derivative of forward-mode AD is asked for."""
        return has_tangent(self.query, self.key, self.value, self.attn_mask)

    def in_autocast(self) -> TorchCall:
        """The call as torch's own function makes it under autocast: everything but float64 in its dtype."""
        device = self.query.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        query, key, value, attn_mask = [_to(t, dtype) for t in (self.query, self.key, self.value, self.attn_mask)]
        return TorchCall(query, key, value, attn_mask, self.dropout_p, self.is_causal, self.scale, self.enable_gqa)

    def leading(self) -> tuple[list[int], list[int]]:
        """The broadcast leading dimensions, heads last, of query and of key and value.

        Raises:
            InvalidArgumentError: they do not broadcast.
        """
        query, key, value = self.query.shape, self.key.shape, self.value.shape
        shapes = f"query {tuple(query)}, key {tuple(key)}, value {tuple(value)}"
        leads = [tuple(shape[:-2]) for shape in (query, key, value)]
        heads: list[list[int]] = [[], []]
        if self.enable_gqa:
            if not all(leads) or leads[1][-1] != leads[2][-1]:
                checks.fail(f"enable_gqa needs a head dimension, of equal size for key and value: {shapes}")
            checks.check_heads(leads[0][-1], leads[1][-1], shapes)
            heads = [[leads[0][-1]], [leads[1][-1]]]
            leads = [lead[:-1] for lead in leads]
        lead: list[int] = []
        for number in range(max([len(lead) for lead in leads]), 0, -1):  # from the left
            sizes = [lead[-number] for lead in leads if len(lead) >= number]
            others = [size for size in sizes if size != 1]
            if any(size != others[0] for size in others):
                hint = (
                    "" if self.enable_gqa else " (heads of key and value that divide the query's need enable_gqa=True)"
                )
                checks.fail(f"leading dimensions do not broadcast: {shapes}{hint}")
            lead.append(others[0] if others else 1)
        return lead + heads[0], lead + heads[1]

    def empty_answer(self) -> Tensor:
        """A tensor like the answer, as `as_query_lies` lays it out: what a fake call gives."""
        lead, _ = self.leading()
        if is_by_token(self.query):
            return self.query.new_empty(lead[0], self.query.shape[2], lead[1], self.value.shape[-1]).transpose(1, 2)
        return self.query.new_empty(*lead, self.query.shape[-2], self.value.shape[-1])


TorchCall.of.__qualname__ = "scaled_dot_product_attention"  # (what Python's own TypeErrors name)


def of_operands(*operands: Any) -> tuple[TorchCall, tuple[Any, ...]]:
    """The call whose `TorchCall.operands` an operator is given, and what it is given behind them."""
    query, key, value, attn_mask, is_causal, scale, enable_gqa, *more = operands
    return TorchCall(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa), tuple(more)


def _to(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t


def is_by_token(query: Tensor) -> bool:
    """Whether ``[B, H, N, D]`` lies in memory as ``[B, N, H, D]``."""
    return query.dim() == 4 and query.stride(1) < query.stride(2)


def as_query_lies(out: Tensor, query: Tensor) -> Tensor:
    """The output in one of two orders of memory: by token as query is, or contiguous."""
    return out.transpose(1, 2).contiguous().transpose(1, 2) if is_by_token(query) else out.contiguous()
