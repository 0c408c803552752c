"""What the documentation says is what the code does: examples run, tables are current, links lead somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit_attention import attention, cli, ops
from lowbit_attention.backends.cuda import launch
from lowbit_attention.backends.cuda.jit.cache import KernelCache
from lowbit_attention.cli import warmup

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def test_readme_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 2
    namespace = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert 0.03 < float(out.split()[0]) < 0.05  # "about 0.04"
    assert "runs: " in out


def test_the_pytorch_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pytorch.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 6
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/pytorch.md", "exec"), namespace)
    assert "1 calls of scaled_dot_product_attention, 1 by this library" in capsys.readouterr().out


def test_the_transformers_page_runs(capsys):
    pytest.importorskip("transformers", reason="needs the extra transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transformers.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 6
    namespace = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/transformers.md", "exec"), namespace)
    finally:
        namespace["unregister"]()
    assert namespace["by_layer"].calls == 0
    assert "16 calls of scaled_dot_product_attention" in capsys.readouterr().out


def test_the_transformers_page_lists_the_words_that_change_nothing():
    words = pytest.importorskip("lowbit_attention.integrations.transformers.words")
    page = (ROOT / "docs/transformers.md").read_text(encoding="utf-8")
    listed = page.partition("Known to change nothing, and taken: ")[2].partition(".\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == words.HARMLESS


def test_the_signature_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), namespace)
    assert capsys.readouterr().out == "torch.Size([2, 4, 64, 32])\n"
    assert torch.allclose(namespace["out"], attention(*(namespace[n] for n in "qkv")), atol=1e-6)


def test_the_signature_page_has_the_operators_schema():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert " ".join(f"lowbit_attention::{ops.SCHEMA}".split()) in " ".join(page.split())


def test_the_examples_of_the_adaptive_page_run(capsys):
    text = (ROOT / "docs/adaptive.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python runs\n(.*?)```", text, flags=re.S)
    exec(compile(block, "docs/adaptive.md", "exec"), {})
    shares = capsys.readouterr().out
    assert "sage2pp_4b" in shares
    assert "sage2pp_8b" in shares


COMMANDS = re.findall(r"^lowbit ([^#\n]*)", README, flags=re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file({name: torch.randn(1, 2, 64, 32) for name in "qkv"}, "qkv.safetensors")
    small = ["--length", "64", "--heads", "1", "--head-dim", "32"] if "-f" in command else []  # the same, in less time
    if command.startswith("bench"):
        small = ["--device", "cpu", "--shape", "1x1x64x32", "-p", "torch_default"]
    if command.startswith("warmup"):
        monkeypatch.setattr(launch, "cache", lambda: KernelCache(tmp_path))
        monkeypatch.setattr(warmup, "cache", lambda: KernelCache(tmp_path))
        small = ["--arch", "sm_90a", "--recipe", "pack sm_90a HEAD_DIM=64 INPUT_DTYPE=2"]
    if command.startswith("inspect"):
        small = ["--recipe", "sage2pp_8b", "--head-dim", "64"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(command), *small])
    told = capsys.readouterr()
    if command.startswith("tune") and not torch.cuda.is_available():  # (tests/cpu/test_tune.py has the rest)
        assert stop.value.code == 2
        assert "torch finds none here" in told.err
        return
    assert stop.value.code == 0
    assert told.out


def test_there_are_commands_in_the_readme():
    wanted = {"evaluate", "recipes", "doctor", "bench", "tune", "warmup", "calibrate", "inspect"}
    assert {command.split()[0] for command in COMMANDS} == wanted


@pytest.fixture(scope="module")
def tables():
    """tools/make_tables.py."""
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipes_is_current(tables):
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == tables.recipes_text(), "run: make tables"


def test_the_speed_table_is_the_benchmarks(tables):
    assert tables.between_marks(ROOT / "docs/results/hopper.md", "speeds") == tables.speeds_text(), "run: make tables"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/kernels").glob("*.md")), ids=lambda p: p.name)
def test_guides_stay_guides(page):
    """Results go to docs/results, history to docs/notebook."""
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("book", sorted((ROOT / "docs/notebook").iterdir()), ids=lambda p: p.name)
def test_notebooks_list_their_entries(book):
    index = re.findall(r"^\| \[\d{4}\]\(([^)]+)\)", (book / "index.md").read_text(encoding="utf-8"), flags=re.M)
    assert index == sorted(path.name for path in book.glob("[0-9]*.md"))
    for name in index:
        heads = re.findall(r"^\| \*\*(\w+)\*\*", (book / name).read_text(encoding="utf-8"), flags=re.M)
        assert heads == ["Predicted", "Changed", "Measured", "Verdict"], name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
