"""The diffusion transformer as a subject: pictures from the same noise, against those of exact attention."""

from __future__ import annotations

import torch
from torch import Tensor

from . import weights
from .base import EndMetric, Restart, Subject
from .diffusion import DiffusionConfig, DiffusionTransformer, noise_of, sample
from .quality import psnr, ssim

STEPS = 25
_CALIBRATION_SEED = 1_000_000  # far from the seeds that are judged


class DiffusionSubject(Subject):
    """Pictures, each from its own seed, are what is independent; ``psnr`` is the end metric.

    Args:
        model: a trained model; ``None`` loads the one in the package.
        pictures: how many are judged, the classes in turn; batch: how many run at once.
        calibration_pictures: in one run of `calibrate`.

    Raises:
        InvalidArgumentError: no weights.
    """

    name = "dit"
    title = "diffusion transformer of pictures, 8 layers, 1024 tokens, 25 steps"
    timesteps = "forwards"
    metrics = (
        EndMetric("psnr", "PSNR in dB against exact attention's picture from the same noise", True, 2),
        EndMetric("ssim", "SSIM against it", True, 4),
    )

    def __init__(
        self,
        model: DiffusionTransformer | None = None,
        *,
        pictures: int = 8,
        batch: int = 8,
        calibration_pictures: int = 2,
        steps: int = STEPS,
        device: str | torch.device = "cpu",
    ) -> None:
        path = weights.FOLDER / "dit.safetensors"
        loaded = weights.load(path, DiffusionTransformer, DiffusionConfig) if model is None else model
        self.model: DiffusionTransformer = loaded.eval().to(device)
        self._pictures, self._batch, self._device, self._steps = pictures, batch, device, steps
        self._calibration_pictures = calibration_pictures

    def _sample(self, seeds: list[int], restart: Restart) -> Tensor:
        restart()
        config = self.model.config
        label = torch.tensor([seed % config.classes for seed in seeds], dtype=torch.int64, device=self._device)
        return sample(self.model, noise_of(seeds, config).to(self._device), label, self._steps)

    def calibrate(self, number: int, restart: Restart) -> Tensor:
        """Pictures ``[calibration_pictures, 3, S, S]``."""
        first = _CALIBRATION_SEED + number * self._calibration_pictures
        return self._sample(list(range(first, first + self._calibration_pictures)), restart)

    def distance(self, exact: Tensor, other: Tensor) -> float:
        """Mean squared difference of the pixels."""
        return float((exact.double() - other.double()).square().mean())

    def outputs(self, restart: Restart) -> Tensor:
        """Pictures ``[P, 3, S, S]``."""
        seeds = list(range(self._pictures))
        parts = [seeds[first : first + self._batch] for first in range(0, len(seeds), self._batch)]
        return torch.cat([self._sample(part, restart) for part in parts])

    def judge(self, exact: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Per picture."""
        return {"psnr": psnr(exact, other), "ssim": ssim(exact, other)}
