"""The matrix of models in docs/diffusers.md: every class built tiny, run natively and on the backend, and counted.

``python tools/diffusers_matrix.py`` writes it; tests/cpu/integrations/with_diffusers/test_models.py holds it against
the run of the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lowbit_attention.integrations.diffusers import register

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/cpu/integrations/with_diffusers"
PAGE = ROOT / "docs/diffusers.md"
BEGIN, END = "<!-- models -->\n", "<!-- /models -->"


def text(rows: Sequence[Any]) -> str:
    """The table of what `reach.reached` found for each class."""
    lines = [
        "| class | calls | dispatched | by itself | reached | masks in them |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.case.id.lower()):
        calls, dispatched = row.counted.calls, row.counted.dispatched
        own = calls - dispatched
        every = "all" if row.ran == row.arrived == calls else f"{row.ran} of {calls}"
        reached = f"it {row.case.refuses}" if row.refused else every
        name = f"`{row.case.name}`" + (f" ({row.case.also})" if row.case.also else "")
        masks = "yes" if row.case.masked else ""
        lines.append(f"| {name} | {calls} | {dispatched or ''} | {own or ''} | {reached} | {masks} |")
    return "\n".join(lines) + "\n"


def on_the_page() -> str:
    """What stands between the page's marks."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Run every class, and write the table."""
    sys.path.insert(0, str(TESTS))
    reach, tiny_models = import_module("reach"), import_module("tiny_models")
    report = register("int8_fp16")
    rows = [reach.reached(case, report, "lowbit") for case in tiny_models.CASES]
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(BEGIN + on_the_page() + END, BEGIN + text(rows) + END), encoding="utf-8")


if __name__ == "__main__":
    main()
