"""Tiny random configurations of diffusers' transformer classes: every class that can be built without more packages.

docs/diffusers.md has the matrix that comes of them (tools/diffusers_matrix.py).
"""

import tiny_first
import tiny_flux
import tiny_videos
from tiny import Tiny

CASES: list[Tiny] = [*tiny_flux.CASES, *tiny_first.CASES, *tiny_videos.CASES]

BY_NAME = {case.id: case for case in CASES}
