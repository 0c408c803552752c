"""Text for people, on any console: nothing in it is markup, moves the cursor, or cannot be encoded.

Names of files, tensors and modules, and messages of other programs, come from outside. They are shown as they are:
``[cuda13]`` is no markup, an escape sequence is seen and not obeyed, and a console that has no ``×`` shows ``x``.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # (rich is imported when something is shown: most processes show nothing)
    from rich.console import Console, RenderableType
    from rich.text import Text

_WIDTH = 120
"""Columns of what `rendered` makes, which may go to a file: wide enough for a sentence in a table's last column."""


def _box_lines() -> dict[str, str]:
    """Unicode's box drawing (U+2500 to U+257F) in ASCII: lines, and ``+`` where they meet."""
    table = dict.fromkeys(map(chr, range(0x2500, 0x2580)), "+")
    table |= dict.fromkeys("─━┄┅┈┉╌╍═╴╶╸╺╼╾", "-")
    return table | dict.fromkeys("│┃┆┇┊┋╎╏║╵╷╹╻╽╿", "|")


_PLAIN = str.maketrans(
    _box_lines()
    | {"×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "‑": "-", "…": "...", "≤": "<=", "≥": ">=", "≈": "~"}
    | {"→": "->", "±": "+-", "²": "^2", "³": "^3", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*", "\xa0": " "}
)
"""What to show where the console's encoding has no such character; every other one shows its number."""


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr), whatever they are when something is printed, that no text can make fail.

    Markup is read in what is printed: pass text from outside through `plain`.
    """
    from rich.console import Console

    return Console(file=cast("IO[str]", _Stream(stderr)), emoji=False)


def rendered(renderable: RenderableType, width: int = _WIDTH) -> str:
    """What a table or other renderable looks like as text without colours, in characters that stdout can take."""
    from rich.console import Console

    file = _Buffer(_encoding(sys.stdout))
    Console(file=file, width=width, color_system=None, force_terminal=False, force_jupyter=False, emoji=False).print(
        renderable
    )
    return fitting(file.getvalue().rstrip("\n"))


def plain(text: object, lines: bool = False) -> str:
    """Text from outside for a place where markup is read: shown as it is, unprintable characters as escapes.

    ``lines``: line ends stay what they are.

    >>> plain("x[/red].q and \\x1b[2J")
    'x\\\\[/red].q and \\\\x1b[2J'
    """
    from rich.markup import escape

    shown = visible(text, lines)
    head = shown.rstrip("\\")
    # backslashes at the end would escape what follows; before a tag each pair stands for one, so a tag follows
    ending = 2 * shown[len(head) :]
    return escape(head) + (f"{ending}[bold][/bold]" if ending else "")


def as_text(text: object, lines: bool = False) -> Text:
    """As `plain`, for a place that takes a renderable: a table's cell, say."""
    from rich.text import Text

    return Text(visible(text, lines))


def visible(text: object, lines: bool = False) -> str:
    """The text with control characters, escape sequences and lone surrogates written as Python would.

    ``lines``: line ends stay what they are.

    >>> visible("a\\x1b[31m\\u202eb")
    'a\\\\x1b[31m\\\\u202eb'
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in str(text)
    )


def fitting(text: str, encoding: str | None = None) -> str:
    """The text in characters that the encoding (stdout's by default) can take.

    >>> fitting("2 × 3 ≤ 7", "cp1251")
    '2 x 3 <= 7'
    """
    codec = encoding or _encoding(sys.stdout)
    with contextlib.suppress(UnicodeEncodeError, LookupError):
        text.encode(codec)
        return text
    try:
        return "".join(_fitting_character(c, codec) for c in text)
    except LookupError:  # no such encoding in this Python
        return fitting(text, "ascii")


def _fitting_character(character: str, codec: str) -> str:
    try:
        character.encode(codec)
        return character
    except UnicodeEncodeError:
        known = character.translate(_PLAIN)
        return known if known.isascii() else character.encode("ascii", "backslashreplace").decode()


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


class _Buffer(io.StringIO):
    """A file in memory that says an encoding, which rich chooses its box characters by."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


class _Stream:
    """sys.stdout or sys.stderr as it is at each use; what is written fits its encoding."""

    def __init__(self, stderr: bool) -> None:
        self._stderr = stderr

    @property
    def _now(self) -> Any:
        stream: Any = sys.stderr if self._stderr else sys.stdout
        return getattr(stream, "rich_proxied_file", stream)  # (a progress bar stands in for it meanwhile)

    @property
    def encoding(self) -> str:
        return _encoding(self._now)

    def write(self, text: str) -> int:
        if self._now is not None:  # (programs without a console on Windows have neither stream)
            self._now.write(fitting(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        if self._now is not None:
            self._now.flush()

    def isatty(self) -> bool:
        return self._now is not None and bool(self._now.isatty())

    def fileno(self) -> int:
        if self._now is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._now.fileno())
