"""The rooms of the house: no circle among files, and no import that runs back up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import lowbit_attention

PACKAGE = Path(lowbit_attention.__file__).parent
NAME = "lowbit_attention"

ROOMS = (
    ("_version", "env", "errors"),
    ("output",),
    ("recipes",),
    ("call",),
    ("reference",),
    ("backends.cuda.jit",),
    ("backends",),
    ("ops",),
    ("api",),
    ("functional", "parallel"),
    ("integrations",),
    ("compat",),
    ("evaluation",),
    ("bench",),
    ("demo",),
    ("adaptive",),
    ("integrations.comfyui",),
    ("integrations.diffusers",),
    ("integrations.transformers",),
    ("cli", "__main__"),
    ("",),
)
"""From the ground up, the package's own doors ("" is `lowbit_attention` itself) among them; a room may import from the
rooms before it and from itself. docs/architecture.md draws them."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


@lru_cache(maxsize=1)
def files() -> dict[str, Path]:
    """Every module of the package, by its name without the package's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and module of each import of ours, those inside functions and for type checkers too."""
    package = [part for part in module.split(".") if part]
    if not is_package:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    yield node.lineno, alias.name[len(NAME) + 1 :]
        elif isinstance(node, ast.ImportFrom):
            whole = (node.module or "").split(".")
            if node.level:
                base = package[: len(package) - (node.level - 1)] + ([node.module] if node.module else [])
            elif whole[0] == NAME:
                base = whole[1:]
            else:
                continue
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield node.lineno, full if full in known else ".".join(base)


@lru_cache(maxsize=1)
def graph() -> dict[str, list[tuple[int, str]]]:
    """What each module imports of ours, with the lines. (The root's are for type checkers: it is lazy.)"""
    known = frozenset(files())
    return {
        module: sorted(set(imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", known)))
        for module, path in files().items()
    }


def room(module: str) -> str:
    """The innermost room of ``ROOMS`` that a module lies in."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        if (name := ".".join(parts[:count])) in LEVEL:
            return name
    pytest.fail(f"{module} lies in no room of ROOMS")


def circles(of: dict[str, list[str]]) -> list[list[str]]:
    """Every set of modules that reach each other, by depth-first search (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in of[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1 or node in of[node]:
                found.append(sorted(members))

    for node in of:
        if node not in index:
            visit(node)
    return found


def test_no_room_calls_back_up() -> None:
    wrong = [
        f"{files()[module].relative_to(PACKAGE)}:{line} imports {other or NAME}, which lies above it"
        for module, found in graph().items()
        for line, other in found
        if LEVEL[room(other)] > LEVEL[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    assert not circles({module: [other for _, other in found] for module, found in graph().items()})


def test_every_room_is_there() -> None:
    assert {room(module) for module in files()} == set(LEVEL)


def test_the_page_of_the_architecture_has_these_rooms() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.split("| room | what is in it |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert [tuple("" if name == NAME else name for name in row) for row in rows] == list(ROOMS)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"]}, [["a", "b"]]),
        ({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["d"]}, [["b", "c"], ["d"]]),
    ],
)
def test_circles_are_found(edges: dict[str, list[str]], expected: list[list[str]]) -> None:
    assert circles(edges) == expected


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from ..api import attention", "cli.bench", "api"),
        ("def f():\n    from .. import ops", "cli.bench", "ops"),
        ("if TYPE_CHECKING:\n    from ..cli.bench import f", "call.checks", "cli.bench"),
        ("import lowbit_attention.cli.bench", "call.checks", "cli.bench"),
        ("from lowbit_attention import __version__", "call.checks", ""),
    ],
)
def test_imports_are_found(source: str, module: str, expected: str) -> None:
    known = frozenset({"api", "ops", "cli.bench", ""})
    assert [other for _, other in imports(source, module, False, known)] == [expected]
