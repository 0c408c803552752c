"""The masks that a shape's text can name (`shapes.MASKS`), as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import FLOAT_MASKS, Shape

HIDDEN = {"holes": 0.3, "bits": 0.1, "bits_by_head": 0.1}
"""The share of the places that these masks hide, at random."""
PADDING = 64
"""Padding hides one key of so many, at the end of every sequence but the first."""
BLOCKS = 4
"""How many blocks lie on the diagonal of the mask ``blocks``."""


def make_mask(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor | None:
    """The mask that a shape names, the same for every run on a kind of device; ``None`` if it names none.

    Bool masks are True where a query may see; ``dtype`` is that of the others. It needs no memory beside the mask.
    """
    size = shape.mask_size
    if size is None:
        return None
    generator = torch.Generator(device).manual_seed(
        seed + 1
    )  # with the inputs' own seed a bias would repeat Q's numbers
    if shape.mask in FLOAT_MASKS:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)
    if shape.mask in HIDDEN:
        return torch.empty(size, dtype=torch.bool, device=device).bernoulli_(
            1 - HIDDEN[shape.mask], generator=generator
        )
    if shape.mask == "blocks":
        rows, keys = (
            torch.arange(length, dtype=torch.int64, device=device) * BLOCKS // length
            for length in (shape.q_len, shape.kv_len)
        )
        return (rows[:, None] == keys).reshape(size)
    mask = torch.ones(size, dtype=torch.bool, device=device)
    if shape.mask == "padding":
        hidden = min(shape.kv_len - 1, max(1, shape.kv_len // PADDING))
        mask[1:, ..., shape.kv_len - hidden :] = False
    return mask
