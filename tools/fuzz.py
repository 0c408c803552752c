"""Random calls of ``scaled_dot_product_attention`` through `sdpa_enabled`, against float64.

python tools/fuzz.py --cases 100000 --seed 0 --device cpu
python tools/fuzz.py --seed 0 --only 1234      (one case again, with every figure)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fuzz_cases import PROFILES, Case, make_case, tensors
from fuzz_check import Answer, expected
from torch import Tensor

from lowbit_attention import sdpa_enabled

KERNEL = "attention_wgmma"


@dataclass
class Tally:
    """What a run found."""

    cases: int = 0
    refused: int = 0
    ran: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        wanted = self.cases - self.refused
        ours = sum(self.ran.values())
        share = 100 * ours / wanted if wanted else 100.0
        worst = max(self.ratios, default=0.0)
        middle = sorted(self.ratios)[len(self.ratios) // 2] if self.ratios else 0.0
        lines = [
            f"{self.cases} calls, {self.refused} of them documented refusals (all went to torch, all counted)",
            f"{ours} of the other {wanted} ran here ({share:.2f} %): {dict(self.ran)}",
            f"error / tolerance: median {middle:.3f}, largest {worst:.3f}",
            f"{len(self.failures)} failures",
        ]
        return "\n".join(lines + self.failures[:20])


def run(profile: str, seed: int, numbers: Iterable[int], device: str) -> Tally:
    """Run cases: grouped by recipe, each group in one block of `sdpa_enabled`."""
    groups: dict[tuple[str, str | None], list[Case]] = {}
    for number in numbers:
        case = make_case(profile, seed, number)
        groups.setdefault((case.recipe, case.like), []).append(case)
    tally = Tally()
    for (recipe, like), cases in groups.items():
        _run_group(recipe, like, cases, device, tally)
    return tally


def _run_group(recipe: str, like: str | None, cases: list[Case], device: str, tally: Tally) -> None:
    with sdpa_enabled(recipe=recipe, like=like) as report:
        for case in cases:
            tally.cases += 1
            tally.refused += case.refusal is not None
            report.clear()
            try:
                (q, k, v), mask = tensors(case, device)
                before = [t.clone() for t in (q, k, v)]
                if case.refusal is not None:  # torch's own answer, or torch's own error
                    problems = _as_torch(case, q, k, v, mask)
                else:
                    problems = judge(case, call(case, q, k, v, mask), expected(case, q, k, v, mask), tally)
                if not all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)):
                    problems.append("the inputs were changed")
            except Exception as error:  # (whatever it is, it is a finding)
                problems = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
            else:
                problems += _path(case, report.by_implementation(), report.fallbacks)
                tally.ran.update({n: c for n, c in report.by_implementation().items() if n != "torch"})
            if problems:
                tally.failures.append(f"{case.command()}  # {'; '.join(problems)}; {case}")


def call(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The call as a model makes it."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=case.is_causal, scale=case.scale, enable_gqa=case.enable_gqa
    )


def _as_torch(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[str]:
    answers: list[Tensor | str] = []
    for function in (call, _native):
        try:
            answers.append(function(case, q, k, v, mask).detach())
        except RuntimeError as error:
            answers.append(str(error))
    ours, theirs = answers
    if isinstance(ours, str) or isinstance(theirs, str):
        return [] if ours == theirs else [f"here {ours}, by torch {theirs}"]
    return [] if torch.equal(ours.nan_to_num(7e6), theirs.nan_to_num(7e6)) else ["not what torch answers"]


def _native(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=case.is_causal, scale=case.scale, enable_gqa=case.enable_gqa
    )


def judge(case: Case, out: Tensor, answer: Answer, tally: Tally | None = None) -> list[str]:
    """What is wrong with an output."""
    if out.shape != answer.out.shape:
        return [f"shape {tuple(out.shape)} instead of {tuple(answer.out.shape)}"]
    if out.dtype != DTYPE_OF[case.dtype]:
        return [f"dtype {out.dtype}"]
    if not out.numel():
        return []
    out = out.detach().double()
    if not out.isfinite().all():
        return ["not finite"]
    problems = []
    if out[~answer.seen].any():
        problems.append("a row that sees nothing is not zero")
    error = (out - answer.out).abs()
    ratio = float((error / answer.bound.clamp(min=1e-300)).max())
    rms = float(error.square().mean().sqrt())
    if tally is not None and case.refusal is None:
        tally.ratios.append(ratio)
    if ratio > 1:
        problems.append(f"an element is {ratio:.3g} tolerances off")
    if rms > answer.rms:
        problems.append(f"root mean square {rms:.3g}, allowed {answer.rms:.3g}")
    return problems


DTYPE_OF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def _path(case: Case, implementations: dict[str, int], fallbacks: dict[str, int]) -> list[str]:
    """Whether the counter says what the documents say."""
    if sum(implementations.values()) != 1:
        return [f"counted as {implementations}"]
    if case.refusal is None:
        return [f"went to torch: {fallbacks}"] if fallbacks else []
    if not fallbacks or case.refusal not in next(iter(fallbacks)):
        return [f"should go to torch because of {case.refusal!r}, was {implementations} {fallbacks}"]
    return []


def main() -> int:
    """Run from the command line; the exit code is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu or cuda; by the profile if not given")
    parser.add_argument("--profile", choices=list(PROFILES), default=None, help="by the device if not given")
    parser.add_argument("--only", type=int, default=None, help="the number of one case")
    options = parser.parse_args()
    profile = options.profile or ("gpu" if options.device == "cuda" else "cpu")
    device = options.device or ("cuda" if profile == "gpu" else "cpu")
    started = time.perf_counter()
    total = Tally()
    chunk = 2000
    numbers = [options.only] if options.only is not None else list(range(options.cases))
    for first in range(0, len(numbers), chunk):
        part = run(profile, options.seed, numbers[first : first + chunk], device)
        total.cases += part.cases
        total.refused += part.refused
        total.ran += part.ran
        total.failures += part.failures
        total.ratios += part.ratios
        for failure in part.failures:
            print(failure, flush=True)
    print(f"profile {profile}, seed {options.seed}, device {device}, {time.perf_counter() - started:.0f} s")
    if options.only is not None:
        print(make_case(profile, options.seed, options.only))
    print(total)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
