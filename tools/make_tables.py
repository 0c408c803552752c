"""Regenerates every generated file: the error budget, the tables in docs/, and their pictures.

Run by ``make tables`` (about ten minutes on two cores); ``--only NAME`` does one of them. Results are committed.
The budget's errors come from benchmarks/results/errors.csv, which tools/measure_lengths.py writes (minutes on a GPU).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import fit_costs
import torch
from grid_picture import draw as draw_grid
from rich.progress import track

from lowbit_attention import RECIPES, Recipe, attention, compare
from lowbit_attention.adaptive.tuning import read_benchmark
from lowbit_attention.backends import budget
from lowbit_attention.backends.cuda.inspect.kernels import inspect
from lowbit_attention.cli.demo import DEFAULT_RECIPES
from lowbit_attention.cli.inspect import markdown_table
from lowbit_attention.demo import study
from lowbit_attention.demo.minilm import MiniLM
from lowbit_attention.demo.text import passages
from lowbit_attention.evaluation.ablations import ABLATIONS
from lowbit_attention.evaluation.errors import Case
from lowbit_attention.evaluation.synthetic import CHANNEL_FAMILIES, FAMILIES, make
from lowbit_attention.output import plots
from lowbit_attention.output.files import write_json
from lowbit_attention.recipes.machine import ACCUMULATOR_MODELS, DEFAULT_MACHINE, MACHINES
from lowbit_attention.recipes.named import recipe
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact as exact_attention
from lowbit_attention.reference.quantize import pack

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ERRORS_FILE = ROOT / "src/lowbit_attention/data/family_errors.json"
NOTE = "<!-- Written by tools/make_tables.py; do not edit. -->\n\n"

_OWN_PAGES = ("recipes", "remedies")
"""Ablations that have a page of their own."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column text and the others numbers."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def error_budget() -> None:
    """data/family_errors.json: what tools/measure_lengths.py measured of named recipes."""
    write_json(ERRORS_FILE, {"setting": budget.MEASURED_AS, "l1": budget.from_rows(read_errors())})
    budget.measured.cache_clear()


def read_errors() -> list[dict[str, str]]:
    """The rows of benchmarks/results/errors.csv."""
    with (ROOT / "benchmarks/results/errors.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


_SHOWN_LENGTH = 4096
"""Of the table of all recipes on all families."""


def recipes_text() -> str:
    """docs/recipes.md: what each recipe is, its options, its errors."""
    rows = []
    for name, r in RECIPES.items():
        rows.append([f"`{name}`", r.summary, *_option_cells(r)])
    options = ("Q·K", "Q scales", "K scales", "smoothed", "rotated", "P·V", "P_r, V_r", "sums", "FP32 every")
    text = "# The recipes\n\n" + NOTE + markdown(("recipe", "what it is", *options), rows)
    text += "\n`lowbit recipes NAME` shows every option of one; `NAME:option=value,…` changes some.\n"
    errors = budget.measured()
    text += (
        f"\n## Error by input family\n\nRelative L1 of the output against exact attention (float64) at {_SHOWN_LENGTH} "
        "tokens, head dimension 128, bfloat16 inputs, emulated in `instruction` fidelity on a query tile of each head "
        "([what was measured](../benchmarks/results/errors.csv)).\n"
    )
    for machine, by_recipe in errors.items():
        body = [
            [family, *(_cell(by_family.get(family, {}).get(_SHOWN_LENGTH)) for by_family in by_recipe.values())]
            for family in FAMILIES
        ]
        text += f"\nLike {MACHINES[machine]}:\n\n" + markdown(("family", *(f"`{n}`" for n in by_recipe)), body)
    text += "\n" + markdown(("family", "what it is"), [[f.name, f.summary] for f in FAMILIES.values()])
    text += (
        "\n## Error against length\n\nA sum over 1K keys and one over 300K are not rounded alike, and real tokens have "
        "neighbours that are like them: an error that does not cancel grows beside an output that does.\n\n"
        "![Relative L1 against length, a panel for each family](images/error-by-length.png)\n\n"
        f"*Relative L1 against the number of tokens, like {PICTURED}; bars are standard errors over heads and seeds.* "
        "`python tools/measure_lengths.py --device cuda` measures it (minutes on a GPU), and `lowbit evaluate -f drift "
        "--length 131072 --query-rows 64 --dtype bfloat16 --fidelity instruction --like sm_90a` one family.\n"
    )
    text += _by_length(errors)
    text += (
        f"\n## What *auto* may use\n\nA recipe that is not 4-bit and errs at most {budget.SLACK} × as much as the "
        f"worse of `{'` and `'.join(budget.PUBLISHED)}` on every family of all machines, at the measured lengths on "
        "both sides of the call's number of keys.\n\n"
    )
    lengths = sorted({n for m in errors.values() for f in m[budget.YARDSTICK].values() for n in f})
    body = []
    for name, r in RECIPES.items():
        if not r.is_exact:
            verdicts = [budget.outside_reasons(r, n) for n in lengths]
            body.append([f"`{name}`", *("no" if reasons else "yes" for reasons in verdicts)])
    return text + markdown(("recipe", *(f"{n} tokens" for n in lengths)), body)


PICTURED = "sm_90a"
_COMPARED = ("sage2pp_8b", "fast_8b")


def _cell(l1: float | None) -> str:
    return "–" if l1 is None else f"{l1:.4f}"


def _by_length(errors: budget.Errors) -> str:
    """Tables of how many times the yardstick's errors each of `_COMPARED` has, by family and length."""
    by_recipe = errors[PICTURED]
    lengths = sorted({n for by_length in by_recipe[budget.YARDSTICK].values() for n in by_length})
    text = ""
    for name in _COMPARED:
        body = []
        for family in FAMILIES:
            yardstick, l1 = by_recipe[budget.YARDSTICK].get(family, {}), by_recipe[name].get(family, {})
            cells = [f"{l1[n] / yardstick[n]:.2f}" if n in yardstick and n in l1 else "–" for n in lengths]
            body.append([family, *cells])
        text += f"\n`{name}`'s L1 over `{budget.YARDSTICK}`'s, like {PICTURED}:\n\n"
        text += markdown(("family", *(f"{n} tokens" for n in lengths)), body)
    return text


def lengths_picture() -> None:
    """docs/images/error-by-length.png: a panel for each family."""
    shown = [
        row for row in read_errors()
        if row["machine"] == PICTURED and all(row[name] == value for name, value in budget.MEASURED_AS.items())
    ]  # fmt: skip
    names = [budget.YARDSTICK, *_COMPARED]
    lengths = sorted({int(row["length"]) for row in shown if row["recipe"] in names})
    columns = 6
    lines = -(-len(FAMILIES) // columns)
    fig, panels = plots.figure(14, 2.2 * lines, nrows=lines, ncols=columns, sharex=True, squeeze=False)
    for axes, family in zip(panels.flat, FAMILIES, strict=False):
        drawn = [row for row in shown if row["family"] == family and row["recipe"] in names]
        for name in names:
            rows = sorted((r for r in drawn if r["recipe"] == name), key=lambda r: int(r["length"]))
            axes.errorbar(
                [int(r["length"]) for r in rows],
                [float(r["l1"]) for r in rows],
                [float(r["standard_error"] or 0) for r in rows],
                marker=".", capsize=2, label=name,
            )  # fmt: skip
        errors = [float(r["l1"]) for r in drawn]
        middle, reach = math.sqrt(min(errors) * max(errors)), math.sqrt(max(errors) / min(errors))
        reach = max(1.3 * reach, 2.0)  # (panels of nearly equal errors look so)
        axes.set(title=family, xscale="log", yscale="log", ylim=(middle / reach, middle * reach))
        axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n / 1000:g}K" for n in lengths])
        axes.tick_params(labelsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(plots.log_ticks())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(FAMILIES) :]:
        axes.axis("off")
    fig.supylabel("relative L1")
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    plots.save(DOCS / "images/error-by-length.png", fig)


def recipes_page() -> None:
    """Writes docs/recipes.md."""
    (DOCS / "recipes.md").write_text(recipes_text(), encoding="utf-8")


def _option_cells(r: Recipe) -> list[str]:
    means = (("Q", r.smooth_q), ("K", r.smooth_k), ("V", r.smooth_v), ("V by tile", r.v_tile_means))
    smoothed = ", ".join(name for name, on in means if on) or "–"
    keys = r.keys_per_promotion
    every = f"{keys} keys" if isinstance(keys, int) else str(keys)
    bits = f"INT{r.qk_bits}" if r.qk_bits else "–"
    if r.smoothquant_alpha is not None:
        smoothed = f"SmoothQuant α={r.smoothquant_alpha:g}"
    return [
        bits,
        str(r.q_granularity) if r.quantizes_qk else "–",
        str(r.k_granularity) if r.quantizes_qk else "–",
        smoothed,
        r.rotation if r.rotation != "none" else "–",
        r.pv_format if r.quantizes_pv else "–",
        f"{r.p_max:g}, {r.v_max:g}" if r.quantizes_pv else "–",
        r.accumulator if r.quantizes_pv else "–",
        every if r.quantizes_pv else "–",
    ]


def ablations_page() -> None:
    """docs/ablations.md: the papers' ablation tables on the synthetic families."""
    length, heads = 2048, 8
    text = "# Ablations\n\n" + NOTE
    text += (
        f"Relative L1 against exact attention (float64), 1 × {heads} heads × {length} × 128, emulated like sm_89. "
        f"`lowbit evaluate --family channels --table NAME --length {length} --heads {heads}` prints the same. The "
        "papers' figures come from real CogVideoX tensors, so the orders can be compared and the numbers cannot.\n"
    )
    results: dict[tuple[str, str, str], float] = {}
    for family in track(CHANNEL_FAMILIES, "ablations"):
        q, k, v = make(family, heads=heads, length=length)
        exact = attention(q.double(), k.double(), v.double(), recipe="exact")
        for name, table in ABLATIONS.items():
            if name not in _OWN_PAGES:
                for label, r in table.recipes().items():
                    results[name, label, family] = compare(exact, attention(q, k, v, recipe=r)).l1
    for name, table in ABLATIONS.items():
        if name not in _OWN_PAGES:
            rows = [[label, *(f"{results[name, label, f]:.4f}" for f in CHANNEL_FAMILIES)] for label in table.rows]
            text += f"\n## {table.title} (`{name}`)\n\n" + markdown(("", *CHANNEL_FAMILIES), rows)
    (DOCS / "ablations.md").write_text(text, encoding="utf-8")


_APART = 64
"""Of so many tokens one, the most outlying, is kept apart."""


def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: Recipe) -> torch.Tensor:
    """Attention whose outlying tokens of K and V are exact and whose others run ``r``, joined by their log-sum-exps."""
    batch, heads, length, _ = k.shape
    sizes = [(x - x.mean(dim=2, keepdim=True)).abs().amax(dim=-1) for x in (k, v)]
    outlying = torch.stack([s / s.median(dim=2, keepdim=True).values for s in sizes]).amax(dim=0)
    order = outlying.argsort(dim=2, descending=True)
    count = length // _APART
    first, rest = (part.sort(dim=2).values[..., None] for part in (order[..., :count], order[..., count:]))

    def some(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return x.gather(2, tokens.expand(batch, heads, tokens.shape[2], x.shape[3]))

    out, lse = exact_attention(q, some(k, first), some(v, first), sm_scale=q.shape[3] ** -0.5)
    quantized = emulate(q, some(k, rest), some(v, rest), r, sm_scale=q.shape[3] ** -0.5)
    share = torch.sigmoid(lse - quantized.lse)[..., None]
    return out * share + quantized.out * (1 - share)


def remedies_page() -> None:
    """docs/remedies.md: what helps layers that stay bad, on synthetic families and MiniLM's layers."""
    table = ABLATIONS["remedies"]
    methods: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
        label: partial(attention, recipe=r) for label, r in table.recipes().items()
    }
    for bits, name in ((4, "sage2_4b"), (8, "sage2_8b")):
        methods[f"{bits} bits, 1 token in {_APART} of K and V apart"] = partial(apart, r=RECIPES[name])
    methods = {label: methods[label] for label in sorted(methods, key=lambda label: label[0])}
    inputs = {family: make(family, heads=4, length=2048) for family in CHANNEL_FAMILIES}
    inputs |= {f"MiniLM {n}": qkv for n, qkv in enumerate(_minilm_tensors())}
    errors: dict[tuple[str, str], float] = {}
    for name, (q, k, v) in track(inputs.items(), "remedies"):
        exact = attention(q.double(), k.double(), v.double(), recipe="exact")
        for label, method in methods.items():
            errors[label, name] = compare(exact, method(q, k, v)).l1
    text = "# Remedies for layers that stay bad\n\n" + NOTE
    text += (
        "Relative L1 against exact attention (float64), emulated like sm_89. "
        "`lowbit evaluate --family channels --table remedies --length 2048` prints the first table but its rows with "
        "tokens kept apart, which are no recipe: the outlying tokens are attended to exactly, joined by log-sum-exps.\n"
    )
    groups = (
        ("1 × 4 heads × 2048 × 128, synthetic", CHANNEL_FAMILIES),
        ("MiniLM's layers, a chunk of 512 tokens", [n for n in inputs if n not in CHANNEL_FAMILIES]),
    )
    for title, names in groups:
        rows = [[label, *(f"{errors[label, name]:.4f}" for name in names)] for label in methods]
        text += f"\n## {title}\n\n" + markdown(("", *names), rows)
    (DOCS / "remedies.md").write_text(text, encoding="utf-8")


def _minilm_tensors() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Q, K and V of each layer reading one chunk."""
    found = []

    def remember(
        name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float
    ) -> torch.Tensor:
        found.append((q, k, v))
        return attention(q, k, v, recipe="exact", attn_mask=mask, sm_scale=sm_scale)

    model = MiniLM()
    with model.attention_by(remember):
        model.embed(model.tokenize(passages(1), length=512))
    return found


def costs() -> None:
    """data/sm_90_costs.json: what the benchmarks on Hopper measured."""
    write_json(
        ROOT / "src/lowbit_attention/data/sm_90_costs.json", read_benchmark(ROOT / "benchmarks/results/h200.csv")
    )


def fidelity_page() -> None:
    """docs/fidelity.md: what the faster of the two fidelities leaves out."""
    text = "# The accumulators, and two fidelities of them\n\n" + NOTE
    text += markdown(("model", "where it comes from"), [[f"`{m}`", m.provenance] for m in ACCUMULATOR_MODELS.values()])
    text += (
        "\n"
        "`step` multiplies 32 keys at a time exactly and then truncates or rounds the running sum; `instruction` also "
        "truncates every product where the card aligns it. Relative L1 between the two outputs, and for comparison "
        "the recipe's own L1 (in `step`) against exact attention; one head of 4096 × 64, a query tile of it.\n"
    )
    for machine_name in ("sm_89", "sm_90a"):
        rows = []
        machines = {f: replace(MACHINES[machine_name], fidelity=f) for f in ("step", "instruction")}
        for family in track(list(FAMILIES), f"fidelity {machine_name}"):
            q, k, v = make(family, heads=1, length=4096, head_dim=64)
            cases = [Case(q, k, v, machine, query_rows=64) for machine in machines.values()]
            cells = []
            for name in ("sage2_8b", "sage2pp_8b", "fast_8b", "sage2_v1_4b"):
                step, instruction = (case.emulated(RECIPES[name]) for case in cases)
                cells.append(f"{compare(step, instruction).l1:.5f} ({cases[0].metrics(step).l1:.4f})")
            rows.append([family, *cells])
        headings = ("family", "`sage2_8b`", "`sage2pp_8b`", "`fast_8b`", "`sage2_v1_4b`")
        text += f"\nLike {MACHINES[machine_name]}:\n\n" + markdown(headings, rows)
    (DOCS / "fidelity.md").write_text(text, encoding="utf-8")


def hopper_costs() -> None:
    """data/hopper_costs.json: how ``auto`` predicts times of whole calls on Hopper."""
    write_json(ROOT / "src/lowbit_attention/data/hopper_costs.json", fit_costs.costs_json())


_SPEEDS_COMMIT = "e649fa9"
_SPEEDS = (
    "d128 1K", "d128 2K", "d128 8K", "1x32x32768x128", "d128 8K causal", "d64 8K", "Flux", "SD3.5-L", "CogVideoX-2B",
    "Wan 1.3B 480p", "Wan cross", "Mochi", "Wan 14B 720p", "HunyuanVideo 720p", "Llama-3.1-8B 8K", "Llama-3.1-8B 32K",
    "1x8x512x64", "ViT",
)  # fmt: skip
"""Shapes of benchmarks/results/h200.csv that docs/results/hopper.md shows, and the commit whose rows they are."""
_SHOWN = {"1x32x32768x128": "d128 32K"}


def speeds_text() -> str:
    """The speed table of docs/results/hopper.md."""
    with (ROOT / "benchmarks/results/h200.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["commit"] == _SPEEDS_COMMIT]
    found = {(row["shape"], row["provider"], row["part"]): row for row in reversed(rows)}  # (measured twice: the first)
    body = []
    for shape in _SPEEDS:
        cudnn = found[shape, "torch_cudnn", "whole"]
        whole, kernel = (found[shape, "ours:fast_8b", part] for part in ("whole", "kernel"))
        sage, fp8 = found[shape, "ours:sage2_8b", "whole"], found[shape, "cudnn_fp8", "kernel"]
        heads = cudnn["q_heads"] if cudnn["q_heads"] == cudnn["kv_heads"] else f"{cudnn['q_heads']}/{cudnn['kv_heads']}"
        length = cudnn["q_len"] if cudnn["q_len"] == cudnn["kv_len"] else f"{cudnn['q_len']}, {cudnn['kv_len']}"
        times = [float(row["median_us"]) for row in (cudnn, whole)]
        digits = 1 if times[0] < 100 else 0
        ratios = [f"{float(row['ratio_to_cudnn']):.2f}" for row in (whole, kernel, sage, fp8)]
        body.append([
            f"{_SHOWN.get(shape, shape)}: {cudnn['batch']} × {heads} × {length} × {cudnn['head_dim']}",
            *(f"{time:.{digits}f}" for time in times),
            f"**{ratios[0]}**", f"{float(kernel['tops']):.0f}", *ratios[1:],
        ])  # fmt: skip
    headings = (
        "shape", "cuDNN bf16, µs", "`fast_8b` whole call, µs", "×cuDNN", "kernel alone, TOPS", "×cuDNN",
        "`sage2_8b` whole, ×cuDNN", "cuDNN FP8 kernel, ×cuDNN",
    )  # fmt: skip
    return markdown(headings, body)


def speeds_table() -> None:
    """Writes the speed table of docs/results/hopper.md."""
    _replace(DOCS / "results/hopper.md", "speeds", speeds_text())


def between_marks(page: Path, name: str) -> str:
    """What stands between a page's two marks ``<!-- name -->``."""
    return page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def _replace(page: Path, name: str, text: str) -> None:
    whole, old = page.read_text(encoding="utf-8"), between_marks(page, name)
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    page.write_text(whole.replace(begin + old + end, begin + text + end), encoding="utf-8")


def machine_code() -> None:
    """docs/results/mma.md: the main loops' instructions, between its two marks."""
    specs = [
        "sage1",
        "int8_fp16",
        "sage2_8b",
        "sage2pp_8b",
        "sage2pp_4b:smooth_q=false",
        "sage2pp_4b",
        "sage2_4b",
        "rotated_4b",
    ]
    jobs = [
        (recipe(spec), head_dim, arch) for arch in ("sm_89", "sm_120") for head_dim in (128, 64) for spec in specs
    ] + [(recipe(spec), 128, arch) for arch in ("sm_80", "sm_86") for spec in specs[:2]]
    rows = [inspect(*job) for job in track(jobs, "machine code")]
    _replace(DOCS / "results/mma.md", "machine code", markdown_table(rows))


def pictures() -> None:
    """docs/images: why smoothing works, on real tensors, and the demo's errors by layer."""
    model = MiniLM()
    captured: dict[str, tuple[torch.Tensor, ...]] = {}

    def attend(
        name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        captured[name] = (q, k, v)
        return attention(q, k, v, recipe="exact", attn_mask=mask, sm_scale=scale)

    with model.attention_by(attend):
        model.embed(model.tokenize(passages(1), length=study.CHUNK_TOKENS))
    _smoothing_picture(captured)
    chosen = [recipe(name) for name in DEFAULT_RECIPES]
    result = study.run(model, chosen, None, lambda what: None)
    layers = [f"layer {n}" for n in range(model.layers)]
    series = {r.name: [m.l1 for m in result.of("chunks", r.name)] for r in chosen}
    title = "MiniLM-L6: attention output against exact attention"
    plots.grouped_bars(DOCS / "images/minilm.png", layers, series, title, "relative L1")


def grid_picture() -> None:
    """docs/images/grid.png: the offset of a mean taken off a bfloat16 V."""
    draw_grid(DOCS / "images/grid.png")


def _smoothing_picture(captured: dict[str, tuple[torch.Tensor, ...]]) -> None:
    """The head whose keys lose most magnitude by smoothing: its keys, and its logits exact against INT4."""
    name, head = max(
        ((name, head) for name, (_, k, _) in captured.items() for head in range(k.shape[1])),
        key=lambda at: _shrinkage(captured[at[0]][1][0, at[1]]),
    )
    q, k, v = (t[:, head : head + 1].float() for t in captured[name])
    exact = _centred((q @ k.transpose(-1, -2))[0, 0])
    fig, axes = plots.figure(11, 6.4, nrows=2, ncols=2, width_ratios=[2, 1])
    largest = float(k.abs().max())
    for row, (spec, label, x) in enumerate(
        (
            ("sage2_4b:smooth_q=false,smooth_k=false", "K", k),
            ("sage2_4b", "K − its mean over the tokens", k - k.mean(dim=2, keepdim=True)),
        )
    ):
        image = x[0, 0].T.numpy()
        picture = axes[row][0].imshow(image, aspect="auto", cmap="RdBu", vmin=-largest, vmax=largest)
        axes[row][0].set(title=f"{label} (mean of tokens' largest: {float(x.abs().amax(-1).mean()):.1f})")
        axes[row][0].set(xlabel="token", ylabel="channel")
        rounded = _centred(_int4_logits(q, k, v, recipe(spec)))
        error = float((rounded - exact).abs().sum() / exact.abs().sum())
        axes[row][1].plot(exact.flatten()[::97], rounded.flatten()[::97], ".", markersize=2)
        axes[row][1].axline((0, 0), slope=1, color="black", linewidth=0.8)
        axes[row][1].set(title=f"{'smoothed' if row else 'not smoothed'}: INT4 error {100 * error:.0f} %")
        axes[row][1].set(xlabel="exact (row mean taken out)", ylabel="by INT4")
    fig.colorbar(picture, ax=[axes[0][0], axes[1][0]], shrink=0.8)
    fig.suptitle(f"MiniLM-L6, {name}, head {head}, reading 512 tokens of English")
    plots.save(DOCS / "images/smoothing.png", fig)


def _shrinkage(k: torch.Tensor) -> float:
    return float(k.abs().amax(dim=-1).mean() / (k - k.mean(dim=0)).abs().amax(dim=-1).mean())


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)  # softmax does not see a row's mean


def _int4_logits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: Recipe) -> torch.Tensor:
    """Q·Kᵀ of one head as the recipe's integers give it."""
    geometry = DEFAULT_MACHINE.geometry
    p = pack(q, k, v, r, geometry, None)
    logits = (p.q[0, 0] * p.q_scale[0, 0][p.q_group, None]) @ (p.k[0, 0] * p.k_scale[0, 0][p.k_group, None]).T
    if p.q_mean is not None and p.k_smooth is not None:
        delta = p.q_mean[0, 0] @ p.k_smooth[0, 0].T
        logits = logits + delta.repeat_interleave(geometry.b_q, dim=0)[: len(logits)]
    return logits


PARTS: dict[str, Callable[[], None]] = {
    "budget": error_budget,
    "recipes": recipes_page,
    "lengths": lengths_picture,
    "ablations": ablations_page,
    "fidelity": fidelity_page,
    "remedies": remedies_page,
    "costs": costs,
    "machine_code": machine_code,
    "hopper_costs": hopper_costs,
    "speeds_table": speeds_table,
    "pictures": pictures,
    "grid_picture": grid_picture,
}


def main() -> None:
    """Regenerate all, or what ``--only`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part, repeatable")
    for name in parser.parse_args().only or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
