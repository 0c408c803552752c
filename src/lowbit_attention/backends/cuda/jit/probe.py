"""Whether the run-time compiler works here, found out by compiling four lines in a process of their own.

Of its own, since a damaged library may end the process that loads it. The program is `main`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass

from ....errors import KernelUnavailableError
from .bindings import CompilerMissingError
from .compiled import Options
from .compiler import compile_source, nvrtc_version
from .fresh import run_fresh
from .source import Source

_FOUR_LINES = """extern "C" __global__ void add(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += 1.0f;
}
"""
_ARCH = "sm_80"  # every NVRTC that can compile the kernels compiles for it
_SECONDS = 120.0
"""Longer than importing the packages and compiling takes on any disk; a library that hangs is told then."""
_WORKS, _MISSING, _BROKEN = "works", "missing", "broken"


@dataclass(frozen=True)
class Trial:
    """What came of compiling: ``text`` says how it was done, or why not and the way out.

    ``missing``: the compiler is not installed, or not all of it.
    """

    works: bool
    missing: bool
    text: str


def try_compiler() -> Trial:
    """Load NVRTC and compile four lines, in a process that sees the same packages and the current folder."""
    try:
        done = run_fresh("from lowbit_attention.backends.cuda.jit.probe import main; main()", _SECONDS)
    except subprocess.TimeoutExpired:
        return Trial(False, False, f"the run-time compiler hangs: nothing came of it in {_SECONDS:g} s")
    except (OSError, ValueError, TypeError) as error:  # (TypeError: an interpreter that has no path)
        return Trial(False, False, f"the run-time compiler could not be tried: {error}")
    kind, _, text = done.stdout.decode("utf-8", "replace").rpartition("\x02")[2].partition("\x03")
    if kind == _WORKS:
        return Trial(True, False, text)
    if kind in (_MISSING, _BROKEN):
        return Trial(False, kind == _MISSING, text)
    return Trial(False, False, _died(done.returncode, done.stderr.decode("utf-8", "replace")))


def main() -> None:
    """The program of the process: a kind and a line between marks, which whatever else is printed lacks."""
    try:
        compile_source(Source("four_lines.cu", _FOUR_LINES), Options.of(_ARCH))
        version = ".".join(map(str, nvrtc_version()))
        kind, text = _WORKS, f"compiled four lines with NVRTC {version}"
    except CompilerMissingError as error:
        kind, text = _MISSING, str(error)
    except KernelUnavailableError as error:
        kind, text = _BROKEN, f"{error.reason}: {error.way_out}"
    sys.stdout.buffer.write(f"\x02{kind}\x03{text}".encode("utf-8", "replace"))


def _died(code: int, errors: str) -> str:
    """What to say of a process that ended without an answer."""
    last = errors.strip().splitlines()[-1:] or ["it printed nothing"]
    how = f"exit code {code}"
    if code < 0:  # POSIX: the signal
        known = [s.name for s in signal.Signals if s == -code]
        how = f"signal {-code}" + (f", {known[0]}" if known else "")
    return (
        f"the run-time compiler ends the process ({how}; {last[0]}): its library is damaged, perhaps: "
        'pip install --force-reinstall "lowbit-attention[cuda13]" (or cuda12)'
    )
