"""Every implementation, in the order they are tried for a named recipe: kernels in front."""

from __future__ import annotations

from .base import Emulation, Implementation, TiledExact, TorchSDPA
from .cuda.hopper import KERNEL
from .cuda.mma import MMA_KERNEL

IMPLEMENTATIONS: list[Implementation] = [KERNEL, MMA_KERNEL, TorchSDPA(), TiledExact(), Emulation()]
