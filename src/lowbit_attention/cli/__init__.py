"""The command ``lowbit``.

Nothing heavy is imported until `main` runs: whoever presses Ctrl-C while torch is imported gets one line, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from .exit_codes import INTERRUPTED


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; wrong input gives one line on stderr and exit code 2, Ctrl-C one line and 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console or file that has no ≤ shows a question mark, and goes on
            stream.reconfigure(errors="replace")
    try:
        from .app import run

        code, message = run(arguments)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except BrokenPipeError:  # the reader (head, say) has seen enough
        _give_up_stdout()
        sys.exit(1)
    if message:
        _tell(message)
    sys.exit(code)


def _tell(message: str) -> None:
    """One line on stderr: what is in it, a file's name say, neither breaks the line nor moves the cursor."""
    from ..output.console import fitting, visible

    text = fitting(f"lowbit: {visible(' '.join(message.split()))}", getattr(sys.stderr, "encoding", None))
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _give_up_stdout() -> None:
    """Write what is still to be flushed at exit to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def __getattr__(name: str) -> Any:
    if name == "app":
        from .app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
