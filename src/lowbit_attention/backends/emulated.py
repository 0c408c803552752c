"""A named recipe that is emulated on a GPU though nobody asked for an emulation: one warning says why.

The emulation takes hundreds of times a kernel's time, and nothing else would tell the caller.
"""

from __future__ import annotations

import sys
import threading
import warnings
from types import FrameType

from ..call.memo import Memo
from ..call.request import Request
from ..errors import EmulationWarning

Reasons = dict[str, tuple[str, ...]]
"""Why each kernel cannot, by its name."""

REFUSED = "on_emulation='error' refuses it (like= asks for an emulation)"

_said: Memo[bool] = Memo()
_lock = threading.Lock()


def warn(request: Request, reasons: Reasons) -> None:
    """Say that ``request`` is emulated, once for its recipe and these reasons."""
    key = str(request.recipe), *reasons.items()
    with _lock:
        if _said.get(key):
            return
        _said.put(key, True)
    lines = [
        f"recipe {request.recipe} is emulated, far slower than a kernel, as no kernel can run the call ({request}):"
    ]
    lines += [f"  {name}: {reason}" for name, why in reasons.items() for reason in why]
    lines.append(
        "recipe='auto' runs such calls by exact attention, or by a kernel of another recipe; on_emulation='error' "
        "refuses them, and 'allow' says nothing"
    )
    try:
        warnings.warn("\n".join(lines), EmulationWarning, stacklevel=_level_of_the_caller())
    except EmulationWarning:  # (a filter makes it an error, for every such call)
        with _lock:
            _said.put(key, False)
        raise


def _level_of_the_caller() -> int:
    """The ``stacklevel``, in the function that calls this, of the first frame that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_CALLER:
        frame, level = frame.f_back, level + 1
    return level


_NOT_THE_CALLER = (__name__.partition(".")[0], "torch")
