"""What the tests of the benchmark share: stand-ins and a run. A helper, not a test."""

import torch

from lowbit_attention.bench import run
from lowbit_attention.bench.base import Provider
from lowbit_attention.bench.run import Settings
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.bench.timing import Limits

CPU = torch.device("cpu")
TINY = parse_shape("1x2x64x32")
QUICK = Limits(seconds=60.0, max_rounds=5)


def inputs(shape):
    return run.make_inputs(shape, CPU, torch.bfloat16, 0)


class Fake(Provider):
    """A provider whose calls are given."""

    def __init__(self, name, parts, reason=None):
        self.name, self.parts, self.reason = name, parts, reason

    def version(self):
        return "1"

    def not_available_reason(self):
        return self.reason

    def prepare(self, shape, q, k, v, mask=None):
        if isinstance(self.parts, Exception):
            raise self.parts
        return self.parts


def measured(found, shapes=(TINY,), **options):
    return list(run.run(shapes, found, Settings(CPU, limits=QUICK, **options)))


def rows():
    (result,) = measured([Fake("torch_cudnn", {"whole": lambda: None}), Fake("b", {"kernel": lambda: None})])
    return result.rows
