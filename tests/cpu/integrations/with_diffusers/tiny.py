"""`Tiny`: one of diffusers' classes in a configuration of a few thousand weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

HEADS, DIM = 2, 16
WIDTH = HEADS * DIM
TEXT, TOKENS = 6, 16

Config = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers, small.

    family: models whose attention runs the same code. config: for its constructor. inputs: for its forward, made anew.
    masked: whether some of the inputs are hidden by a mask (`seen`).
    """

    name: str
    family: str
    config: Config
    inputs: Callable[[], Config]
    masked: bool = False
    refuses: str = ""
    """What the class itself says of backends that it cannot run with."""
    also: str = ""
    """What tells it from another configuration of the same class."""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.also}" if self.also else self.name

    def build(self) -> nn.Module:
        """With weights that are the same every time, and large enough for attention to matter."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).eval()
        for name, p in model.named_parameters():
            if not p.any() and p.dim() > 1:  # (gates and last layers begin at zero)
                nn.init.normal_(p, std=0.1)
            if name.endswith(("gate", "scale_shift_table")):
                nn.init.normal_(p, std=0.5)
        return model

    def run(self, model: nn.Module) -> Tensor:
        """All that its forward gives, as one vector."""
        torch.manual_seed(1)
        with torch.no_grad():
            return flat(model(**self.inputs()))


def flat(out: Any) -> Tensor:
    """Every tensor in an output of diffusers, one behind another."""
    if isinstance(out, Tensor):
        return out.float().flatten()
    values = out.values() if isinstance(out, dict) else out
    return torch.cat([flat(value) for value in values if value is not None])


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def seen(batch: int, tokens: int, hidden: int = 2, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask ``[batch, tokens]`` whose last are hidden."""
    mask = torch.ones(batch, tokens, dtype=dtype)
    mask[:, tokens - hidden :] = 0
    return mask


def ragged() -> Tensor:
    """A mask of two texts, the second of which is shorter."""
    return torch.cat([seen(1, TEXT, hidden=0), seen(1, TEXT)])


def t(value: float = 10.0, batch: int = 1) -> Tensor:
    return torch.full((batch,), value)


def ti(value: int = 10, batch: int = 1) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int64)


AXES = (4, 4, 8)


def heads(**more: Any) -> Config:
    return {"num_attention_heads": HEADS, "attention_head_dim": DIM, **more}
