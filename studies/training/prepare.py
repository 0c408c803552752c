"""Prepare the training data, once, on a machine that has it: `python prepare.py`.

Writes `corpus.npz` (the sources of this Python's standard library, split by file) and `images.npz` (the natural
pictures inside scikit-learn's and scikit-image's wheels, nothing is downloaded) to data, which git ignores.
`pip install scikit-image scikit-learn` brings the pictures and Pillow. docs/subjects.md has the licences.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import platform
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_attention import InvalidArgumentError
from lowbit_studies.subjects import stdlib

FOLDER = Path(__file__).parent / "data"
PICTURES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
"""Class → package and path: the colour photographs under a free licence."""
SHORT_SIDES = (72, 88, 108, 132)
"""Each picture at four scales, so that a crop of 64 × 64 needs no resampling and shows half to nearly all of it."""


def corpus(path: Path) -> None:
    """Both splits' bytes and file names."""
    arrays: dict[str, Any] = {}
    for split in ("train", "held_out"):
        found = stdlib.load(split)
        text = found.text.numpy()
        arrays[split], arrays[f"{split}_names"] = text, np.array(found.names)
        digest = hashlib.sha256(text.tobytes()).hexdigest()[:16]
        print(f"{split}: {len(found.names)} files, {len(text)} bytes, sha256 {digest}")
    np.savez_compressed(path, python=np.array(platform.python_version()), **arrays)


def images(path: Path) -> None:
    """An atlas: ``pixels`` uint8 ``[n, H, W, 3]`` padded with zeros, ``height``, ``width`` and ``label`` ``[n]``."""
    from PIL import Image

    found, labels = [], []
    for label, (package, place) in enumerate(PICTURES.values()):
        picture = Image.open(package_folder(package) / place).convert("RGB")
        for short in SHORT_SIDES:
            factor = short / min(picture.size)
            size = (round(picture.width * factor), round(picture.height * factor))
            found.append(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)))
            labels.append(label)
    height, width = (np.array([picture.shape[axis] for picture in found]) for axis in (0, 1))
    pixels = np.zeros((len(found), height.max(), width.max(), 3), dtype=np.uint8)
    for number, picture in enumerate(found):
        pixels[number, : picture.shape[0], : picture.shape[1]] = picture
    np.savez_compressed(
        path, pixels=pixels, height=height, width=width, label=np.array(labels), names=np.array(list(PICTURES))
    )
    print(f"{len(PICTURES)} pictures at {len(SHORT_SIDES)} scales: {pixels.shape}")


def package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InvalidArgumentError(f"no package {name}: pip install scikit-image scikit-learn")
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: %(default)s)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("corpus", corpus), ("images", images)):
        path = folder / f"{name}.npz"
        make(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
