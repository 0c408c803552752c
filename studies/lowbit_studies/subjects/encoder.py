"""MiniLM as a subject: sentence embeddings, against those of exact attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_attention.demo.minilm import MiniLM
from lowbit_attention.demo.study import CHUNK_TOKENS
from lowbit_attention.demo.text import passages, sentences

from .base import EndMetric, Restart, Subject

_PASSAGES, _CALIBRATION_PASSAGES = 12, 4


class EncoderSubject(Subject):
    """Texts are what is independent: long ones (512 tokens) first, then sentences.

    Args:
        texts: how many sentences are judged, beside twelve passages.

    Raises:
        MissingExtraError: if the extra ``demo`` is not installed.
    """

    name = "minilm"
    title = "MiniLM-L6, sentence embeddings"
    metrics = (
        EndMetric("cos", "1000 · (1 − CosSim) of a passage's embedding", False, 3),
        EndMetric("cos_sentences", "1000 · (1 − CosSim) of a sentence's embedding", False, 3),
        EndMetric("neighbours", "share of sentences whose nearest other sentence is another one", False, 4),
    )

    def __init__(self, *, texts: int = 150, device: str | torch.device = "cpu") -> None:
        self._encoder = MiniLM(attention="sdpa")
        self.model = self._encoder.model.to(device)
        chunks = passages(_PASSAGES + _CALIBRATION_PASSAGES)
        self._passages = self._tokens(chunks[:_PASSAGES], CHUNK_TOKENS, device)
        self._calibration = self._tokens(chunks[_PASSAGES:], CHUNK_TOKENS, device)
        self._sentences = self._tokens(sentences(texts), None, device)

    def _tokens(self, texts: list[str], length: int | None, device: str | torch.device) -> dict[str, Tensor]:
        return {name: t.to(device) for name, t in self._encoder.tokenize(texts, length=length).items()}

    def calibrate(self, number: int, restart: Restart) -> Tensor:
        """The embedding ``[1, 384]`` of one passage."""
        restart()
        at = number % _CALIBRATION_PASSAGES
        return self._encoder.embed({name: t[at : at + 1] for name, t in self._calibration.items()})

    def distance(self, exact: Tensor, other: Tensor) -> float:
        """Mean of 1 − CosSim."""
        return float(_apart(exact, other).mean())

    def outputs(self, restart: Restart) -> Tensor:
        """Embeddings ``[12 + sentences, 384]``, of length 1."""
        found = []
        for batch in (self._passages, self._sentences):
            restart()
            found.append(self._encoder.embed(batch))
        return torch.cat(found)

    def judge(self, exact: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Per text: the first metric of the passages, the others of the sentences."""
        apart = 1000 * _apart(exact, other)
        changed = _nearest(exact[_PASSAGES:]) != _nearest(other[_PASSAGES:])
        return {"cos": apart[:_PASSAGES], "cos_sentences": apart[_PASSAGES:], "neighbours": changed.double()}


def _apart(exact: Tensor, other: Tensor) -> Tensor:
    """1 − CosSim of vectors of length 1, without the cancellation: half their squared distance."""
    return (exact.double() - other.double()).square().sum(dim=-1) / 2


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings.double() @ embeddings.double().T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=-1)
