"""Tiny models of transformers' own classes, with random weights to which attention matters. A helper, not a test."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

NEW = Version(transformers.__version__) >= Version("5")
"""Older ones have fewer models that ask for a registered attention, and a mixture of experts that does not compile."""

DECODER = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
ENCODER = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 8


@dataclass(frozen=True)
class HfCase:
    """A model class, its configuration, and what else its forward takes beside ``input_ids``."""

    model: str
    config: str
    options: dict[str, object]
    causal: bool = True
    more: Callable[[torch.Tensor], dict[str, torch.Tensor]] = field(default=lambda ids: {})
    ids: str = "input_ids"

    def build(self) -> nn.Module:
        """The model, in eval mode, by eager attention."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).eval()
        if not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in _files(model)):
            pytest.skip(f"{self.model} of transformers {transformers.__version__} has an attention of its own")
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = None  # (so that it goes on)
        model.set_attn_implementation("eager")
        return model

    def inputs(self, length: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
        """Two rows of tokens, none of them padding."""
        ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(seed))
        return {self.ids: ids, **self.more(ids)}


def decoder(name: str, config: str | None = None, **options: object) -> HfCase:
    """A causal language model."""
    return HfCase(f"{name}ForCausalLM", config or f"{name}Config", {**DECODER, **options})


def _sound(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(len(ids), 8, 40, generator=torch.Generator().manual_seed(1))}


CASES = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=WINDOW),
    "gemma2": decoder("Gemma2", sliding_window=WINDOW, attn_logit_softcapping=None, query_pre_attn_scalar=16),
    "gemma3": decoder("Gemma3", "Gemma3TextConfig", sliding_window=WINDOW, query_pre_attn_scalar=16),
    "qwen3": decoder("Qwen3"),
    "gpt_oss": decoder("GptOss", sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2),
    "bert": HfCase("BertModel", "BertConfig", ENCODER, causal=False),
    "modernbert": HfCase(
        "ModernBertModel", "ModernBertConfig",
        {**ENCODER, "local_attention": WINDOW, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
         "sep_token_id": 2},
        causal=False,
    ),
    "t5": HfCase(
        "T5Model", "T5Config", {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2,
        "num_heads": 4, "initializer_factor": 1.0}, more=lambda ids: {"decoder_input_ids": ids.flip(1)},
    ),
    "whisper": HfCase(
        "WhisperModel", "WhisperConfig",
        {"vocab_size": 64, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
         "max_source_positions": 20, "max_target_positions": 60, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1, "init_std": 0.15},
        more=_sound, ids="decoder_input_ids",
    ),
}  # fmt: skip


def read(output: object) -> torch.Tensor:
    """The logits, or the last hidden states."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _files(model: nn.Module) -> list[ModuleType]:
    """The files that a model's modules are defined in."""
    return [sys.modules[name] for name in {type(part).__module__ for part in model.modules()}]


class Witness:
    """Counts a model's attention calls by its modeling file's own eager function: nothing of ours is asked."""

    def __init__(self, model: nn.Module, monkeypatch: object) -> None:
        self.calls = 0
        for file in _files(model):
            if hasattr(file, "eager_attention_forward"):
                monkeypatch.setattr(file, "eager_attention_forward", self._counting(file.eager_attention_forward))

    def _counting(self, function: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            self.calls += 1
            return function(*args, **kwargs)

        return counting
