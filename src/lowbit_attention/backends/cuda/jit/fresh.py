"""Work of the run-time compiler in a process of its own: a damaged library may end it, and forks cannot disturb it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from . import entry
from .compiled import Compiled, CompileError, Options
from .source import Source

_SECONDS = 300.0
"""The slowest kernel takes ten; beyond this the compiler hangs there, too."""
ANSWER, ERROR = b"\x02kernel\x03", b"\x02error\x03"  # (whatever else is printed lacks these)


def run_fresh(program: str, seconds: float, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a program in a fresh interpreter that sees the same packages, and the current folder.

    Raises:
        subprocess.TimeoutExpired, OSError, ValueError, TypeError: as `subprocess.run`; the last: no interpreter's path.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", program],
        input=given, capture_output=True, timeout=seconds, env=environment, check=False,
    )  # fmt: skip


def compile_elsewhere(key: str, source: Source, options: Options) -> Compiled:
    """`compiler.compile_source` in a process of its own (`child`); ``key``: the source's and options' together.

    Raises:
        CompileError: it fails there, or the process gives no answer.
    """
    root = None if source.root is None else str(source.root)
    job = [source.name, source.text, source.headers, root, options.arch, options.defines]
    program = "from lowbit_attention.backends.cuda.jit.child import main; main()"
    try:
        done = run_fresh(program, _SECONDS, json.dumps(job).encode())
    except (subprocess.SubprocessError, OSError, ValueError, TypeError) as error:
        raise CompileError(f"{source.name} cannot be compiled in another process ({error})") from None
    _, said_error, error_text = done.stdout.partition(ERROR)
    if said_error:
        raise CompileError(*json.loads(error_text))
    compiled = entry.decode(key, done.stdout.partition(ANSWER)[2])
    if compiled is None:
        raise CompileError(
            f"{source.name} cannot be compiled in another process (exit code {done.returncode})",
            "`lowbit doctor` tells whether the compiler works here",
            done.stderr.decode("utf-8", "replace"),
        )
    return compiled
