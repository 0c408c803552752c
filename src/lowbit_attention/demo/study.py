"""What quantised attention does to MiniLM: every layer's output, and the embeddings at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ..api import attention
from ..evaluation.metrics import Metrics, compare
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .minilm import MiniLM
from .text import passages, sentences

SENTENCES = 150
CHUNKS = 3
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class LayerResult:
    """One layer's attention output by one recipe, against exact attention on the same Q, K and V."""

    subject: str
    recipe: str
    layer: int
    metrics: Metrics


@dataclass(frozen=True)
class EmbeddingResult:
    """The sentences' embeddings when every layer runs one recipe, against the exact model's.

    cos_mean, cos_min: cosine similarity of a sentence's two embeddings. neighbours_changed: sentences whose nearest
    other sentence is another one.
    """

    recipe: str
    cos_mean: float
    cos_min: float
    neighbours_changed: int
    sentences: int


@dataclass(frozen=True)
class Study:
    """Everything measured."""

    recipes: tuple[str, ...]
    layers: tuple[LayerResult, ...]
    embeddings: tuple[EmbeddingResult, ...]

    def of(self, subject: str, recipe: str) -> list[Metrics]:
        """A recipe's metrics by layer."""
        return [r.metrics for r in self.layers if r.subject == subject and r.recipe == recipe]

    def mean_l1(self, subject: str, recipe: str) -> float:
        """A recipe's relative L1 averaged over the layers."""
        return fmean(m.l1 for m in self.of(subject, recipe))


Advance = Callable[[str], None]


def steps(recipes: list[Recipe], layers: int) -> int:
    """How often `run` calls ``advance``."""
    return len(recipes) * (2 * layers + 1)


def run(model: MiniLM, recipes: list[Recipe], like: Machine | None, advance: Advance) -> Study:
    """Measure ``recipes`` with `CHUNKS` unpadded chunks of `CHUNK_TOKENS` tokens and with `SENTENCES` sentences."""
    chunks = model.tokenize(passages(CHUNKS), length=CHUNK_TOKENS)
    short = model.tokenize(sentences(SENTENCES))
    layers: list[LayerResult] = []
    exact: dict[str, Tensor] = {}
    for subject, batch in (("chunks", chunks), ("sentences", short)):
        rows = batch["attention_mask"].bool()[:, None]
        judge = _Judge(subject, recipes, like, rows, advance)
        with model.attention_by(judge):
            exact[subject] = model.embed(batch)
        layers += judge.results
    embeddings = []
    for recipe in recipes:
        with model.attention_by(_by(recipe, like)):
            embeddings.append(_compare_embeddings(recipe.name, exact["sentences"], model.embed(short)))
        advance(f"{recipe.name}: embeddings")
    return Study(tuple(r.name for r in recipes), tuple(layers), tuple(embeddings))


def _by(recipe: Recipe, like: Machine | None) -> Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]:
    machine = None if recipe.is_exact else like

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float) -> Tensor:
        return attention(q, k, v, recipe=recipe, attn_mask=mask, sm_scale=sm_scale, like=machine, on_emulation="allow")

    return attend


class _Judge:
    """Exact attention that, on the way, compares every recipe with float64 attention on the same tensors."""

    def __init__(
        self, subject: str, recipes: list[Recipe], like: Machine | None, rows: Tensor, advance: Advance
    ) -> None:
        self.subject, self.recipes, self.like, self.rows, self.advance = subject, recipes, like, rows, advance
        self.results: list[LayerResult] = []
        self._layer = 0

    def __call__(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float) -> Tensor:
        exact = attention(q.double(), k.double(), v.double(), recipe="exact", attn_mask=mask, sm_scale=sm_scale)
        for recipe in self.recipes:
            out = _by(recipe, self.like)(name, q, k, v, mask, sm_scale)
            metrics = compare(exact, out, self.rows)
            self.results.append(LayerResult(self.subject, recipe.name, self._layer, metrics))
            self.advance(f"{self.subject}, layer {self._layer}: {recipe.name}")
        self._layer += 1
        return exact.to(q.dtype)


def _compare_embeddings(recipe: str, exact: Tensor, other: Tensor) -> EmbeddingResult:
    cos = (exact.double() * other.double()).sum(dim=-1)
    changed = _nearest(exact) != _nearest(other)
    return EmbeddingResult(recipe, float(cos.mean()), float(cos.min()), int(changed.sum()), len(exact))


def _nearest(embeddings: Tensor) -> Tensor:
    """Index of each row's most similar other row."""
    similarity = embeddings.double() @ embeddings.double().T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=-1)
