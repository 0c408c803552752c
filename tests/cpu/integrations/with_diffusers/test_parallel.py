"""Context parallelism over gloo: Ulysses, ring and both, each against one process (`rank.py`)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rank.py")
CHECKS = {
    "ulysses, this rank's mask",
    "ulysses, this rank's mask of four dimensions",
    "ulysses, the whole mask",
    "refusals",
    "ring of unequal parts",
    "ulysses of unequal parts",
}


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ("ulysses", "ring")), (4, ("both",))])
def test_context_parallelism(ranks, kinds, tmp_path):
    wanted = {f"{kind}{more}" for kind in kinds for more in ("", " with lse", ", 8 bit")}
    if ranks == 2:
        wanted |= CHECKS | {f"{kind}, compiled" for kind in kinds}
    command = [sys.executable, str(SCRIPT)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for text, process in zip(texts, running, strict=True):
        assert process.returncode == 0, text[-4000:]
        assert {line.removeprefix("ok ") for line in text.splitlines() if line.startswith("ok ")} == wanted
