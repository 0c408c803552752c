"""A small causal language model of bytes, built like Llama: RoPE, RMSNorm, SwiGLU; attention by torch's SDPA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import rope

BYTES = 256
SEPARATOR = 0
"""The byte between two files; no source file holds it."""


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes. The defaults give 4.93 million parameters (9.9 MB at 16 bits): deep rather than wide, so that a policy
    has many layers to choose from."""

    dim: int = 192
    heads: int = 3
    layers: int = 12
    hidden: int = 448
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads


class _Attention(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)  # with a bias, as in Qwen: it gives K its channel outliers
        self.proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rope.turn(q, angle), rope.turn(k, angle), v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = _Attention(config)
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angle)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Next-byte logits.

    >>> LanguageModel(LanguageConfig(dim=64, heads=1, layers=2, hidden=64))(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 256])
    """

    def __init__(self, config: LanguageConfig = LanguageConfig()) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.dim)  # the output layer, too
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                into_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / ((2 * config.layers) ** 0.5 if into_residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 ``[B, N]`` to logits ``[B, N, 256]``."""
        positions = torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        angle = rope.angles(positions, self.config.head_dim, self.config.rope_base)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angle)
        return F.linear(self.norm(x), self.embedding.weight)


@dataclass(frozen=True)
class TextScore:
    """How well windows of text were predicted, one number a window: ``bits`` a byte, ``accuracy`` of the likeliest."""

    bits: Tensor
    accuracy: Tensor


@torch.no_grad()
def score(model: nn.Module, windows: Tensor) -> TextScore:
    """Predict every byte of ``windows`` (int64 ``[W, N + 1]``) from those before it; the scores are float64 ``[W]``.

    The perplexity of a byte is ``2^bits``.
    """
    logits = model(windows[:, :-1]).double()
    target = windows[:, 1:]
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    hits = logits.argmax(dim=-1) == target
    return TextScore(nats.mean(dim=1) / torch.log(nats.new_tensor(2.0)), hits.double().mean(dim=1))
