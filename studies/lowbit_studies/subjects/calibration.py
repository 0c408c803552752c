"""The trained subjects as `lowbit calibrate` takes them: ``--subject lm`` and ``--subject dit``."""

from __future__ import annotations

from functools import partial

from lowbit_attention.adaptive import Subject as Calibrated

from . import load_subject
from .base import Subject

RUNS = 2


def lm(runs: int = RUNS) -> Calibrated:
    """The language model on windows of 2048 bytes of training text.

    Raises:
        InvalidArgumentError: no weights.
    """
    return calibrated(load_subject("lm"), runs)


def dit(runs: int = RUNS) -> Calibrated:
    """The diffusion transformer on two pictures a run.

    Raises:
        InvalidArgumentError: no weights.
    """
    return calibrated(load_subject("dit"), runs)


def calibrated(subject: Subject, runs: int) -> Calibrated:
    """A subject's calibration inputs as prompts; whoever runs them restarts the timesteps before each."""
    run = partial(subject.calibrate, restart=lambda: None)
    return Calibrated(subject.title, subject.model, range(runs), run, subject.timesteps)
