"""The program of a process that compiles for another (`fresh`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ....errors import KernelUnavailableError
from . import entry
from .compiled import Options
from .compiler import cache_key, compile_source
from .fresh import ANSWER, ERROR
from .source import Source


def main() -> None:
    """A job on stdin, an entry or an error on stdout."""
    name, text, headers, root, arch, defines = json.loads(sys.stdin.buffer.read())
    source = Source(name, text, tuple((n, t) for n, t in headers), None if root is None else Path(root))
    options = Options(arch, tuple((n, v) for n, v in defines))
    try:
        answer = ANSWER + entry.encode(cache_key(source, options), {}, compile_source(source, options))
    except KernelUnavailableError as error:
        answer = ERROR + json.dumps([error.reason, error.way_out, error.details]).encode()
    sys.stdout.buffer.write(answer)
