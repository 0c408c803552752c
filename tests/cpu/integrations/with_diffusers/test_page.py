"""What docs/diffusers.md shows runs, and so does the example."""

import re
import runpy
from pathlib import Path

from lowbit_attention.recipes.named import RECIPES

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs/diffusers.md").read_text(encoding="utf-8")


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/diffusers.md", "exec"), namespace)
    assert "2 calls of scaled_dot_product_attention, 2 by this library" in capsys.readouterr().out


def test_the_recipes_it_names_are_there():
    named = set(re.findall(r"`lowbit_([a-z0-9_]+)`", PAGE))
    assert len(named) > 3
    assert named <= set(RECIPES)


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples/wan_tiny.py"))
    assert "16 calls of scaled_dot_product_attention, 16 by this library" in capsys.readouterr().out
