"""A recipe as an attention backend of xDiT (the package xfuser): ``register()``, then ``USP(…, backend="lowbit")``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import InvalidArgumentError, MissingExtraError, UnsupportedError, shown
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .call_report import CallReport
from .packed import PackedCall, answer_packed, exactly_packed
from .rerouting import Rerouter

_HARMLESS = frozenset({"valid_kv_len", "max_seqlen_k", "cu_seqlens_k", "indices_k", "attn_mask"})
"""What attention is told and honours here, or that USP has done already."""

_registered: dict[Any, Any] = {}
"""An `Attends` by key."""


def register(
    recipe: str | Recipe = "auto",
    key: Any = "lowbit",
    *,
    like: str | Machine | None = None,
    on_emulation: OnEmulation = "warn",
) -> CallReport:
    """Make ``recipe`` an attention backend of xDiT.

    Args:
        recipe, like, on_emulation: as in `attention`.
        key: what ``USP(…, backend=key)`` is given: a name, or one of xDiT's own backends, which it then replaces
            (``--attention_backend`` knows only those).
    Returns:
        A `CallReport` that counts the calls.

    Masks, and keys picked by ``indices_k``, are honoured; under a ring (which would hand every rank the same mask) they
    are refused.

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
        MissingExtraError: there is no xfuser.
    """
    table = _table()
    attends = Attends(Rerouter(recipe, like=like, training="refuse", on_emulation=on_emulation))
    before = _registered.get(key)
    attends.before = table.get(key) if before is None else before.before
    attends.rerouter.report.of = f"xDiT's {key}"
    table[key] = _registered[key] = attends
    return attends.rerouter.report


def unregister(key: Any = None) -> None:
    """Undo `register`, of one key or of all. What stood there before is back; where nothing was, nothing happens."""
    for each in list(_registered) if key is None else [key]:
        mine = _registered.pop(each, None)
        if mine is None:
            continue
        table, before = _table(), mine.before
        if table.get(each) is not mine:  # (somebody has put another in its place)
            continue
        if before is None:
            del table[each]
        else:
            table[each] = before


class Attends:
    """An attention function as xDiT's registry has them."""

    def __init__(self, rerouter: Rerouter) -> None:
        self.rerouter = rerouter
        self.before: Any = None
        self.__name__ = self.__qualname__ = "lowbit"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float | None = 0.0,
        is_causal: bool | None = False,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, H, N, D]`` → the output, and lse float32 ``[B, Hq, N]`` (none of picked keys that torch ran).

        Raises:
            UnsupportedError: gradients, dropout, or an option that nobody here knows.
        """
        given = {name: option for name, option in (attention_kwargs or {}).items() if option is not None}
        if unknown := [name for name, option in given.items() if name not in _HARMLESS and option is not False]:
            raise UnsupportedError(f"attention_kwargs {', '.join(unknown)}: a recipe in xDiT has no such option")
        mask, picked = given.get("attn_mask"), given.get("indices_k")
        if (mask is not None or picked is not None) and _ring_size() > 1:
            raise UnsupportedError("a mask with ring attention: each rank would apply its own to others' keys")
        causal, dropout = bool(is_causal), float(dropout_p or 0.0)
        if picked is None:
            gqa = query.shape[1] != key.shape[1]
            call = TorchCall(query, key, value, mask, dropout, causal, None, gqa)
            return self.rerouter.answer_with_lse(call)
        if mask is not None or causal or dropout:
            raise UnsupportedError("indices_k with a mask, causality or dropout")
        return self._of_picked(query, key, value, picked, given["cu_seqlens_k"])

    def _of_picked(
        self, query: Tensor, key: Tensor, value: Tensor, picked: Tensor, cu_k: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """All queries, and of the keys of all batch entries those that ``picked`` counts."""
        batch, _, rows, _ = query.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        cu_q = torch.arange(batch + 1, dtype=cu_k.dtype, device=cu_k.device) * rows
        call = PackedCall(q, k[picked], v[picked], cu_q, cu_k, False, None)
        if call.wants_grad():
            raise UnsupportedError("a gradient is asked of quantised attention, which has none: use torch.no_grad()")
        answer = answer_packed(self.rerouter, call, return_lse=True)
        if answer is None:
            exact = exactly_packed(call)
            return exact.reshape(batch, rows, *exact.shape[1:]).transpose(1, 2), None
        out, lse = answer
        assert lse is not None  # (asked for; dispatch chose what gives it)
        out = out.reshape(batch, rows, *out.shape[1:]).transpose(1, 2)
        return out, lse.reshape(-1, batch, rows).transpose(0, 1)


def _ring_size() -> int:
    """Ranks of xDiT's ring; 1 before it is set up."""
    state = importlib.import_module("xfuser.core.distributed.parallel_state")
    if getattr(state, "_SP", None) is None:
        return 1
    size: int = state.get_ring_parallel_world_size()
    return size


def _table() -> dict[Any, Any]:
    if importlib.util.find_spec("xfuser") is None:
        raise MissingExtraError("xDiT's attention backend", "xdit", "xfuser")
    found: Any = importlib.import_module("xfuser.core.distributed.attention_backend").ATTENTION_FUNCTION_REGISTRY
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"xfuser's ATTENTION_FUNCTION_REGISTRY is {shown(found)}")
    return found
