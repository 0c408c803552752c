"""``lowbit tune``: what ``recipe="auto"`` knows of this card, from calls that are timed on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from ..backends.base import Implementation
from ..backends.cuda import speeds
from ..backends.cuda.kernel import CudaKernel
from ..backends.cuda.speeds import TORCH, CardModel, Sizes
from ..backends.registry import IMPLEMENTATIONS
from ..bench.cost_fit import Samples, card_model, left_out, losses, offs, samples_of, sizes_of
from ..bench.providers import resolve_providers
from ..bench.results import append_csv, check_csv
from ..bench.run import Settings
from ..bench.sampling import SampleRow, random_shapes, sample
from ..bench.shapes import parse_shape
from ..bench.timing import percentile
from ..call.request import Request, device_name
from ..errors import InvalidArgumentError, UnsupportedError
from ..output.console import plain
from ..output.files import write_json
from ..output.plots import figure, label, save
from ..recipes.named import RECIPES
from .common import check_outputs, console, new_table, progress, write_results

LEAST_SAMPLES = 60
_LENGTHS = tuple(2**n for n in range(6, 18))
_HEADS = (8, 24, 96)


def command(
    seconds: Annotated[float, typer.Option(min=1.0, help="Begin no further call after this many seconds.")] = 45.0,
    calls: Annotated[int, typer.Option(min=LEAST_SAMPLES, help="Time at most so many calls.")] = 400,
    seed: Annotated[int, typer.Option(help="Which calls.")] = 1,
    device: Annotated[str, typer.Option(help="cuda, or cuda:1, …")] = "cuda",
    csv: Annotated[Path | None, typer.Option(help="Append a row per timed call to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the model, its errors and the rows to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw measured against predicted speedups (.png, .svg, .pdf).")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep what was found, for `recipe=auto`.")] = True,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove what was kept for this card, and time nothing.")
    ] = False,
) -> None:
    """Time random calls on this GPU, so that `recipe="auto"` knows where a kernel is faster than torch.

    * `lowbit tune` — about a minute (the first time some more, to compile the kernels), and from then on `auto` uses it
    * `lowbit tune --csv calls.csv --plot calls.png` — what was timed as rows, and as a picture
    * `lowbit tune --forget` — back to what the package knows

    The calls are like those of image, video and language models: 8 to 64 heads, 64 to 131072 tokens, with and without
    causality, head dimensions 64 and 128, in bf16. A model of eight coefficients for each of torch and our recipes is
    fitted to them, and judged by calls that were left out of the fit. It is kept in the cache folder, for this card,
    its driver and these versions of torch and of this package: run it again after an update. Let nothing else use the
    GPU meanwhile.
    """
    where = torch.device(device)
    if where.type != "cuda":
        raise InvalidArgumentError(f"--device {device!r}: lowbit tune times the kernels of a GPU: cuda, cuda:1, …")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "lowbit tune times the kernels of a GPU, and torch finds none here (lowbit doctor says more)"
        )
    where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
    name = device_name(where)
    if forget:
        gone = speeds.forget(name)
        console.print(plain(f"removed {gone}" if gone else f"nothing was kept for {name}"), soft_wrap=True)
        return
    check_outputs(csv, json, plot=plot)
    if csv:
        check_csv(csv, SampleRow)
    kernels = tunable(where)
    rows = _timed(kernels, where, calls, seed, seconds, csv)
    samples = samples_of(rows)
    if len(samples) < LEAST_SAMPLES:
        raise UnsupportedError(
            f"{len(samples)} calls without a mask were timed, and {LEAST_SAMPLES} are the least: give it more --seconds"
        )
    about = {"gpu": name, "torch": str(torch.__version__), "calls": len(samples), "seed": seed}
    multiprocessors = torch.cuda.get_device_properties(where).multi_processor_count

    def fitted(uses: Callable[[int], bool] = lambda number: True) -> CardModel:
        work_rows = lambda recipe, dim: kernels[recipe].work_rows(RECIPES[recipe], dim, where)  # noqa: E731
        ran_by = {recipe: kernel.name for recipe, kernel in kernels.items()}
        return card_model(samples, ran_by, work_rows, multiprocessors, about, uses)

    model = fitted()
    report(samples, left_out(samples, fitted), model, tuple(kernels))
    if keep:
        console.print(f"kept in {plain(speeds.keep(name, model))}; `lowbit tune --forget` removes it", soft_wrap=True)
    document = {"model": asdict(model), "rows": [asdict(row) for row in rows]}
    draw = lambda path: draw_speedups(path, samples, model, tuple(kernels), name)  # noqa: E731
    write_results((json, lambda path: write_json(path, document)), (plot, draw))


def tunable(device: torch.device, implementations: list[Implementation] | None = None) -> dict[str, CudaKernel]:
    """The recipes that ``auto`` may run on a device, and the kernel that runs each.

    Raises:
        UnsupportedError: there is none, and why.
    """
    typical = _typical(device)
    found: dict[str, CudaKernel] = {}
    reasons: dict[str, tuple[str, ...]] = {}
    for kernel in implementations or IMPLEMENTATIONS:
        for recipe in kernel.auto_recipes_for(typical) if isinstance(kernel, CudaKernel) else ():
            why = (*kernel.not_supported_reasons(typical, recipe), *kernel.not_worth_reasons(typical))
            if why:
                reasons[f"{kernel.name} with {recipe.name}"] = why
            elif isinstance(kernel, CudaKernel):
                found.setdefault(recipe.name, kernel)
    if not found:
        raise UnsupportedError(f"no kernel of ours is for {device_name(device)}, so there is nothing to tune", reasons)
    return found


def _typical(device: torch.device) -> Request:
    return Request(None, None, 1, 24, 24, 4096, 4096, 128, 128, torch.bfloat16, device)


def _timed(
    kernels: dict[str, CudaKernel], device: torch.device, calls: int, seed: int, seconds: float, csv: Path | None
) -> list[SampleRow]:
    """Time the calls, torch's and ours in turns."""
    providers = resolve_providers(["torch_default", *(f"ours:{recipe}" for recipe in kernels)])
    rows: list[SampleRow] = []
    with progress() as bar:
        task = bar.add_task("compiling the kernels", total=calls)
        _compile(kernels, device)
        bar.update(task, description="timing calls")
        settings, begun = Settings(device, max_seconds=seconds), time.perf_counter()
        for one in sample(random_shapes(calls, seed, masked=0.0), providers, settings):
            rows += one.rows
            if csv:
                append_csv(csv, one.rows, SampleRow)
            left = max(0, round(seconds - (time.perf_counter() - begun)))
            bar.update(task, advance=1, description=f"{one.shape.label} ({left} s left at most)")
    return rows


def _compile(kernels: dict[str, CudaKernel], device: torch.device) -> None:
    """What the calls will need, side by side."""
    requests = [replace(_typical(device), head_dim=dim, v_head_dim=dim) for dim in (64, 128)]
    with ThreadPoolExecutor(max_workers=None) as pool:
        work = [pool.submit(kernel.plan, r, RECIPES[name]) for name, kernel in kernels.items() for r in requests]
        for one in work:
            one.result()


def report(samples: Samples, predicted: Samples, model: CardModel, recipes: tuple[str, ...]) -> None:
    """What was found, as tables: how far off, how good the choices are, and from how many tokens on which is chosen."""
    table = new_table(f"{model.about['calls']} calls on {model.about['gpu']}", "who", "off by", "9 of 10", "at most")
    for name in (TORCH, *recipes):
        if off := offs(samples, predicted, name):
            table.add_row(plain(name), *(f"{x:.1%}" for x in (median(off), percentile(off, 90), max(off))))
    found = losses(samples, predicted, recipes)
    if found:
        near = sum(loss <= 0.03 for loss, _ in found) / len(found)
        worst, shape = found[0]
        table.caption = plain(
            f"predictions of calls that were left out of the fit; so chosen, {near:.1%} of the calls are within 3 % of "
            f"the fastest, and the worst is {worst:.1%} off ({shape})"
        )
    console.print(table)
    table = new_table(
        "from how many tokens on a kernel is faster than torch", "head_dim", *(f"{heads} heads" for heads in _HEADS)
    )
    for dim in (64, 128):
        for causal in (False, True):
            cells = [_pays_from(model, recipes, heads, dim, causal) for heads in _HEADS]
            table.add_row(f"{dim}" + ", causal" * causal, *cells)
    console.print(table)


def _pays_from(model: CardModel, recipes: tuple[str, ...], heads: int, dim: int, causal: bool) -> str:
    """The fewest tokens (a power of two) from which on one recipe or another is always predicted to be faster."""
    text = "never"
    for length in reversed(_LENGTHS):
        call = Sizes(1, heads, heads, length, length, dim, dim, 0 if causal else None)
        torchs = model.microseconds(call, TORCH)
        ours = [us for name in recipes if (us := model.microseconds(call, name)) is not None]
        if torchs is None or not ours:
            return "not timed"
        if min(ours) > torchs:
            break
        text = f"{length} ({torchs / min(ours):.2f} ×)"
    return text


def draw_speedups(path: Path, samples: Samples, model: CardModel, recipes: tuple[str, ...], card: str) -> None:
    """Measured against predicted speedups over torch, a point a call and recipe."""
    fig, axes = figure(5.5, 5.0)
    ends = [1.0, 1.0]
    for recipe in recipes:
        expected, measured = [], []
        for label_of_shape, times in samples.items():
            call = sizes_of(parse_shape(label_of_shape))
            torchs, ours = model.microseconds(call, TORCH), model.microseconds(call, recipe)
            if torchs and ours and recipe in times and TORCH in times:
                expected.append(torchs / ours)
                measured.append(times[TORCH] / times[recipe])
        axes.scatter(expected, measured, s=8, alpha=0.6, label=label(recipe))
        ends = [min(ends[0], *expected, *measured), max(ends[1], *expected, *measured)]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    for line in (axes.axhline, axes.axvline):
        line(1.0, color="grey", linewidth=0.8, linestyle=":")
    for axis in (axes.set_xscale, axes.set_yscale):
        axis("log")
    axes.set_xlabel("torch's time over ours, expected")
    axes.set_ylabel("measured")
    axes.set_title(label(f"whole calls on {card}"))
    axes.legend()
    save(path, fig)
