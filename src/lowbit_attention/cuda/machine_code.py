"""What the compiler made of an instance: its instructions, and whether they are what was meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ..errors import MissingExtraError
from ..jit.compiler import Compiled
from .instances import Instance

_WHEEL = "nvidia-cuda-nvdisasm"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", re.MULTILINE)
_LOSSES = ("(C7508)", "(C7512)", "(C7514)", "serialized")
"""In ptxas remarks that cost the kernel its speed: setmaxnreg ignored, or MMAs serialised, for whichever reason."""


@lru_cache(maxsize=1)
def nvdisasm() -> str:
    """The disassembler: that of the pip package ``nvidia-cuda-nvdisasm``, or one on the PATH.

    Raises:
        MissingExtraError: there is none.
    """
    try:
        for file in metadata.files(_WHEEL) or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return str(file.locate())
    except metadata.PackageNotFoundError:
        pass
    if found := shutil.which("nvdisasm"):
        return found
    raise MissingExtraError("reading machine code", "dev", _WHEEL)


def instructions(cubin: bytes) -> list[str]:
    """Every instruction's name with its modifiers (``FFMA``, ``IGMMA.64x128x32.S8.S8``), in the order of the code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([nvdisasm(), str(path)], capture_output=True, text=True, check=True).stdout
    return _INSTRUCTION.findall(text)


def problems(instance: Instance, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code: spills above the limit, missing MMAs, serialised MMAs."""
    found = []
    for name, used in compiled.resources.items():
        spilled = used.spill_stores + used.spill_loads
        if spilled > instance.spill_limit:
            found.append(f"{name} spills {spilled} bytes (limit {instance.spill_limit})")
    found += [remark for remark in compiled.remarks if any(loss in remark for loss in _LOSSES)]
    if instance.mma:
        present = set(instructions(compiled.cubin))
        found += [f"no {mma} in the machine code" for mma in instance.mma if mma not in present]
        if local := sorted(i for i in present if i.startswith(("LDL", "STL"))):
            found += [f"local memory is used: {', '.join(local)}"] if instance.spill_limit == 0 else []
    return found
