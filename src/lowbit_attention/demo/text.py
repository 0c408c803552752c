"""Real English text that every machine has: the docstrings of Python's standard library."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache

_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "cmd", "codecs", "collections", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "dis",
    "email.message", "enum", "fractions", "functools", "getpass", "gettext", "glob", "gzip", "heapq", "hmac",
    "html.parser", "http.client", "imaplib", "inspect", "io", "ipaddress", "itertools", "json", "linecache",
    "locale", "logging", "lzma", "mailbox", "mimetypes", "multiprocessing.pool", "netrc", "numbers", "operator",
    "os", "pathlib", "pdb", "pickle", "pkgutil", "platform", "pprint", "profile", "queue", "random", "sched",
    "secrets", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "sqlite3", "ssl", "stat",
    "statistics", "string", "subprocess", "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "traceback", "types", "unittest.case", "unittest.mock", "urllib.parse",
    "urllib.request", "uuid", "warnings", "wave", "weakref", "zipfile",
)  # fmt: skip


def _docstrings(module_name: str) -> Iterator[str]:
    """Docstrings of a module, its functions, classes and their methods, in a fixed order."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # a Python built without ssl, say
        return
    seen = set()
    members = [member for _, member in sorted(vars(module).items(), key=lambda item: item[0])]
    for member in [module, *members]:
        inner = sorted(vars(member).items(), key=lambda item: item[0]) if inspect.isclass(member) else []
        for thing in [member, *(value for _, value in inner)]:
            text = getattr(thing, "__doc__", None)
            if isinstance(text, str) and text not in seen and not isinstance(thing, str | int):
                seen.add(text)
                yield inspect.cleandoc(text)


@lru_cache(maxsize=1)
def _all_docstrings() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_docstrings(name)) for name in _MODULES)


def sentences(count: int) -> list[str]:
    """``count`` different sentences, spread over the standard library's modules."""
    found: list[list[str]] = []
    for docs in _all_docstrings():
        here = []
        for text in docs:
            first = re.split(r"(?<=[.])\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
            if re.fullmatch(r"[A-Z][a-z]+ [^<>{}\[\]=_`*|\\]{25,200}\.", first):
                here.append(first)
        found.append(here)
    # the first of every module, then the second of every module, ...; each once
    ranked = (here[rank] for rank in range(max(map(len, found))) for here in found if rank < len(here))
    return list(dict.fromkeys(ranked))[:count]


def passages(count: int) -> list[str]:
    """``count`` long passages, each the prose of several modules (a few thousand words)."""
    groups: list[list[str]] = [[] for _ in range(count)]
    for number, docs in enumerate(_all_docstrings()):
        prose = [p for text in docs for p in text.split("\n\n") if ">>>" not in p and len(p.split()) >= 12]
        groups[number % count].append("\n".join(prose[:12]))
    return ["\n".join(group) for group in groups]
