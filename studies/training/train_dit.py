"""Train the diffusion transformer: `python train_dit.py --out dit.safetensors --minutes 4`.

Crops of 64 × 64 from the photographs inside scikit-learn's and scikit-image's wheels (prepare.py), one class a
photograph; rectified flow with times from a logit-normal distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import Options, parse, sizes, train
from torch import Tensor, nn

from lowbit_studies.png import grid, write_png
from lowbit_studies.subjects.diffusion import DiffusionConfig, DiffusionTransformer, flow_loss, noise_of, sample

SAMPLES_A_CLASS = 4


def main(options: Options | None = None) -> None:
    options = options or parse(__doc__ or "", Path(__file__).parent / "data/images.npz", batch=64, learning_rate=8e-4)
    device = options.device
    with np.load(options.data) as data:
        pixels = torch.from_numpy(data["pixels"]).to(device)
        height, width, label = (torch.from_numpy(data[name]).to(device) for name in ("height", "width", "label"))
        names = [str(name) for name in data["names"]]
    config: DiffusionConfig = sizes(DiffusionConfig, {"classes": len(names), **options.overrides})
    along = torch.arange(config.size, device=device)

    def crops(numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures ``[B, 3, S, S]`` in −1…1 and their classes."""
        which = torch.randint(len(pixels), (options.batch,), generator=numbers, device=device)
        room = torch.rand(2, options.batch, generator=numbers, device=device)
        top = (room[0] * (height[which] - config.size + 1)).long()
        left = (room[1] * (width[which] - config.size + 1)).long()
        found = pixels[which[:, None, None], (top[:, None] + along)[:, :, None], (left[:, None] + along)[:, None]]
        return found.permute(0, 3, 1, 2).float() / 127.5 - 1, label[which]

    def loss_at(model: nn.Module, progress: float, numbers: torch.Generator) -> Tensor:
        pictures, classes = crops(numbers)
        t = torch.randn(options.batch, generator=numbers, device=device).sigmoid()
        noise = torch.randn(pictures.shape, generator=numbers, device=device)
        return flow_loss(model, pictures, t, noise, classes)

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, Any]:
        numbers = torch.Generator(device).manual_seed(options.seed + 1)
        losses = [float(loss_at(model, 1.0, numbers)) for _ in range(16)]
        classes = torch.arange(len(names), device=device).repeat(SAMPLES_A_CLASS)
        pictures = sample(model, noise_of(list(range(len(classes))), config).to(device), classes)
        path = options.out.with_suffix(".png")
        write_png(path, grid(list(torch.split(pictures, len(names))), zoom=2))
        return {"loss": sum(losses) / len(losses), "pictures": path.name}

    torch.manual_seed(options.seed)
    model = DiffusionTransformer(config)
    notes = {
        "data": "photographs in scikit-image (astronaut, chelsea, coffee, hubble_deep_field, retina, rocket) and "
        "scikit-learn (china by danielbuechele, flower by vultilion, both CC BY 2.0)",
        "classes": ",".join(names),
        "seed": str(options.seed),
    }
    train(model, loss_at, options, ema_decay=0.999, validate=validate, notes=notes)


if __name__ == "__main__":
    main()
