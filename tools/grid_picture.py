"""docs/images/grid.png: a mean taken off a bfloat16 V leaves an offset that does not cancel (docs/numerics.md §3).

`make tables` draws it. V is normal with mean 0; its codes, scales and means are the reference's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowbit_attention.output import plots
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.recipes.named import recipe
from lowbit_attention.reference.quantize import Means, pack

_ONE_MEAN = recipe("fast_8b:v_tile_means=false,smooth_v=true")
_NO_MEAN = recipe("fast_8b:v_tile_means=false")
_CHANNELS = 32
_TOKENS = 1 << 17
_STEP = 2.0**-7
"""Between bfloat16 numbers from 1 to 2."""


def _values(tokens: int, dtype: torch.dtype) -> Tensor:
    """V ``[1, 1, tokens, channels]``, float32 numbers of ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, tokens, _CHANNELS, generator=generator).to(dtype).float()


def _offset(v: Tensor, mean: Tensor | None, smooth: bool) -> Tensor:
    """What rounding V adds to each channel's mean over the tokens (an even row of P's output), ``[channels]``."""
    packed = pack(v[..., :1], v[..., :1], v, _ONE_MEAN if smooth else _NO_MEAN, MACHINES["sm_90a"].geometry, None,
                  Means(v=mean))  # fmt: skip
    rounded = packed.v.double() * packed.v_scale.double()
    if packed.v_mean is not None:
        rounded = rounded + packed.v_mean.double()[:, :, None]
    return (rounded - v.double()).mean(dim=2).flatten()


def draw(path: Path) -> None:
    """Draw both panels: the offset against the mean that is taken off, and against the number of tokens."""
    fig, (left, right) = plots.figure(11, 4.2, ncols=2)
    shifts = [n / 8 for n in range(13)]
    for dtype, label in ((torch.bfloat16, "bfloat16 V"), (torch.float32, "float32 V")):
        v = _values(_TOKENS, dtype)
        offsets = [_offset(v, torch.full((1, 1, _CHANNELS), s * _STEP), True).abs().mean() for s in shifts]
        left.plot(shifts, torch.stack(offsets), ".-", label=label)
    left.set(
        xlabel="what is taken off, in steps of bfloat16 from 1 to 2", ylabel="offset, mean magnitude over channels"
    )
    left.set(title=f"an even row of P over {_TOKENS} tokens", ylim=(0, None))

    lengths = [1 << n for n in range(8, 18)]
    lines: dict[str, list[float]] = {}
    for tokens in lengths:
        coarse, fine = _values(tokens, torch.bfloat16), _values(tokens, torch.float32)
        for label, size in (
            ("the output itself", coarse.mean(dim=2)),
            ("offset: bfloat16 V, one mean off", _offset(coarse, None, True)),
            ("offset: bfloat16 V, no mean off", _offset(coarse, None, False)),
            ("offset: float32 V, one mean off", _offset(fine, None, True)),
        ):
            lines.setdefault(label, []).append(float(size.abs().mean()))
    for label, sizes in lines.items():
        right.plot(lengths, sizes, ".-", label=label)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="mean magnitude over channels")
    right.set(title="an even row of P")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    plots.save(path, fig)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parents[1] / "docs/images/grid.png")
