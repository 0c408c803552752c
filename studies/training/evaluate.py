"""The table: every subject by every recipe, adaptive policies, and random policies of the same shares.

    python studies/training/evaluate.py --out out/subjects                   # all, small, on a CPU
    python studies/training/evaluate.py --out out/subjects --device cuda --full   # as in docs/subjects.md, on an H100

Subjects: `lm:2048` and `lm:8192` (the language model at a context), `dit`, `minilm`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import Settings, Study, run
from tables import markdown, rows
from torch import Tensor

from lowbit_attention import LowbitError
from lowbit_attention.output.files import write_csv, write_json
from lowbit_studies.png import grid, write_png
from lowbit_studies.subjects import load_subject, weights
from lowbit_studies.subjects.base import Subject
from lowbit_studies.subjects.diffusion import DiffusionConfig, DiffusionTransformer
from lowbit_studies.subjects.language import LanguageConfig, LanguageModel

SUBJECTS = ("lm:2048", "lm:8192", "dit", "minilm")
FULL_TEXT, FULL_PICTURES = 64 * 2048, 24
"""Judged with --full: bytes of held-out text, and pictures."""
SHOWN_PICTURES = 8
_AMPLIFIED = 8.0


def make_subject(name: str, options: argparse.Namespace) -> Subject:
    """A subject in the size that is asked for: what is judged, what runs at once."""
    kind, _, context = name.partition(":")
    device, full = options.device, options.full
    if kind == "lm":
        text = {}
        if options.data is not None:
            with np.load(options.data) as data:
                text = {split: torch.from_numpy(data[split]) for split in ("train", "held_out")}
        length = int(context or 2048)
        windows = max(2, (options.text or (FULL_TEXT if full else 0)) // length)
        # 32 windows of 2048 bytes or 8 of 8192 at once: few launches, and they fit the emulation's memory
        batch = max(1, 32 * 2048 // length) if full else 1
        return load_subject(
            "lm", model=_model(options, "lm"), context=length, windows=windows, batch=batch,
            calibration_windows=max(1, 8 * 2048 // length) if full else 1, device=device, **text,
        )  # fmt: skip
    if kind == "dit":
        pictures, calibration = options.pictures or (FULL_PICTURES if full else 4), 8 if full else 1
        return load_subject(
            "dit", model=_model(options, "dit"), pictures=pictures, batch=min(pictures, 64),
            calibration_pictures=calibration, steps=options.steps, device=device,
        )  # fmt: skip
    return load_subject(kind, texts=150 if full else 40, device=device)


def _model(options: argparse.Namespace, kind: str) -> Any:
    """A model from ``--weights`` instead of the package's."""
    if options.weights is None:
        return None
    path = options.weights / f"{kind}.safetensors"
    if kind == "lm":
        return weights.load(path, LanguageModel, LanguageConfig)
    return weights.load(path, DiffusionTransformer, DiffusionConfig)


def pictures(study: Study, folder: Path) -> None:
    """Pictures of the first seeds by the rows that matter, and eight times their difference from exact's.

    ``pictures.npz`` keeps them for `studies/training/draw.py`, which writes the rows' names beside them.
    """
    exact = study.kept["exact"]
    lines = [exact]
    for name, shown in study.kept.items():
        if name != "exact":
            lines += [shown, ((shown - exact) * _AMPLIFIED).clamp(-1, 1)]
    write_png(folder / "pictures.png", grid(lines))
    names = list(study.kept)
    stacked = torch.stack([study.kept[name] for name in names])
    np.savez_compressed(
        folder / "pictures.npz", names=np.array(names), pictures=((stacked + 1) * 127.5).round().byte().numpy()
    )


def main(arguments: list[str] | None = None, tell: Callable[[str], None] = print) -> list[Study]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, policies and pictures")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), help="(default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="as many inputs as in the docs: for a GPU")
    parser.add_argument("--text", type=int, help="bytes of held-out text that are judged")
    parser.add_argument("--pictures", type=int, help="pictures that are judged")
    parser.add_argument("--data", type=Path, help="corpus.npz instead of this Python's standard library")
    parser.add_argument("--weights", type=Path, help="folder with lm.safetensors and dit.safetensors")
    parser.add_argument("--random", type=int, default=10, help="random policies for each adaptive one")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.8], help="least shares of calls at 4 bits")
    parser.add_argument("--runs", type=int, default=2, help="calibration runs")
    parser.add_argument("--steps", type=int, default=25, help="the sampler's steps")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")  # the model itself in true float32: what differs is attention
    settings = Settings(shares=tuple(options.shares), random=options.random, runs=options.runs)
    studies, lines, texts = [], [], []
    for title in options.subjects:
        subject = make_subject(title, options)
        folder = options.out / title.replace(":", "_")
        folder.mkdir(parents=True, exist_ok=True)
        keep: Callable[[Tensor], Tensor] | None = (lambda out: out[:SHOWN_PICTURES]) if title == "dit" else None
        study = run(subject, settings, folder, lambda text: tell(text), keep)
        if title == "dit":
            pictures(study, folder)
        studies.append(study)
        lines += rows(study, title)
        texts.append(markdown(study, f"{title}: {subject.title}"))
        tell("\n" + texts[-1])
        write_csv(options.out / "results.csv", lines)  # (after each subject: something is left if time runs out)
        (options.out / "results.md").write_text("\n".join(texts), encoding="utf-8")
        write_json(folder / "about.json", about(study, options))
    return studies


def about(study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """How the numbers came about."""
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": gpu,
        "seconds": study.took,
        "choices": {name: str(choice).splitlines() for name, choice in study.choices.items()},
    }


if __name__ == "__main__":
    try:
        main(tell=lambda text: print(text, flush=True))
    except LowbitError as error:
        raise SystemExit(f"evaluate: {error}") from None
