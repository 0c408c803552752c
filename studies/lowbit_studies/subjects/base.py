"""What a subject is: a model, inputs to calibrate on, other inputs to judge by, and how results are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

Restart = Callable[[], None]
"""Called before each run: pass an observer's or an applied policy's ``restart``, so that timesteps begin anew."""


@dataclass(frozen=True)
class EndMetric:
    """A figure of the finished result. ``digits`` of it are worth showing."""

    name: str
    meaning: str
    higher_is_better: bool
    digits: int


class Subject(ABC):
    """A model whose attention is quantised and whose end result is judged.

    Attributes:
        model: in eval mode; its attention calls torch's ``scaled_dot_product_attention``.
        timesteps: what `lowbit_attention.adaptive.observe` and `Policy.applied` take for this model.
        metrics: what `judge` answers; the first decides.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    timesteps: ClassVar[str | None] = None
    metrics: ClassVar[tuple[EndMetric, ...]]
    model: nn.Module

    @abstractmethod
    def calibrate(self, number: int, restart: Restart) -> Tensor:
        """One run on calibration inputs (those of ``number``, never the ones that are judged), and its result."""

    @abstractmethod
    def distance(self, exact: Tensor, other: Tensor) -> float:
        """How far a result of `calibrate` is from the exact one: 0 or more, smooth, so that small effects show."""

    @abstractmethod
    def outputs(self, restart: Restart) -> Tensor:
        """The result on the inputs that are judged."""

    @abstractmethod
    def judge(self, exact: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Each of `metrics`, float64, a number for every independent input (window, picture, text)."""
