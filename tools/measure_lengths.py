"""Measures recipes on every synthetic family at every length, against exact attention in float64, into a CSV file.

    python tools/measure_lengths.py --device cuda                                 # emulation, on a GPU
    python tools/measure_lengths.py --device cuda --kernel                        # the kernels themselves
    python tools/measure_lengths.py --lengths 1024 4096 --recipes all --heads 4 --seeds 1     # on a CPU
    python tools/measure_lengths.py --per-head-fp8                                # the usual FP8 attention, beside

Errors are pooled over heads and seeds; standard errors come from their spread. Rows of the same cell that the file has
already are replaced, all others stay, and the file is written after every group of families. ``make tables`` makes the
error budget and its pictures of ``benchmarks/results/errors.csv``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lowbit_attention import RECIPES, InvalidArgumentError, Recipe, UnsupportedError
from lowbit_attention.backends.budget import YARDSTICK
from lowbit_attention.cli.common import progress
from lowbit_attention.evaluation.errors import Case, Grid, HeadErrors, with_mean_of_all
from lowbit_attention.evaluation.synthetic import FAMILIES
from lowbit_attention.output.files import write_csv
from lowbit_attention.recipes.formats import E4M3_MAX, round_e4m3
from lowbit_attention.recipes.machine import MACHINES, Machine, resolve_machine
from lowbit_attention.recipes.named import recipe

ROOT = Path(__file__).resolve().parents[1]
ERRORS = ROOT / "benchmarks/results/errors.csv"
LENGTHS = (1024, 4096, 32_768, 131_072, 300_000)
CELL = ("by", "machine", "fidelity", "dtype", "causal", "head_dim", "same_mean", "recipe", "family", "length")
"""What tells one measurement from another; later ones replace earlier ones."""
PER_HEAD = "fp8_per_head"
"""No recipe: the baseline of `per_head_fp8`."""
BYTES_PER_CHANNEL = 72
"""Of memory at the most for each channel of a token of a head: some 16 copies in float32 while V is packed."""

Row = dict[str, Any]


def cell(row: Row) -> tuple[str, ...]:
    """The row's place in the file."""
    return tuple(str(row[name]) for name in CELL)


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Both, in the order of cells as they first appeared, ``new`` in place of what ``old`` says of the same cells."""
    return list({cell(row): row for row in (*old, *new)}.values())


def families_at_once(grid: Grid, length: int, device: str) -> int:
    """How many families fit into the device's free memory side by side; one on a CPU, which gains nothing."""
    if device == "cpu":
        return 1
    free = torch.cuda.mem_get_info(device)[0]
    one = grid.heads * grid.seeds * length * grid.head_dim * BYTES_PER_CHANNEL
    return max(1, free // one)


def per_head_fp8(case: Case) -> torch.Tensor:
    """What FP8 attention with a scale a head gives at best, as FlashAttention-3's; like ``Case.emulated``.

    Q, K and V in E4M3, each by its head's largest magnitude, P in E4M3 at 448 times itself; logits and all sums in
    float32, no smoothing.
    """
    if case.is_causal:
        raise InvalidArgumentError("--per-head-fp8 has no causal mask")

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-30) / E4M3_MAX
        return round_e4m3(x.float() / scale) * scale

    q = case.q if case.rows is None else case.q[:, :, case.rows]
    logits = rounded(q) @ rounded(case.k).transpose(-1, -2) * case.sm_scale
    p = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return round_e4m3(p * E4M3_MAX) @ rounded(case.v) / (p.sum(dim=-1, keepdim=True) * E4M3_MAX)


def groups(families: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The families, ``size`` at a time."""
    for first in range(0, len(families), size):
        yield families[first : first + size]


def run(
    case: Case, grid: Grid, families: Sequence[str], recipes: dict[str, Recipe], kernel: bool
) -> dict[tuple[str, str], HeadErrors]:
    """Errors by family and recipe; a recipe without a kernel is left out where the kernels are measured."""
    errors = {}
    if not recipes:
        of_families = grid.split(families, case.by_head(per_head_fp8(case)))
        return {(family, PER_HEAD): found for family, found in of_families.items()}
    for name, chosen in recipes.items():
        try:
            out = case.by_kernel(chosen) if kernel else case.emulated(chosen)
        except UnsupportedError as error:
            if not kernel:
                raise
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        for family, of_family in grid.split(families, case.by_head(out)).items():
            errors[family, name] = of_family
    return errors


def rows_of(
    errors: dict[tuple[str, str], HeadErrors], grid: Grid, length: int, machine: Machine, options: argparse.Namespace
) -> list[Row]:
    """A row for each family and recipe."""
    rows = []
    for (family, name), of_heads in errors.items():
        yardstick = errors.get((family, YARDSTICK))
        times, times_error = of_heads.times(yardstick) if yardstick else (None, None)
        rows.append(
            {
                "by": "kernel" if options.kernel else "emulation",
                "machine": machine.name,
                "fidelity": "" if options.kernel or name == PER_HEAD else machine.fidelity,
                "dtype": str(grid.dtype).removeprefix("torch."),
                "causal": grid.is_causal,
                "head_dim": grid.head_dim,
                "same_mean": options.same_mean,
                "recipe": name,
                "family": family,
                "length": length,
                "heads": grid.heads,
                "seeds": grid.seeds,
                "query_rows": grid.query_rows,
                "device": torch.cuda.get_device_name(options.device) if options.device != "cpu" else "cpu",
                "l1": f"{of_heads.l1:.6f}",
                "standard_error": _short(of_heads.standard_error),
                "times_yardstick": _short(times, 4),
                "times_error": _short(times_error, 4),
            }
        )
    return rows


def _short(value: float | None, digits: int = 6) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def measure(
    families: Sequence[str], grid: Grid, length: int, recipes: dict[str, Recipe], machine: Machine,
    options: argparse.Namespace,
) -> list[Row]:  # fmt: skip
    """The rows of a group of families; of its halves where the device's memory does not hold it all."""

    def together() -> list[Row]:  # (a function of its own: when it fails nothing keeps its tensors)
        case = grid.case(families, length, machine, options.device)
        return rows_of(run(case, grid, families, recipes, options.kernel), grid, length, machine, options)

    try:
        return together()
    except torch.cuda.OutOfMemoryError:
        if len(families) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(families) // 2
    parts = (families[:half], families[half:])
    return [row for part in parts for row in measure(part, grid, length, recipes, machine, options)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument(
        "--recipes", nargs="+", default=[YARDSTICK, "sage2pp_8b", "fast_8b"],
        help="names, with changes if wanted (sage2_8b:smooth_v=true), or `all` named ones",
    )  # fmt: skip
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=["sm_90a"])
    parser.add_argument("--fidelity", choices=("step", "instruction"), default="instruction")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--query-rows", type=int, default=64, help="in whole query tiles of each head")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--kernel", action="store_true", help="run the kernels (whole calls) instead of the emulation")
    parser.add_argument("--same-mean", action="store_true", help="k̄ over all tokens for every recipe")
    parser.add_argument("--per-head-fp8", action="store_true", help="FP8 with a scale a head instead of recipes")
    parser.add_argument("--csv", type=Path, default=ERRORS)
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for."""
    options = parse()
    names = [name for name, r in RECIPES.items() if not r.is_exact] if options.recipes == ["all"] else options.recipes
    names = [] if options.per_head_fp8 else names
    recipes = {name: with_mean_of_all(recipe(name)) if options.same_mean else recipe(name) for name in names}
    grid = Grid(options.heads, options.seeds, options.head_dim, options.query_rows, torch.bfloat16, options.causal)
    rows = read(options.csv)
    with progress() as bar:
        total = len(options.machines) * len(options.lengths) * len(options.families)
        task = bar.add_task("errors", total=total)
        for length in options.lengths:
            for name in options.machines:
                machine = resolve_machine(name, options.fidelity)
                for group in groups(options.families, families_at_once(grid, length, options.device)):
                    bar.update(task, description=f"{length} tokens, {name}: {group[0]}")
                    found = measure(group, grid, length, recipes, machine, options)
                    rows = merged(rows, found)
                    write_csv(options.csv, rows)
                    bar.advance(task, len(group))
                    _say(bar, found)


def _say(bar: Progress, rows: Sequence[Row]) -> None:
    for row in rows:
        beside = f", {row['times_yardstick']} ± {row['times_error']} × {YARDSTICK}" if row["times_error"] else ""
        bar.console.print(
            f"{row['family']}, {row['length']}, {row['machine']}, {row['recipe']}: {row['l1']}{beside}",
            markup=False, highlight=False,
        )  # fmt: skip


if __name__ == "__main__":
    with torch.inference_mode():
        main()
