"""Train the language model: `python train_lm.py --out lm.safetensors --minutes 4`.

Bytes of the standard library's sources (prepare.py). The first part of the time sees windows of 2048 bytes,
the rest windows of 8192, as models for long contexts are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loop import Options, parse, sizes, train
from torch import Tensor, nn

from lowbit_studies.subjects import stdlib
from lowbit_studies.subjects.language import BYTES, LanguageConfig, LanguageModel, score

SHORT, LONG = 2048, 8192
LONG_FROM = 0.6
"""Share of the training after which windows are long: attention makes them twice as dear a byte."""
VALIDATION_BYTES = 16 * LONG


def main(options: Options | None = None, short: int = SHORT, long: int = LONG) -> None:
    options = options or parse(__doc__ or "", Path(__file__).parent / "data/corpus.npz", batch=32, learning_rate=2e-3)
    with np.load(options.data) as data:
        text, held_out = torch.from_numpy(data["train"]), torch.from_numpy(data["held_out"])
        python = str(data["python"])
    text = text.to(options.device)

    def loss_at(model: nn.Module, progress: float, numbers: torch.Generator) -> Tensor:
        length = short if progress < LONG_FROM else long
        count = max(1, options.batch * short // length)
        first = torch.randint(len(text) - length, (count, 1), generator=numbers, device=text.device)
        window = text[first + torch.arange(length + 1, device=text.device)].long()
        logits = model(window[:, :-1])
        return F.cross_entropy(logits.float().view(-1, BYTES), window[:, 1:].flatten())

    def validate(model: nn.Module) -> dict[str, Any]:
        found = {}
        for length in (short, long):
            count = max(1, min(VALIDATION_BYTES, len(held_out) // 2) // length)
            windows = stdlib.windows(held_out, count, length, seed=0).to(options.device)
            parts = [score(model, part) for part in torch.split(windows, max(1, 2 * LONG // length))]
            found[f"bits_{length}"] = float(torch.cat([part.bits for part in parts]).mean())
            found[f"accuracy_{length}"] = float(torch.cat([part.accuracy for part in parts]).mean())
        return found

    torch.manual_seed(options.seed)
    model = LanguageModel(sizes(LanguageConfig, options.overrides))
    notes = {"data": f"sources of CPython {python}'s standard library (PSF licence)", "seed": str(options.seed)}
    train(model, loss_at, options, ema_decay=0.995, validate=validate, notes=notes)


if __name__ == "__main__":
    main()
