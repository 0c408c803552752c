"""What a call of transformers' attention function means in torch's words, and what of it no recipe can do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call.torch_call import TorchCall
from ...errors import InvalidArgumentError, UnsupportedError, shown
from ..packed import PackedCall, sees_itself

HARMLESS = frozenset({
    # read before attention, or after it
    "cache_position", "inputs_embeds", "labels", "logits_to_keep", "num_items_in_batch", "past_key_value",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
    # what is returned beside it
    "output_hidden_states", "output_router_logits",
    # for layers of other kinds (state-space models)
    "seq_idx",
    # how kernels of others work, not what they answer
    "deterministic", "max_length_k", "max_length_q",
})  # fmt: skip
"""Words that models hand on to attention and that do not change what it answers."""

_EAGER = "run this model (or this part of it) with attn_implementation='eager'"
_INSIDE = "use attn_implementation='sdpa' within sdpa_enabled"
_IN_THE_MASK = f"which 'sdpa' and 'eager' find written into the mask, and no others; {_INSIDE}"

_REFUSED = {
    "softcap": f"quantised attention has no soft cap of the logits; {_EAGER}",
    "output_attentions": f"quantised attention has no matrix of weights to return; {_EAGER}, or leave it out",
    "cache": f"continuous batching and paged caches are for 'sdpa' alone; {_INSIDE}",
    "indices": f"this model hides all but these keys, {_IN_THE_MASK}",
    "block_indices": f"this model hides all but these blocks of keys, {_IN_THE_MASK}",
}
"""Words that change the answer, that a recipe cannot do, and what to do instead."""


class Words(NamedTuple):
    """A call as integrations have it, and the logits of sinks that broadcast to ``[B, Hq, Nq]``."""

    call: TorchCall | PackedCall
    sinks: Tensor | None


def refuse(name: str, dropout: float, words: dict[str, Any]) -> None:
    """What changes the answer and cannot be done.

    Args:
        name: the implementation's, for the error.

    Raises:
        UnsupportedError: one is asked for, or a word is given that nobody here knows.
    """
    for word, why in _REFUSED.items():
        value = words.get(word)
        if value is not None and value is not False and not (word == "softcap" and value == 0):
            said = word if isinstance(value, Tensor) else f"{word}={shown(value)}"
            raise UnsupportedError(f"attn_implementation={name!r}: {said}: {why}")
    if dropout:
        raise UnsupportedError(
            f"attn_implementation={name!r}: dropout={dropout}: quantised attention has none: call model.eval(), set "
            "the configuration's attention dropout to 0, or train with attn_implementation='sdpa'"
        )
    for word, value in words.items():
        if value is not None and value is not False and word not in HARMLESS and word not in _REFUSED:
            raise UnsupportedError(
                f"attn_implementation={name!r}: attention is given {word}, which lowbit-attention does not know; if it "
                f"does not change the answer, please report it, else {_INSIDE}"
            )


def words(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    is_causal: bool | None,
    sliding_window: int | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    packs: bool,
) -> Words:
    """The call of ``[B, Hq, Nq, D]``, ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``; ``packs``: it may be a packed one.

    A mask says all of who sees whom, windows and padding too; without one, ``is_causal`` (the module's own if ``None``)
    and ``sliding_window`` do, and ``cu_q``, ``cu_k`` cut the tokens into sequences in either case.

    Raises:
        InvalidArgumentError: a mask that is no tensor, or a window that nothing says the direction of.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise InvalidArgumentError(f"attention_mask is a {type(mask).__name__}, and must be a tensor or None")
    rows = query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and mask is None
    gqa = query.shape[1] != key.shape[1]
    if sinks is not None:
        sinks = sinks[:, None] if sinks.dim() == 1 else sinks.squeeze(-1)
    if cu_q is not None or cu_k is not None:
        cu_q, cu_k = cu_k if cu_q is None else cu_q, cu_q if cu_k is None else cu_k
        assert cu_q is not None
        assert cu_k is not None
        by_head = sinks is None or sinks.shape[-1] == 1
        if packs and mask is None and sliding_window is None and position_bias is None and by_head:
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
            return Words(PackedCall(q, k, v, cu_q, cu_k, causal, scaling, None if sinks is None else sinks[:, 0]), None)
        if query.shape[0] != 1:
            raise InvalidArgumentError(
                f"cu_seq_lens with a batch of {query.shape[0]} and a mask, a window or a bias: put the sequences one "
                "behind another, in a batch of 1"
            )
        itself = sees_itself(cu_q, cu_k, rows, key.shape[2], causal, sliding_window if mask is None else None)
        mask, causal = _and(mask, itself), False
    elif mask is None:
        if sliding_window is not None and sliding_window < key.shape[2]:
            mask, causal = _window(sliding_window, causal, rows, key), False
        elif causal and 1 < rows < key.shape[2]:  # the last of all queries
            mask, causal = _last(rows, key), False
        causal = causal and rows > 1
    if position_bias is not None:
        mask, causal = _biased(position_bias, mask, causal, query, key), False
    return Words(TorchCall(query, key, value, mask, 0.0, causal, scaling, gqa), sinks)


def _window(sliding_window: int, causal: bool, rows: int, key: Tensor) -> Tensor:
    """Each query sees so many keys, up to its own."""
    if not causal:
        raise InvalidArgumentError(
            f"sliding_window={sliding_window} of {key.shape[2]} keys, without causality and without a mask, which "
            "would say whether it reaches to both sides"
        )
    return _last(rows, key).triu(key.shape[2] - rows - sliding_window + 1)


def _last(rows: int, key: Tensor) -> Tensor:
    """Causality of the last so many queries: the very last sees every key."""
    keys = key.shape[2]
    return torch.ones(rows, keys, dtype=torch.bool, device=key.device).tril(keys - rows)


def _and(mask: Tensor | None, visible: Tensor) -> Tensor:
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """A bias of the logits, as one additive mask with whatever hides keys."""
    bias = bias.to(query.dtype)
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
