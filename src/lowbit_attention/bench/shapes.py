"""The shapes that are timed: a grid, real models' calls, a quick handful, one with each mask, any other by its text."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import InvalidArgumentError, shown

MASKS: dict[str, str] = {
    "padding": "B11K",
    "holes": "B11K",
    "bits": "11QK",
    "seen": "11QK",
    "blocks": "11QK",
    "bias": "11QK",
    "key_bias": "B11K",
    "bits_by_head": "BHQK",
}
"""The masks that a shape can name, and their dimensions; `masks.make_mask` makes them."""
FLOAT_MASKS = ("bias", "key_bias")
"""Those that are added to the logits, 16-bit floats; the others are bool."""

_SIZE = "([0-9]{1,12})"
_TEXT = re.compile(
    rf"{_SIZE}x{_SIZE}(?:/{_SIZE})?x{_SIZE}(?:,{_SIZE})?x{_SIZE}(?:/{_SIZE})?(:causal)?"
    rf"(?::({'|'.join(MASKS)})|(:varlen))?"
)
_LARGEST_SIZE = 2**31 - 1
"""Of a dimension: what kernels count tokens in."""


@dataclass(frozen=True)
class Shape:
    """One attention call; lengths are tokens, causality is bottom-right, ``mask`` is one of `MASKS`.

    ``v_head_dim``: V's channels, if they are not K's. ``is_varlen``: the batch is sequences of different lengths,
    packed (`sequence_lengths`); ``q_len`` and ``kv_len`` are their means.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    is_causal: bool = False
    mask: str | None = None
    v_head_dim: int = 0
    is_varlen: bool = False

    def __post_init__(self) -> None:
        if self.v_head_dim == 0:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        sizes = (
            self.batch, self.q_heads, self.kv_heads, self.q_len, self.kv_len, self.head_dim, self.v_head_dim,
        )  # fmt: skip
        if min(sizes) < 1 or max(sizes) > _LARGEST_SIZE:
            raise InvalidArgumentError(
                f"shape {shown(self.name)}: every size must be at least 1, and at most {_LARGEST_SIZE}, got {sizes}"
            )
        if self.q_heads % self.kv_heads:
            raise InvalidArgumentError(
                f"shape {self.name!r}: {self.q_heads} query heads are not a multiple of {self.kv_heads} key heads"
            )
        if self.mask is not None and self.mask not in MASKS:
            raise InvalidArgumentError(
                f"shape {shown(self.name)}: unknown mask {shown(self.mask)}; known: {', '.join(MASKS)}"
            )

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees by causality, in one head of all batches; a mask hides none here."""
        lengths = zip(self.sequence_lengths(self.q_len), self.sequence_lengths(self.kv_len), strict=True)
        return sum(_pairs(q_len, kv_len, self.is_causal) for q_len, kv_len in lengths)

    def sequence_lengths(self, tokens: int) -> list[int]:
        """Of each sequence, where ``tokens`` is their mean: from an eighth of it to fifteen eighths in equal steps, in
        an order that is always the same; or, without ``is_varlen``, that each."""
        if not self.is_varlen or self.batch == 1:
            return [tokens] * self.batch
        starts = [round(tokens * (b / 8 + 7 / 8 * b * (b - 1) / (self.batch - 1))) for b in range(self.batch + 1)]
        lengths = [end - start for start, end in pairwise(starts)]
        random.Random(0).shuffle(lengths)
        return lengths

    @property
    def flops(self) -> int:
        """Multiplications and additions of Q·Kᵀ and P·V over the visible pairs."""
        return 2 * self.q_heads * self.visible_pairs * (self.head_dim + self.v_head_dim)

    @property
    def mask_size(self) -> tuple[int, ...] | None:
        """The mask's dimensions, ``[B or 1, Hq or 1, Nq or 1, Nk]``."""
        if self.mask is None:
            return None
        sizes = {"B": self.batch, "H": self.q_heads, "Q": self.q_len, "K": self.kv_len, "1": 1}
        return tuple(sizes[dimension] for dimension in MASKS[self.mask])

    @property
    def mask_bytes(self) -> int:
        """What the mask takes in memory."""
        return 0 if self.mask_size is None else math.prod(self.mask_size) * (2 if self.mask in FLOAT_MASKS else 1)

    @property
    def label(self) -> str:
        """What `parse_shape` reads."""
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        length = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len},{self.kv_len}"
        channels = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        sizes = f"{self.batch}x{heads}x{length}x{channels}" + (":causal" if self.is_causal else "")
        return sizes + (f":{self.mask}" if self.mask else "") + (":varlen" if self.is_varlen else "")


def _pairs(q_len: int, kv_len: int, is_causal: bool) -> int:
    if not is_causal:
        return q_len * kv_len
    first = max(1, kv_len - q_len + 1)  # keys that the first query with any key sees; the last sees all
    return (first + kv_len) * (kv_len - first + 1) // 2


def parse_shape(text: str) -> Shape:
    """A shape from ``batch x heads x tokens x head_dim``, causality and one of `MASKS` or "varlen" after it.

    >>> parse_shape("1x24x4608x128").flops
    260919263232
    >>> parse_shape("4x32/8x8192x128:causal").kv_heads
    8
    >>> parse_shape("1x40x32760,512x128").kv_len
    512
    >>> parse_shape("4x32x8192x128:padding").mask_size
    (4, 1, 1, 8192)
    >>> parse_shape("1x128x8192x192/128:causal").v_head_dim
    128
    >>> sorted(parse_shape("3x16x800x64:varlen").sequence_lengths(800))
    [100, 800, 1500]

    Raises:
        InvalidArgumentError: another text, a size of 0, or heads that do not divide.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(
            f"shape {shown(text)} is not batch x heads x tokens x head_dim, such as 1x24x4608x128; with query/key "
            f"heads, query,key tokens, Q and K's/V's channels and causality: 4x32/8x8192x128:causal, "
            f"1x40x32760,512x128, 1x128x8192x192/128; and after these a mask, 4x32x8192x128:padding "
            f"({', '.join(MASKS)}), or sequences of different lengths, 16x16x4352x128:varlen"
        )
    batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim = (int(n) if n else 0 for n in match.groups()[:7])
    if match[3] is None:
        kv_heads = q_heads
    if match[5] is None:
        kv_len = q_len
    if match[7] is None:
        v_head_dim = head_dim
    causal, mask, varlen = match[8] is not None, match[9], match[10] is not None
    sizes = batch, q_heads, kv_heads, q_len, kv_len, head_dim
    if not v_head_dim:
        raise InvalidArgumentError(f"shape {shown(text.strip())}: every size must be at least 1, got {(*sizes, 0)}")
    found = Shape(text.strip(), *sizes, causal, mask, v_head_dim, varlen)
    return replace(found, name=found.label)


def _square(name: str, batch: int, heads: int, tokens: int, head_dim: int, causal: bool = False) -> Shape:
    return Shape(name, batch, heads, heads, tokens, tokens, head_dim, causal)


def _grid(head_dim: int, kilo: int, causal: bool = False) -> Shape:
    batch = {16: 2, 32: 1}.get(kilo, 4)  # the longest would need more memory than they need batches to fill a GPU
    name = f"d{head_dim} {kilo}K" + (" causal" if causal else "")
    return _square(name, batch, 32, 1024 * kilo, head_dim, causal)


_FLUX = _square("Flux", 1, 24, 4608, 128)
_MASKED = "4x32x8192x128"

SETS: dict[str, tuple[Shape, ...]] = {
    "quick": (_grid(128, 1), _grid(128, 2), _grid(128, 8), _grid(128, 8, True), _grid(64, 8), _FLUX),
    "grid": tuple(_grid(d, k, c) for d in (128, 64) for c in (False, True) for k in (1, 2, 4, 8, 16, 32)),
    "models": (
        _FLUX,
        _square("SD3.5-L", 2, 38, 4429, 64),
        _square("CogVideoX-2B", 2, 30, 17776, 64),
        _square("Wan 1.3B 480p", 1, 12, 32760, 128),
        Shape("Wan cross", 1, 40, 40, 32760, 512, 128),
        _square("Mochi", 1, 24, 44520, 128),
        _square("Wan 14B 720p", 1, 40, 75600, 128),
        _square("HunyuanVideo 720p", 1, 24, 119056, 128),
        Shape("Llama-3.1-8B 8K", 1, 32, 8, 8192, 8192, 128, True),
        Shape("Llama-3.1-8B 32K", 1, 32, 8, 32768, 32768, 128, True),
        _square("1x8x512x64", 1, 8, 512, 64),
        _square("ViT", 16, 12, 197, 64),
    ),
    "masks": tuple(map(parse_shape, (_MASKED, *(f"{_MASKED}:{mask}" for mask in MASKS)))),
    # equal lengths, and as many tokens in sequences of 544 to 8160
    "varlen": tuple(parse_shape(f"16x16x4352x128{more}") for more in ("", ":varlen", ":causal", ":causal:varlen")),
    # square; groups of 4 and of 16 heads; chunks of a long prompt; many queries of few keys; wide heads
    "prefill": tuple(
        parse_shape(text)
        for text in (
            "1x32x8192x128:causal",
            "1x32/8x8192x128:causal",
            "1x32/2x8192x128:causal",
            "1x32/8x1024,32768x128:causal",
            "1x32/8x2048,16384x128:causal",
            "1x32x8192x128",
            "1x32x32768,1024x128",
            "1x32x65536,512x128",
            "4x16x4096x256",
            "1x16/8x8192x256:causal",
            "1x128x4096x192/128:causal",
        )
    ),
}
"""Sets of shapes, by name."""


def shape_set(name: str) -> tuple[Shape, ...]:
    """The shapes of a set.

    Raises:
        InvalidArgumentError: no such set.
    """
    if name not in SETS:
        raise InvalidArgumentError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    return SETS[name]
