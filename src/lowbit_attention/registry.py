"""Every implementation, in the order they are tried for a named recipe: kernels in front."""

from __future__ import annotations

from .cuda.hopper import KERNEL
from .implementations import Emulation, Implementation, TiledExact, TorchSDPA

IMPLEMENTATIONS: list[Implementation] = [KERNEL, TorchSDPA(), TiledExact(), Emulation()]
