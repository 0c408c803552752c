"""What of a model's attention is reached: counted by others, and by the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from tiny import Tiny
from torch import Tensor, nn

from lowbit_attention.integrations.call_report import CallReport


@dataclass
class Counted:
    """Calls of torch's function, and how many of them diffusers dispatched."""

    calls: int = 0
    dispatched: int = 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what a model asks of torch, without any of our code."""
    counted = Counted()
    torchs, native = F.scaled_dot_product_attention, Registry._backends[AttentionBackendName.NATIVE]

    def call(*args: object, **kwargs: object) -> object:
        counted.calls += 1
        return torchs(*args, **kwargs)

    def dispatched(*args: object, **kwargs: object) -> object:
        counted.dispatched += 1
        return native(*args, **kwargs)

    F.scaled_dot_product_attention = call
    Registry._backends[AttentionBackendName.NATIVE] = dispatched
    try:
        yield counted
    finally:
        F.scaled_dot_product_attention = torchs
        Registry._backends[AttentionBackendName.NATIVE] = native


@dataclass
class Reached:
    """One class of models: calls as others counted them, and by our report, and how far the outputs are apart."""

    case: Tiny
    counted: Counted
    arrived: int
    ran: int
    error: float
    refused: str = ""


def relative(a: Tensor, b: Tensor) -> float:
    """L1 of the difference, by that of ``b``."""
    return float((a - b).abs().sum() / b.abs().sum())


def reached(case: Tiny, report: CallReport, backend: str) -> Reached:
    """Run a class natively and on a backend."""
    model = case.build()
    with counting() as counted:
        exact = case.run(model)
    report.clear()
    try:
        near = on(model, case, backend)
    except ValueError as error:
        return Reached(case, counted, report.calls, report.ran, 0.0, str(error))
    return Reached(case, counted, report.calls, report.ran, relative(near, exact))


def on(model: nn.Module, case: Tiny, backend: str) -> Tensor:
    """The output with this backend; afterwards the model, and the process, is on torch's."""
    model.set_attention_backend(backend)
    try:
        return case.run(model)
    finally:
        model.set_attention_backend("native")
