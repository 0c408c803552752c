"""Small models and made-up observations that the tests of this room share."""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from lowbit_attention import RECIPES, Metrics
from lowbit_attention.adaptive import CallKey, Observations, Record, Score
from lowbit_attention.adaptive.distributions import new_distribution
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.evaluation.synthetic import make

CANDIDATES = ("sage2_8b", "sage2pp_8b", "sage2_4b", "rotated_4b")


class Attention(nn.Module):
    """Self-attention of ``heads`` heads; ``calls`` how often a forward attends."""

    def __init__(self, width, heads, calls=1):
        super().__init__()
        self.qkv, self.heads, self.calls = nn.Linear(width, 3 * width), heads, calls

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        for _ in range(self.calls):
            v = F.scaled_dot_product_attention(q, k, v)
        return v.transpose(1, 2).reshape(batch, length, width)


class Net(nn.Module):
    def __init__(self, layers=3, width=64, heads=2, calls=1):
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, heads, calls) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).eval().requires_grad_(False)


def tokens(length=160, width=64, seed=0, batch=1):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def made_up(layers=6, steps=5, candidates=CANDIDATES, seed=0, name="blocks.{}.attn", shape="1x24x4096x128"):
    """Observations that no model made: errors that differ by layer, step and recipe, as real ones do."""
    rng = random.Random(seed)
    seen = Observations({c: RECIPES[c] for c in candidates}, like="sm_89", runs=2)
    base = {"sage2_8b": 0.012, "sage2pp_8b": 0.014, "sage2_4b": 0.11, "rotated_4b": 0.09, "int8_u8": 0.011}
    layer_factor = [math.exp(rng.gauss(0, 0.6)) for _ in range(layers)]
    for layer in range(layers):
        for t in range(steps):
            key = CallKey(name.format(layer), 0, 1000.0 * (1 - t / steps))
            record = Record(key, parse_shape(shape), "bfloat16", "none", 2)
            for c in candidates:
                l1 = base[c] * layer_factor[layer] * (1 + 0.8 * (t / steps) ** 2) * math.exp(rng.gauss(0, 0.15))
                record.scores[c] = Score()
                for _ in range(2):
                    record.scores[c].add(Metrics(1 - l1**2 / 2, l1, l1 / 10, l1))
            seen.records[key] = record
        q, k, v = make("rope_bias" if layer % 2 else "qk_bias", heads=2, length=128, head_dim=64, seed=layer)
        add_distribution(seen, name.format(layer), q, k, v)
    return seen


def add_distribution(seen, name, q, k, v):
    from lowbit_attention.adaptive.distributions import add_call
    from lowbit_attention.adaptive.scoring import ScoredCall

    distribution = seen.distributions.setdefault(name, new_distribution())
    add_call(distribution, ScoredCall(q, k, v, None, False, 0.125), 128, 256, 0)
