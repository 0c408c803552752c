"""What the compiler made of an instance: its instructions, and whether they are what was meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ....errors import MissingExtraError
from ..instances import Instance
from ..jit.compiled import Compiled

_WHEEL = "nvidia-cuda-nvdisasm"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*);", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_\w+):")
_MMAS = ("IMMA", "QMMA", "HMMA", "IGMMA", "QGMMA")
_LOCAL = ("LDL", "STL")
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


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: how often each instruction stands in it."""

    counts: Counter[str]

    @property
    def mma(self) -> int:
        """Tensor-core instructions."""
        return sum(count for name, count in self.counts.items() if name in _MMAS)

    @property
    def other(self) -> int:
        """All others."""
        return sum(self.counts.values()) - self.mma


def instructions(cubin: bytes) -> list[str]:
    """Every instruction's name with its modifiers (``FFMA``, ``IGMMA.64x128x32.S8.S8``), in the order of the code."""
    return [name for name, _ in _INSTRUCTION.findall(disassemble(cubin))]


def disassemble(cubin: bytes) -> str:
    """``nvdisasm -c`` of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([nvdisasm(), "-c", str(path)], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[Loop]:
    """The loops of a disassembly (`nvdisasm -c`): from a label to a branch back to it."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction[1], instruction[2]))
    out = []
    for at, (name, operands) in enumerate(found):
        target = re.search(r"\.L_\w+", operands)
        if name.startswith("BRA") and target and labels.get(target[0], at + 1) <= at:
            out.append(Loop(Counter(n.split(".")[0] for n, _ in found[labels[target[0]] : at + 1])))
    return out


def problems(instance: Instance, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code.

    Spills above the limit; spills where MMAs are waited for, whatever the limit; missing MMAs; serialised MMAs.
    """
    found = []
    for name, used in compiled.resources.items():
        spilled = used.spill_stores + used.spill_loads
        if spilled > instance.spill_limit:
            found.append(f"{name} spills {spilled} bytes (limit {instance.spill_limit})")
    found += [remark for remark in compiled.remarks if any(loss in remark for loss in _LOSSES)]
    if instance.mma:
        sass = disassemble(compiled.cubin)
        present = {name for name, _ in _INSTRUCTION.findall(sass)}
        found += [f"no {mma} in the machine code" for mma in instance.mma if mma not in present]
        if instance.spills_anywhere:
            return found
        # (what spans the change of roles is no loop, but a branch back from code that is seldom run)
        with_mmas = [loop for loop in loops(sass) if loop.mma and not loop.counts["USETMAXREG"]]
        in_loops = sum(loop.counts[name] for loop in with_mmas for name in _LOCAL)
        if in_loops:
            found.append(f"{in_loops} accesses to local memory in loops with MMAs")
        elif instance.spill_limit == 0 and any(name.split(".")[0] in _LOCAL for name in present):
            found.append("local memory is used")
    return found
