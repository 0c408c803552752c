"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_attention import InvalidArgumentError

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(exact: Tensor, other: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture ``[B, C, H, W]``, float64 ``[B]``; ∞ for equal pictures.

    Args:
        span: the largest difference two pixels can have (2 for pictures in −1…1).

    >>> round(float(psnr(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.2))), 3)
    20.0
    """
    _check(exact, other)
    error = (exact.double() - other.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(span**2 / error)


def ssim(exact: Tensor, other: Tensor, span: float = 2.0) -> Tensor:
    """Structural similarity of each picture ``[B, C, H, W]``, float64 ``[B]``; 1 for equal pictures.

    Wang et al. 2004: Gaussian window of 11 × 11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, mean over the places where
    the window fits and over the channels.

    Raises:
        InvalidArgumentError: if the shapes differ or a picture is smaller than the window.
    """
    _check(exact, other)
    if min(exact.shape[2:]) < _WINDOW:
        raise InvalidArgumentError(f"SSIM's window is {_WINDOW} × {_WINDOW}, the pictures are {tuple(exact.shape)}")
    a, b = (t.double().flatten(0, 1).unsqueeze(1) for t in (exact, other))
    offset = torch.arange(_WINDOW, device=a.device, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-offset.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean(dim=(1, 2, 3)).view(exact.shape[:2]).mean(dim=1)


def _check(exact: Tensor, other: Tensor) -> None:
    if exact.shape != other.shape or exact.dim() != 4:
        raise InvalidArgumentError(f"pictures [B, C, H, W] expected, got {tuple(exact.shape)} and {tuple(other.shape)}")
