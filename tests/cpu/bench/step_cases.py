"""What the tests of whole steps share: a model of one attention call, and a timer with a clock of its own."""

import weakref
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.nn.functional as F
from bench_cases import CPU
from torch import nn

from lowbit_attention.bench import steps
from lowbit_attention.bench.step_models import StepInputs, StepModel
from lowbit_attention.bench.steps import StepSettings, run_steps
from lowbit_attention.bench.timing import CpuTimer, Limits

ROUNDS = Limits(seconds=1e9, max_rounds=3)


class Attends(nn.Module):
    """Attention over what it is given, after ``wrong`` has seen it, which may raise."""

    config = SimpleNamespace()

    def __init__(self, wrong=None):
        super().__init__()
        self.wrong = wrong

    def forward(self, x, mask=None, return_dict=True):
        assert not return_dict
        if self.wrong is not None:
            self.wrong(x)
        return (F.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, :, :8],)  # the image, without the text


class Stub(StepModel):
    """A model whose package is there and whose module is `Attends`."""

    alive: ClassVar = weakref.WeakSet()

    def not_available_reason(self):
        return None

    def version(self):
        return "stub 1"

    def build(self, device, tiny=False):
        assert not self.alive, "the model before is still there"
        module = Attends(self.config.get("wrong"))
        self.alive.add(module)
        x = torch.randn(1, 2, 32, 16, generator=torch.Generator().manual_seed(0))
        inputs = StepInputs({"x": x})
        if used := self.sizes.get("used"):
            inputs = StepInputs({"x": x, "mask": torch.arange(32)[None] < used}, {"x": x[:, :, :used]})
        if real := self.sizes.get("real"):
            inputs = StepInputs({"x": x}, rows=torch.arange(8) < real)
        return module, inputs


def raises(kind, text=""):
    """A new error each time: one that is kept would keep the model, by its traceback."""

    def wrong(x):
        raise kind(text)

    return wrong


def stub(name="stub", wrong=None, gib=1, **sizes):
    return Stub(name, name.title(), "stub", "Attends", gib, None, sizes, {}, {"wrong": wrong})


class Told(CpuTimer):
    """Calls are made, and take as many microseconds as it is told, call by call."""

    def __init__(self, *microseconds):
        self.microseconds, self.ran = list(microseconds), 0

    def run(self, call, lead_us=0.0, meanwhile=None):
        super().run(call, lead_us, meanwhile)
        self.ran += 1
        return self.microseconds[(self.ran - 1) % len(self.microseconds)]


def measured(monkeypatch, *models, timer=None, **options):
    monkeypatch.setattr(steps, "make_timer", lambda device: timer or Told(1000.0))
    if len(models) == 1:  # (the garbage collector takes a third of a second where everything is imported)
        monkeypatch.setattr(steps, "free_memory", lambda device: None)
    return list(run_steps(models, StepSettings(CPU, limits=ROUNDS, **{"commit": "abc", **options})))
