"""The language model as a subject: held-out sources of the standard library, next-byte prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from . import stdlib, weights
from .base import EndMetric, Restart, Subject
from .language import BYTES, LanguageConfig, LanguageModel

_CALIBRATION_SEED, _HELD_OUT_SEED = 1, 0
_CALIBRATION_WINDOWS = 64
"""Different ones, at most."""


class LanguageSubject(Subject):
    """Windows of text are what is independent; ``bits`` is the end metric.

    Args:
        model: a trained model; ``None`` loads the one in the package.
        context: bytes that a window predicts.
        windows: how many are judged; batch: how many run at once.
        calibration_windows: in one run of `calibrate`.
        train, held_out: uint8 text; ``None`` reads this Python's standard library.

    Raises:
        InvalidArgumentError: no weights, or too little text.
    """

    name = "lm"
    title = "language model of bytes, 12 layers, RoPE, on the standard library's sources"
    metrics = (
        EndMetric("bits", "bits a byte of held-out text", False, 4),
        EndMetric("accuracy", "share of bytes predicted right", True, 4),
        EndMetric("kl", "KL divergence from the exact model's prediction, millibits a byte", False, 3),
    )

    def __init__(
        self,
        model: LanguageModel | None = None,
        *,
        context: int = 2048,
        windows: int = 8,
        batch: int = 4,
        calibration_windows: int = 1,
        device: str | torch.device = "cpu",
        train: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        path = weights.FOLDER / "lm.safetensors"
        self.model = (weights.load(path, LanguageModel, LanguageConfig) if model is None else model).eval().to(device)
        train = stdlib.load("train").text if train is None else train
        held_out = stdlib.load("held_out").text if held_out is None else held_out
        self._batch, self._device = batch, device
        self._windows = stdlib.windows(held_out, windows, context, _HELD_OUT_SEED)
        count = min(_CALIBRATION_WINDOWS, (len(train) - 1) // context)
        self._calibration = stdlib.windows(train, count, context, _CALIBRATION_SEED)
        self._calibration_windows = calibration_windows

    @torch.no_grad()
    def _log_probabilities(self, windows: Tensor) -> Tensor:
        return self.model(windows[:, :-1].to(self._device)).float().log_softmax(dim=-1)  # type: ignore[no-any-return]

    def calibrate(self, number: int, restart: Restart) -> Tensor:
        """Log-probabilities ``[calibration_windows, N, 256]`` of training text."""
        restart()
        first = number * self._calibration_windows
        chosen = torch.arange(first, first + self._calibration_windows, dtype=torch.int64, device="cpu")
        chosen %= len(self._calibration)
        return self._log_probabilities(self._calibration[chosen])

    def distance(self, exact: Tensor, other: Tensor) -> float:
        """Mean KL divergence in bits a byte."""
        return float(_kl(exact, other).mean())

    def outputs(self, restart: Restart) -> Tensor:
        """Log-probabilities ``[W, N, 256]``."""
        found = []
        for part in torch.split(self._windows, self._batch):
            restart()
            found.append(self._log_probabilities(part))
        return torch.cat(found)

    def judge(self, exact: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Per window."""
        target = self._windows[:, 1:].to(other.device)
        bits = -other.gather(2, target[..., None])[..., 0].double() / _LN2
        hits = (other.argmax(dim=-1) == target).double()
        kl = torch.stack([_kl(a, b).mean() for a, b in zip(exact, other, strict=True)])
        return {"bits": bits.mean(dim=1), "accuracy": hits.mean(dim=1), "kl": 1000 * kl}


_LN2 = float(torch.log(torch.tensor(2.0, dtype=torch.float64, device="cpu")))


def _kl(exact: Tensor, other: Tensor) -> Tensor:
    """KL divergence in bits of each prediction ``[..., 256]``."""
    if exact.shape != other.shape or exact.shape[-1] != BYTES:
        raise ValueError(
            f"log-probabilities [..., {BYTES}] expected, got {tuple(exact.shape)} and {tuple(other.shape)}"
        )
    a, b = exact.double(), other.double()
    return (a.exp() * (a - b)).sum(dim=-1).clamp(min=0) / _LN2
