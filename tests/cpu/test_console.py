"""Text from outside on any console: shown as it is, obeyed by nobody, and never in the way."""

import io
import sys

import pytest
from rich.progress import Progress
from rich.table import Table

from lowbit_attention.output.console import as_text, console, fitting, plain, rendered, visible

ENCODINGS = ("utf-8", "cp1252", "cp1251", "cp437", "latin-1", "ascii", "gb18030", "shift_jis")
NASTY = (
    'pip install "lowbit-attention[cuda13]"',
    "a[/red].q",
    "x[/y].json",
    "[bold]/o.json",
    "[link=http://x]y[/link]",
    ":smile: and \\",
    "ends in two \\\\",
    "\\[bold]",
    "[/]",
    "[",
    "[red",
    "×≤…é→ж",
)


def stdout(monkeypatch, encoding):
    """A stdout of that encoding that refuses what it cannot take, as Python's does."""
    bytes_ = io.BytesIO()
    stream = io.TextIOWrapper(bytes_, encoding=encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    return lambda: bytes_.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", NASTY)
def test_text_from_outside_is_shown_as_it_is(monkeypatch, encoding, text):
    shown = stdout(monkeypatch, encoding)
    console().print(f"[red]{plain(text)}[/red]|{plain(text)}|", soft_wrap=True)
    expected = fitting(text, encoding)
    assert shown() == f"{expected}|{expected}|\n"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_and_bars_have_lines_that_the_console_can_take(monkeypatch, encoding):
    shown = stdout(monkeypatch, encoding)
    table = Table("a × ≤ heading")
    for text in NASTY:
        table.add_row(plain(text))
        table.add_row(as_text(text))
    console().print(table)
    with Progress(console=console()) as bar:
        bar.update(bar.add_task("…", total=3), advance=1)
        print("between")  # rich stands in for stdout meanwhile
    print(rendered(table))
    assert shown().count(fitting(NASTY[0], encoding)) == 4
    assert "between" in shown()
    assert encoding != "ascii" or shown().isascii()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]8;;http://x\x07y", "\\x1b]8;;http://x\\x07y"),
        ("a\rb\x00\x9b2J", "a\\rb\\x00\\x9b2J"),
        ("txt.\u202eexe", "txt.\\u202eexe"),
        ("bytes \udcff", "bytes \\udcff"),
        ("two\nlines", "two\\nlines"),
    ],
)
def test_control_characters_are_seen(monkeypatch, text, shown):
    assert visible(text) == shown
    written = stdout(monkeypatch, "utf-8")
    console().print(plain(text), as_text(text), soft_wrap=True)
    assert written() == f"{shown} {shown}\n"


def test_lines_may_stay():
    assert visible("a\nb\x07", lines=True) == "a\nb\\x07"


def test_without_a_console_nothing_is_written(monkeypatch):
    """Programs without one (``pythonw`` on Windows) have no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    console().print("into the void")
    assert rendered("x") == "x"
