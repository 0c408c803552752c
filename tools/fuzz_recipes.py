"""Random recipes that a kernel accepts: its numbers against the emulation's, with the same tiles, sums and means.

python tools/fuzz_recipes.py --cases 1000 --max-length 40000 --seed 1     (needs a Hopper GPU)
python tools/fuzz_recipes.py --kernel attention_wgmma --only 17           (one case again)
python tools/fuzz_recipes.py --cases 100 --compile                        (no GPU: machine code alone)

How far the two may be apart is what tests/gpu/wgmma_cases.py and tests/gpu/mma_cases.py derive.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipe_cases import KERNELS, Case, first_cases

from lowbit_attention.backends.cuda.inspect.machine_code import problems
from lowbit_attention.backends.cuda.instances import Instance
from lowbit_attention.backends.cuda.jit.compiler import compile_source
from lowbit_attention.backends.cuda.launch import cache

_TESTS = Path(__file__).resolve().parents[1] / "tests" / "gpu"
_TOGETHER = 200
"""Cases whose instances are compiled side by side before the first runs."""


def judge(kernel: str) -> Any:
    """The tests' module that runs a kernel and knows how far its answers may be off."""
    if str(_TESTS) not in sys.path:
        sys.path.insert(0, str(_TESTS))
    return importlib.import_module({"attention_wgmma": "wgmma_cases", "attention_mma": "mma_cases"}[kernel])


def instances_of(cases: Iterable[Case]) -> list[Instance]:
    """What they compile, each once."""
    return list({str(instance): instance for case in cases for instance in case.instances()}.values())


def compile_all(cases: Iterable[Case]) -> None:
    """Compile for all cases side by side."""
    cache().get_all((i.source(), i.options()) for i in instances_of(cases))


def check(case: Case) -> None:
    """Run a case.

    Raises:
        AssertionError: the kernel's answer is not the emulation's.
    """
    cases = judge(case.kernel)
    call = cases.kernel_cases.Case(str(case.recipe), **case.call())
    q, k, v = call.tensors()
    if case.kernel == "attention_mma":
        cases.assert_agrees(q, k, v, case.recipe, **call.options())
        return
    out, lse = cases.run(q, k, v, case.recipe, **call.options())
    offset = call.causal_offset()
    cases.assert_agrees(out, lse, q, k, v, case.recipe, causal_offset=offset, fidelity="instruction")


def failures(cases: Sequence[Case], say: bool = False) -> list[str]:
    """What is wrong, a line a case."""
    found: list[str] = []
    for first in range(0, len(cases), _TOGETHER):
        part = cases[first : first + _TOGETHER]
        compile_all(part)
        for case in part:
            try:
                check(case)
            except Exception as error:  # (whatever it is, it is a finding)
                text = " ".join(str(error).split())[:300]
                found.append(f"{case.command()}  # {type(error).__name__}: {text}; {case}")
                if say:
                    print(found[-1], flush=True)
    return found


def compiled_badly(cases: Sequence[Case]) -> list[str]:
    """Instances that spill or whose MMAs are serialised; needs no GPU."""

    def of(instance: Instance) -> list[str]:
        compiled = compile_source(instance.source(), instance.options())
        return [f"{instance}: {problem}" for problem in problems(instance, compiled)]

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [line for lines in pool.map(of, instances_of(cases)) for line in lines]


def main() -> int:
    """Run from the command line; the exit code is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="of each kernel")
    parser.add_argument("--max-length", type=int, default=4096, help="keys, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", choices=KERNELS, default=None, help="both if not given")
    parser.add_argument("--only", type=int, default=None, help="the number of one case")
    parser.add_argument("--compile", action="store_true", help="look at the machine code alone")
    options = parser.parse_args()
    bad = 0
    for kernel in [options.kernel] if options.kernel else KERNELS:
        started = time.perf_counter()
        count = options.cases if options.only is None else options.only + 1
        cases = first_cases(kernel, options.seed, count, options.max_length)
        if options.only is not None:
            cases = cases[options.only :]
            print(cases[0])
        if options.compile:
            found = compiled_badly(cases)
            print(*found, sep="\n", end="\n" if found else "")
        else:
            found = failures(cases, say=True)
        bad += len(found)
        seconds = time.perf_counter() - started
        print(f"{kernel}, seed {options.seed}: {len(cases)} cases, {len(found)} failures, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
