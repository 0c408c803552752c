"""One live call, every candidate recipe against exact attention, on some of its heads and query tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import attention
from ..call.checked import check_call
from ..call.masks import Masking, seen_keys
from ..call.torch_call import TorchCall
from ..errors import InvalidArgumentError
from ..evaluation.metrics import Metrics, compare
from ..recipes.definition import Recipe
from ..recipes.machine import DEFAULT_MACHINE, Machine
from ..reference.exact import exact

_TURN = (math.sqrt(5) - 1) / 2
"""The golden ratio: multiples of it, mod 1, are evenly spread however many there are."""


@dataclass(frozen=True)
class Sample:
    """How much of a call is scored: ``heads`` (each of some batch entry) and ``tiles`` of query rows, evenly spread.

    Every key of a chosen head counts, and whole query tiles, as scales and means are shared within them. Successive
    calls look at other heads and tiles. ``None`` means all. ``tokens``: how many tokens of a call the distributions of
    Q, K and V are taken from.

    What is not exact on a sample: scales that Q shares over a whole head (``per_tensor``) and SmoothQuant's factors
    come from the sampled rows alone.
    """

    heads: int | None = 4
    tiles: int | None = 2
    tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("heads", "tiles", "tokens"):
            value = getattr(self, name)
            if value is None and name != "tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(
                    f"{name}={value!r}: a positive number{'' if name == 'tokens' else ', or None'}"
                )


@dataclass(frozen=True)
class ScoredCall:
    """The arguments of one ``scaled_dot_product_attention`` as ``[B, H, N, D]`` views."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    sm_scale: float

    @classmethod
    def of(cls, call: TorchCall) -> ScoredCall:
        """From the arguments as they were given.

        Raises:
            InvalidArgumentError: arguments that torch would refuse, too.
        """
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        checked = check_call(call._replace(query=query, key=key, value=value), None, None)
        return cls(checked.q, checked.k, checked.v, checked.mask, call.is_causal, checked.sm_scale)


@dataclass(frozen=True)
class Sampled:
    """The chosen heads as a batch of one: q ``[1, S, rows, D]``, k and v of S heads, the mask, rows that count."""

    call: ScoredCall
    counted: Tensor | None
    """bool ``[1, S, rows]``; ``None`` for all. Left out are queries that are padding."""


def spread(count: int | None, of: int, turn: int) -> list[int]:
    """``count`` of the numbers below ``of``, evenly spread, others each turn; ascending.

    >>> spread(2, 8, 0), spread(2, 8, 1)
    ([0, 4], [2, 6])
    """
    if count is None or count >= of:
        return list(range(of))
    return sorted(int((i + turn * _TURN % 1) * of / count) for i in range(count))


def slices(count: int | None, batch: int, heads: int, turn: int) -> list[tuple[int, int]]:
    """``count`` of the pairs (batch entry, head), others each turn; ascending.

    Evenly over the heads first: heads differ more than inputs do, and steps over batch · heads that are a multiple of
    ``heads`` would hit one head only. Each head's entries begin elsewhere.

    >>> slices(4, 8, 4, 0)
    [(0, 0), (1, 2), (4, 1), (6, 3)]
    """
    found = []
    for number in spread(count, batch * heads, turn):
        head, entry = divmod(number, batch)
        found.append(((entry + int(head * _TURN % 1 * batch)) % batch, head))
    return sorted(found)


def take(call: ScoredCall, sample: Sample, tile: int, turn: int) -> Sampled:
    """The part of a call that is scored: whole query tiles of ``tile`` rows, every key."""
    batch, heads, rows = call.q.shape[:3]
    device = call.q.device
    b, h = torch.tensor(slices(sample.heads, batch, heads, turn), device=device, dtype=torch.int64).unbind(dim=1)
    h_kv = h // (heads // call.k.shape[1])
    tiles = spread(sample.tiles, -(-rows // tile), turn)
    whole = len(tiles) == -(-rows // tile)
    row = torch.arange(rows, dtype=torch.int64, device=device)
    if not whole:
        row = torch.cat([row[t * tile : (t + 1) * tile] for t in tiles])
    # the last row, which sees every key: else those behind the sample's rows were nobody's, and counted in no mean
    is_lent = call.is_causal and rows > 0 and bool(row[-1] != rows - 1)
    if is_lent:
        row = torch.cat([row, row.new_tensor([rows - 1])])
    mask = call.mask
    if mask is not None:
        m_b, m_h = (
            index if size > 1 else torch.zeros_like(index) for index, size in zip((b, h), mask.shape[:2], strict=True)
        )
        mask = mask[m_b, m_h][None]
    k, v = call.k[b, h_kv][None], call.v[b, h_kv][None]
    counted = None
    if rows == k.shape[2]:  # self-attention: a token that no query may see is padding, and its own row is nothing
        valid = seen_keys(Masking(None, mask), call.q[b, h][None], k)
        counted = None if valid is None else valid[:, :, row]
    if is_lent:
        of_sample = row != rows - 1
        counted = of_sample.expand(1, len(b), -1) if counted is None else counted & of_sample
    is_causal = call.is_causal
    if not whole:
        mask = None if mask is None else mask[:, :, row] if mask.shape[2] > 1 else mask
        if is_causal:
            seen = torch.arange(k.shape[2], dtype=torch.int64, device=device) <= row[:, None]
            hidden = -torch.inf
            mask = (
                seen[None, None]
                if mask is None
                else mask & seen
                if mask.dtype == torch.bool
                else mask.masked_fill(~seen, hidden)
            )
            is_causal = False
    chosen = ScoredCall(call.q[b[:, None], h[:, None], row][None], k, v, mask, is_causal, call.sm_scale)
    return Sampled(chosen, counted)


def score(sampled: Sampled, candidates: list[Recipe], machine: Machine | None) -> dict[str, Metrics]:
    """Every candidate's metrics against exact attention, in float64 where the device has it.

    ``machine``: whose numbers an emulation gives; ``None``: what `attention` runs here. NaN metrics if no row counts.
    """
    call = sampled.call
    dtype = torch.float32 if call.q.device.type == "mps" else torch.float64
    with torch.no_grad():
        masking = Masking(0 if call.is_causal else None, call.mask)
        target, lse = exact(call.q, call.k, call.v, sm_scale=call.sm_scale, masking=masking, dtype=dtype)
        rows = lse != -math.inf
        if sampled.counted is not None:
            rows = rows & sampled.counted
        found = {}
        for recipe in candidates:
            out = attention(
                call.q, call.k, call.v, recipe=recipe, attn_mask=call.mask, is_causal=call.is_causal,
                causal_alignment="top_left" if call.is_causal else None, sm_scale=call.sm_scale,
                like=None if recipe.is_exact else machine, on_emulation="allow",
            )  # fmt: skip
            found[recipe.name] = compare(target, out, rows)
    return found


def query_tile(machine: Machine | None) -> int:
    """Rows of a query tile of the machine that is scored: what is sampled comes in multiples of it."""
    return max((machine or DEFAULT_MACHINE).geometry.b_q, DEFAULT_MACHINE.geometry.b_q)
