"""Many random calls like those of real models, timed quickly: what a cost model is fitted to, and judged by."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .base import Call, Provider, first_line
from .masks import make_mask
from .results import collect_facts
from .run import DTYPES, Note, Settings, free_memory, make_inputs, on_device
from .sensors import open_sensors
from .shapes import Shape, parse_shape
from .timing import Limits, interleave, make_timer, percentile

_HEADS = (8, 12, 16, 20, 24, 24, 30, 32, 32, 38, 40, 64)
_GROUPS = (1, 1, 1, 1, 1, 4, 4, 8)
_BATCHES = (1, 1, 1, 1, 2, 2, 4, 8, 16)
_CROSS_KEYS = (77, 154, 226, 256, 333, 512)
"""Text tokens that image and video models attend to."""
_MASKS = ("padding", "bits", "bias")
MOST_FLOPS, LEAST_FLOPS, MOST_BYTES = 6e12, 2e8, 3e9
"""Of a call: some 10 ms and some microseconds of an H200; and what its tensors take."""


def random_shapes(
    count: int, seed: int, masked: float = 0.2, most_flops: float = MOST_FLOPS, least_flops: float = LEAST_FLOPS
) -> list[Shape]:
    """So many different shapes, the same for a seed; ``masked``: the share of those with a mask.

    64 to 131,072 tokens, equally often in every octave; half of the lengths are no multiple of 64.

    >>> [shape.label for shape in random_shapes(2, 0)] == [shape.label for shape in random_shapes(2, 0)]
    True
    """
    r = random.Random(seed)
    found: dict[str, Shape] = {}
    while len(found) < count:
        batch, heads, head_dim = r.choice(_BATCHES), r.choice(_HEADS), r.choice((64, 128, 128))
        group = r.choice(_GROUPS)
        if heads % group:
            continue
        q_len = _length(r)
        causal = r.random() < 0.35
        kv_len = q_len if causal or r.random() < 0.8 else r.choice(_CROSS_KEYS)
        mask = r.choice(_MASKS) if not causal and r.random() < masked else None
        shape = Shape("", batch, heads, heads // group, q_len, kv_len, head_dim, causal, mask)
        size = 2 * batch * head_dim * 2 * (heads * q_len + heads // group * kv_len) + 2 * shape.mask_bytes
        if least_flops <= shape.flops <= most_flops and size <= MOST_BYTES:
            found.setdefault(shape.label, parse_shape(shape.label))
    return list(found.values())


def _length(r: random.Random) -> int:
    n = round(2 ** r.uniform(math.log2(64), math.log2(131072)))
    return n if r.random() < 0.5 else max(64, round(n / 128) * 128)


@dataclass(frozen=True)
class SampleRow:
    """A whole call's median: a line of a file of samples."""

    gpu: str
    driver: str
    torch: str
    commit: str
    dtype: str
    shape: str
    provider: str
    us: float


@dataclass(frozen=True)
class TimedCall:
    """One shape: the rows of the providers that could run it, and why others could not."""

    shape: Shape
    rows: list[SampleRow]
    notes: list[Note]


def sample(
    shapes: Iterable[Shape], providers: Sequence[Provider], settings: Settings, rounds: int = 5
) -> Iterator[TimedCall]:
    """The median of a few rounds of whole calls, in turns, with a cold L2. No shape is begun after ``max_seconds``."""
    device, dtype, begun = settings.device, DTYPES[settings.dtype], time.perf_counter()
    with on_device(device), torch.no_grad():
        sensors = open_sensors(device)
        facts = collect_facts(device, sensors.driver, settings.commit)
        about = (facts.gpu, facts.driver, facts.torch, facts.commit, settings.dtype)
        timer = make_timer(device)
        for shape in shapes:
            if settings.max_seconds is not None and time.perf_counter() - begun > settings.max_seconds:
                return
            notes: dict[str, str] = {}
            calls: dict[str, Call] = {}
            q, k, v = make_inputs(shape, device, dtype, settings.seed)
            mask = make_mask(shape, device, dtype, settings.seed)
            for provider in providers:
                try:
                    call = provider.prepare(shape, q, k, v, mask)["whole"]
                    call()
                    timer.settle()
                except torch.cuda.OutOfMemoryError:
                    notes[provider.name] = "out of memory"
                    free_memory(device)
                except Exception as error:  # (as in a run: the others are timed all the same)
                    notes[provider.name] = first_line(error)
                else:
                    calls[provider.name] = call
            limits = Limits(seconds=0.0, max_rounds=rounds, min_rounds=rounds, fewest_rounds=rounds)
            # (a mask's host side takes longer than the device sleeps before a call)
            lead = {
                name: 2 * (timer.host_us(call, 3) or 0.0) if mask is not None else 0.0 for name, call in calls.items()
            }
            times, failed = interleave(list(calls), lambda name, _: timer.run(calls[name], lead[name]), limits)  # noqa: B023
            rows = [SampleRow(*about, shape.label, name, round(percentile(t, 50), 2)) for name, t in times.items() if t]
            yield TimedCall(shape, rows, [Note(name, shape.label, why) for name, why in (notes | failed).items()])
