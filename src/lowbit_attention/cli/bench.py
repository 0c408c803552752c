"""``lowbit bench``: how fast, against whom."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..bench.pictures import bars, markdown, microseconds, number, tops_text
from ..bench.providers import DEFAULT_RECIPES, NAMES, default_names, resolve_providers
from ..bench.results import Measurement, append_csv, check_csv
from ..bench.run import DTYPES, Note, Settings, ShapeResult, run, split_available
from ..bench.shapes import MASKS, SETS, Shape, parse_shape, shape_set
from ..bench.step_models import STEP_MODELS
from ..bench.timing import Limits
from ..errors import InvalidArgumentError
from ..evaluation.memory import check_fits
from ..output.console import plain
from ..output.files import write_json
from ..output.saving import write_whole
from .bench_random import random_calls
from .bench_steps import STEP_SECONDS, print_notes, steps
from .common import RECIPE_HELP, check_outputs, console, new_table, progress, write_results

_SHAPE_HELP = (
    "batch x heads x tokens x head_dim, repeatable: 1x24x4608x128, 4x32/8x8192x128:causal, 1x40x32760,512x128; with a "
    f"mask after it, 4x32x8192x128:padding: {', '.join(MASKS)}; or 16x16x4352x128:varlen, sequences of different "
    "lengths packed; V's channels behind K's: 1x128x8192x192/128."
)
_PROVIDER_HELP = (
    f"Whom to time, repeatable: `ours:<recipe>`, {', '.join(NAMES)}. Default: "
    f"{', '.join('ours:' + name for name in DEFAULT_RECIPES)}, torch_fa2, torch_cudnn, cudnn_fp8, and those of the "
    "others that are installed, but for torch_default."
)
_MODEL_HELP = f"With --steps, repeatable: {', '.join(STEP_MODELS)}. Default: all that fit the GPU's memory."
_SHAPE_SECONDS = 4.0


def command(
    which: Annotated[
        str | None, typer.Option("--set", help=f"A set of shapes: {', '.join(SETS)} (quick, unless --shape is given).")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", "-s", help=_SHAPE_HELP)] = None,
    provider: Annotated[list[str] | None, typer.Option("--provider", "-p", help=_PROVIDER_HELP)] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help=f"Ours with this recipe, besides; with --steps in place of `auto`. {RECIPE_HELP}",
        ),
    ] = None,
    whole_steps: Annotated[
        bool, typer.Option("--steps", help="Time whole steps of real models' classes (random weights) instead.")
    ] = False,
    random: Annotated[
        int | None, typer.Option(min=1, help="Time so many random calls like real models' (whole ones, 5 rounds each).")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --random: which calls.")] = 1,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help=_MODEL_HELP)] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="With --steps: also as torch.compile makes it.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="With --steps: few layers and tokens, only to see that it works.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds-per-shape",
            min=0.0,
            help=f"How long the rounds of a shape may take ({_SHAPE_SECONDS:g}), or of a model ({STEP_SECONDS:g}).",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Begin no further shape or model after this many seconds.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …, or cpu for a trial with tiny shapes.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help=f"Of the inputs: {', '.join(DTYPES)} (bf16).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append a row per measurement to this file, shape by shape.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write rows and notes to this file.")] = None,
    table: Annotated[Path | None, typer.Option("--markdown", help="Write a Markdown table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the TOPS (.png, .svg, .pdf).")] = None,
    commit: Annotated[
        str | None, typer.Option(help="The commit to record in the rows, where git cannot tell (a copied tree).")
    ] = None,
) -> None:
    """Time attention on this GPU, ours against others, whole calls and kernels alone.

    * `lowbit bench` — a handful of shapes, a minute or two
    * `lowbit bench --set models --csv speed.csv` — real models' calls; the file grows from run to run
    * `lowbit bench -s 1x24x4608x128 -p torch_cudnn -r fast_8b` — one shape, one peer, one recipe
    * `lowbit bench --set masks -p torch_default -r fast_8b` — one shape without a mask and with each
    * `lowbit bench --random 300 -p torch_default -r fast_8b --csv calls.csv` — what a cost model is fitted to
    * `lowbit bench --device cpu -s 1x2x256x64 -p torch_default` — only to see that it works
    * `lowbit bench --steps --csv steps.csv` — whole steps of Flux, Wan, Llama, … as far as they fit this GPU
    * `lowbit bench --steps -m flux -r auto -r fast_8b --compiled` — one model, two recipes, compiled as well
    * `lowbit bench --steps --device cpu --tiny` — only to see that it works

    Providers take turns, round by round, with a cold L2 cache: compare times of one run only. `whole` is 16-bit
    tensors in and out, `kernel` the attention kernel on inputs that are quantised already. `×cuDNN` is how many
    times faster than torch's cuDNN; `host µs` is what queueing a whole call takes; `MiB` what it needs beyond its
    output; `MHz` the SM clock meanwhile.

    Masks, by their names after a shape: `padding` hides the last 1/64 of the keys of every sequence but the first,
    `holes` 30 % of a sequence's keys at random ([B, 1, 1, Nk]); `bits` 10 % of all places, `seen` none, `blocks` all
    but four blocks on the diagonal ([1, 1, Nq, Nk]); `bits_by_head` 10 % ([B, H, Nq, Nk]); `bias` ([1, 1, Nq, Nk]) and
    `key_bias` ([B, 1, 1, Nk]) add normal 16-bit numbers to the logits. TOPS count the work as if the mask hid none of
    it. Ours and torch's backends that take masks get them, whole calls only; notes say why the others are left out.

    A step (`--steps`) is one forward of a model of diffusers or transformers with random weights, bf16, real sizes.
    `torch` is as it is called today, `torch_cut` without the padded tokens, `ours` by a recipe (what `auto` leaves to
    torch counts as torch's). `±%` is half the rounds' range, `×torch` the speedup over torch, compiled over compiled.
    `attn`, `mm` and `rest` are the GPU's ms in attention kernels, matrix products and all else; an emulated call's
    kernels count as the last two. `calls` are attention calls run by kernels/emulated/by torch. `L1` compares
    the output with torch's (the files have the cosine, too), `GiB` is the most memory.
    """
    where = _device(device, whole_steps)
    for name, value in (("seconds-per-shape", seconds), ("max-seconds", max_seconds)):
        if value is not None and math.isnan(value):
            raise InvalidArgumentError(f"--{name} {value} is no number of seconds")
    _check_mode(
        whole_steps,
        {"set": which, "shape": shape, "provider": provider, "dtype": dtype, "markdown": table, "plot": plot},
        {"model": model, "compiled": compiled, "tiny": tiny},
    )
    if random is not None:
        for name, given in (("steps", whole_steps), ("set", which), ("shape", shape), ("seconds-per-shape", seconds)):
            if given:
                raise InvalidArgumentError(f"--{name} is not for random calls (--random)")
    if whole_steps:
        options: dict[str, Any] = {"csv": csv, "json": json, "commit": commit, "max_seconds": max_seconds}
        steps(where, model, recipe, compiled=compiled, tiny=tiny, seconds=seconds, **options)
        return
    dtype = "bf16" if dtype is None else dtype
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    providers = resolve_providers([*(provider or default_names()), *(f"ours:{name}" for name in recipe or ())])
    if random is not None:
        if table or plot:
            raise InvalidArgumentError("--markdown and --plot are not for random calls (--random)")
        of_run = Settings(where, dtype, max_seconds=max_seconds, commit=commit)
        random_calls(random, seed, providers, of_run, csv, json)
        return
    shapes = _shapes(which, shape, where)
    check_outputs(csv, json, table, plot=plot)
    if csv:
        check_csv(csv)
    available, notes = split_available(providers)
    rows: list[Measurement] = []
    settings = Settings(
        where, dtype, Limits(_SHAPE_SECONDS if seconds is None else seconds), max_seconds, commit=commit
    )
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(shapes))
            say = lambda s, what: bar.update(task, description=f"{s.name}: {what}")  # noqa: E731
            for result in run(shapes, available, settings, say) if available else ():
                rows += result.rows
                notes += result.notes
                if csv:
                    append_csv(csv, result.rows)
                if result.rows:
                    bar.stop()  # the bar is on stderr, often the same terminal
                    console.print(_table(result))
                    bar.start()
                bar.advance(task)
    finally:  # what was measured is kept, whatever ended the run
        if csv and rows:
            console.print(f"appended {len(rows)} rows to {plain(csv)}", soft_wrap=True)
        _report(rows, notes, json, table, plot)
    if not rows:
        raise typer.Exit(1)


def _check_mode(whole_steps: bool, of_shapes: dict[str, object], of_steps: dict[str, object]) -> None:
    """Refuse an option that the other mode has."""
    for name, value in (of_shapes if whole_steps else of_steps).items():
        if value:
            raise InvalidArgumentError(f"--{name} is {'not' if whole_steps else 'only'} for whole steps (--steps)")


def _device(text: str, whole_steps: bool) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InvalidArgumentError(f"--device {text!r} is no device: cuda, cuda:1, …, or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise InvalidArgumentError(f"--device {text!r}: only cuda and cpu can be timed")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InvalidArgumentError(
                "PyTorch sees no CUDA device to time (`lowbit doctor` says more); to try the benchmark on the CPU: "
                + ("--device cpu --tiny" if whole_steps else "--device cpu --shape 1x2x256x64")
            )
        if (device.index or 0) >= count:
            raise InvalidArgumentError(f"--device {text!r}: there are only {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def _shapes(which: str | None, texts: list[str] | None, device: torch.device) -> list[Shape]:
    if device.type == "cpu" and not texts:
        raise InvalidArgumentError("the sets of shapes are for GPUs; on the CPU give a tiny one: --shape 1x2x256x64")
    chosen = shape_set(which or "quick") if which or not texts else ()
    found = list(dict.fromkeys([*chosen, *map(parse_shape, texts or [])]))
    if device.type == "cpu":  # a GPU says so itself when its memory is full, and the other shapes are timed
        for s in found:
            queries, keys = s.q_heads * s.q_len, s.kv_heads * s.kv_len
            numbers = s.batch * (s.head_dim + s.v_head_dim) * (queries + keys)
            what = "Q, K, V, the mask and the output" if s.mask else "Q, K, V and the output"
            check_fits(f"{what} of {s.label}", 2 * numbers + s.mask_bytes)
    return found


def _table(result: ShapeResult) -> Table:
    shape, rows = result.shape, result.rows
    title = shape.name if shape.name == shape.label else f"{shape.name}: {shape.label}"
    columns = ("part", "µs", "p20–p80", "TOPS", "×cuDNN", "host µs", "MiB", "MHz")
    table = new_table(title, "provider", *columns)
    table.collapse_padding, table.pad_edge = True, False  # nine columns in a console of 80
    table.columns[1].justify = "left"
    best = max(row.tops for row in rows)
    for row in rows:
        table.add_row(
            plain(row.provider),
            row.part,
            microseconds(row.median_us),
            f"{microseconds(row.p20_us)}–{microseconds(row.p80_us)}",
            f"[bold]{tops_text(row.tops)}[/]" if row.tops == best else tops_text(row.tops),
            number(row.ratio_to_cudnn, 2),
            number(row.host_us),
            number(row.extra_mib),
            number(row.sm_mhz),
        )
    table.caption = plain(f"{rows[0].rounds} rounds" + (f"; {result.reading}" if str(result.reading) else ""))
    return table


def _report(
    rows: list[Measurement], notes: list[Note], json: Path | None, table: Path | None, plot: Path | None
) -> None:
    """What was not measured, and the files but the CSV one."""
    print_notes(notes)
    document = {"rows": [asdict(row) for row in rows], "notes": [asdict(note) for note in notes]}
    write_results(
        (json, lambda path: write_json(path, document)),
        (table, lambda path: write_whole(path, markdown(rows))),
        (plot if rows else None, lambda path: bars(path, rows)),
    )
