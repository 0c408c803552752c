"""Runs single FP8 MMAs, and chains of them, on a Hopper GPU.

``python tests/gpu/accumulator_probe.py FILE.npz`` records what the card gives, for the CPU test test_h200.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from cuda.core import Device, LaunchConfig, ObjectCode, launch

from lowbit_attention.backends.cuda.jit.cache import KernelCache
from lowbit_attention.backends.cuda.jit.compiled import Options
from lowbit_attention.backends.cuda.jit.source import read_source

KERNELS = ("wgmma_f16", "wgmma_f32", "mma_f16", "mma_f32")
FAMILIES = ("uniform", "mid", "big_mantissa", "subnormal", "sparse", "positive", "few")
ROWS, COLUMNS, DEPTH = 64, 8, 32


def operands(generator, family, shape):
    """E4M3 codes: any (uniform), middle exponents, mantissas 1.75 and 1.875, many subnormals, mostly zeros, …"""

    def codes(exponents, mantissas=tuple(range(8)), signs=(0, 1)):
        return (
            generator.choice(signs, shape) << 7
            | generator.integers(*exponents, shape) << 3
            | generator.choice(mantissas, shape)
        ).astype(np.uint8)

    def mostly_zero(x, share):
        return np.where(generator.random(shape) < share, 0, x).astype(np.uint8)

    every = np.arange(256)
    return {
        "uniform": lambda: generator.choice(every[every & 0x7F != 0x7F], shape).astype(np.uint8),  # 0x7F is NaN
        "mid": lambda: codes((3, 12)),
        "big_mantissa": lambda: codes((2, 13), mantissas=(6, 7)),
        "subnormal": lambda: codes((0, 3)),
        "sparse": lambda: mostly_zero(codes((3, 12)), 0.8),
        "positive": lambda: codes((0, 12), signs=(0,)),
        "few": lambda: mostly_zero(codes((6, 9)), 0.9),
    }[family]()


def problems(generator, kernel, family, steps, count):
    """Operands A, B (E4M3 codes) and an accumulator C to begin with, for ``count`` blocks."""
    a, b = (operands(generator, family, (count, n, DEPTH * steps)) for n in (ROWS, COLUMNS))
    shape = (count, ROWS, COLUMNS)
    c = generator.standard_normal(shape) * 2.0 ** generator.integers(-6, 7, shape)
    c[generator.random(shape) < 0.25] = 0
    return a, b, c.astype(np.float16 if kernel.endswith("f16") else np.float32)


class Probe:
    """The compiled probe on the current device."""

    def __init__(self):
        self._device = Device()
        self._device.set_current()
        here = Path(__file__)
        source = read_source(here.parent, here.with_suffix(".cu").name)
        code = ObjectCode.from_cubin(KernelCache().get(source, Options.of("sm_90a")).cubin)
        self._kernels = {name: code.get_kernel(name) for name in KERNELS}

    def run(self, kernel, a, b, c):
        """D ``[blocks, 64, 8]`` float32."""
        tensors = [torch.from_numpy(x).cuda() for x in (a, b, c.astype(np.float32))]
        d = torch.full_like(tensors[2], torch.nan)
        torch.cuda.synchronize()
        stream = self._device.create_stream()
        config = LaunchConfig(grid=len(a), block=128)
        pointers = [t.data_ptr() for t in (*tensors, d)]
        launch(stream, config, self._kernels[kernel], *pointers, np.int32(a.shape[2] // DEPTH))
        stream.sync()
        return d.cpu().numpy()


def record(path):
    """One block of every kernel and family: single instructions and chains of 2 and 8."""
    probe, generator, arrays = Probe(), np.random.default_rng(0), {}
    for kernel in KERNELS:
        for family in FAMILIES:
            for steps in (1, 2, 8) if family in ("mid", "positive") else (1, 2):
                a, b, c = problems(generator, kernel, family, steps, 1)
                d = probe.run(kernel, a, b, c).astype(c.dtype)
                arrays |= {f"{kernel}/{family}/{steps}/{name}": x for name, x in zip("abcd", (a, b, c, d), strict=True)}
    arrays["card"] = np.array(torch.cuda.get_device_name())
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    record(sys.argv[1])
