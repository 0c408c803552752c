"""The command line in this process: what it printed, and how it ended."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_attention import cli


@dataclass(frozen=True)
class Ran:
    """As typer's test result has it, and the two streams."""

    exit_code: int
    out: str
    err: str
    exception: BaseException | None = None

    @property
    def output(self) -> str:
        return self.out + self.err


def lowbit(*arguments: object) -> Ran:
    """``lowbit`` with these arguments; an error that escapes is in ``exception``."""
    out, err = io.StringIO(), io.StringIO()
    escaped: BaseException | None = None
    code: Any = None
    path, loaded = list(sys.path), set(sys.modules)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            escaped = error
    sys.path[:] = path  # (a subject's folder is put there, and its module imported)
    for name in set(sys.modules) - loaded:
        if name.startswith("their_"):
            del sys.modules[name]
    return Ran(code, out.getvalue(), err.getvalue(), escaped)


def one_line(code: int, *words: str, silent: bool = True) -> Callable[[Callable[[], Ran]], None]:
    """It ends with this code and one line on stderr that holds all the words; nothing else, if ``silent``."""

    def check(run: Callable[[], Ran]) -> None:
        found = run()
        assert found.exception is None, f"a traceback: {found.exception!r}"
        assert found.exit_code == code, f"exit code {found.exit_code}, not {code}: {found.output}"
        assert found.err.count("\n") == 1, f"not one line: {found.err!r}"
        missing = [word for word in words if word not in found.err]
        assert not missing, f"{found.err!r} does not say {missing}"
        assert not (silent and found.out), f"printed {found.out!r}"

    return check


def shows(*words: str, hides: tuple[str, ...] = ("\x1b", "\x07", "\x9b")) -> Callable[[Callable[[], Ran]], None]:
    """It succeeds, shows all the words, and sends no control character to the console."""

    def check(run: Callable[[], Ran]) -> None:
        found = run()
        assert found.exception is None, f"a traceback: {found.exception!r}"
        assert found.exit_code == 0, f"exit code {found.exit_code}: {found.output}"
        output = "".join(found.output.split())  # (a table folds long names)
        missing = [word for word in words if "".join(word.split()) not in output]
        assert not missing, f"{found.output!r} does not show {missing}"
        assert not [c for c in hides if c in found.output], f"control characters in {found.output!r}"

    return check


def written(folder: Path, name: str, text: str | bytes) -> Path:
    """A file with this in it."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path
