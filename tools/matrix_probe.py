"""What `matrix` runs inside a fresh environment: every door of the installed package once, one JSON object a step.

Nothing but the standard library, torch and the package, so that a hidden dependency shows.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

CALLS = 50
LIMITS = {None: 0.0, 8: 0.06, 4: 0.3}
"""Relative L1 against exact by the bits of Q and K: one and a half times what the worst recipe gives on such inputs."""
NUMPY = "Failed to initialize NumPy"
"""What torch itself warns of where there is no numpy, up to some version."""
SUBJECT = """
import torch
from torch import nn
from lowbit_attention.adaptive import Subject

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def make():
    torch.manual_seed(0)
    model = Tiny().eval()
    return Subject("tiny", model, [torch.randn(1, 130, 32)], model)
"""


def python(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Run this interpreter anew; its output, or an error that ends with it."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=300
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(arguments)[:60]} gave {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    return done.stdout


def imports() -> str:
    """The root alone (no torch comes with it), with every warning an error; then each public name, likewise."""
    root = "import sys, lowbit_attention; assert 'torch' not in sys.modules"
    python("-W", "error", "-c", root)
    names = "from lowbit_attention import *"
    try:
        python("-W", "error", "-c", "import torch")
    except AssertionError as error:
        if NUMPY not in str(error):
            raise
        python("-W", "error", "-W", f"ignore:{NUMPY}", "-c", names)
        return "torch itself warns of the missing numpy"
    python("-W", "error", "-c", names)
    return ""


def submodules() -> str:
    """A function keeps its name where a submodule has it, too."""
    python(
        "-c",
        "import lowbit_attention.recipe, lowbit_attention.sdpa\n"
        "from lowbit_attention import recipe, sdpa\n"
        "assert callable(recipe) and callable(sdpa)",
    )
    return ""


def alias() -> str:
    """The alias comes without torch, and brings it when it is used."""
    python(
        "-c",
        "import sys\n"
        "from lowbit_attention.compat import install_as_sageattention\n"
        "install_as_sageattention()\n"
        "assert 'torch' not in sys.modules\n"
        "from sageattention import sageattn\n"
        "import torch\n"
        "q = torch.randn(1, 2, 9, 16)\n"
        "assert sageattn(q, q, q).shape == q.shape",
    )
    return ""


HELPS = """
import sys
from lowbit_attention import cli
for command in sys.argv[1:]:
    try:
        cli.main([command, "--help"])
    except SystemExit as end:
        assert not end.code, (command, end.code)
try:
    cli.main(["--version"])
except SystemExit as end:
    assert not end.code
cli.main(["nope"])
"""


def helps() -> str:
    """``--help`` of every command, and one line for a command that there is not (in one process)."""
    text = lowbit("--help")
    commands = ("demo", "evaluate", "calibrate", "recipes", "doctor", "bench", "warmup", "inspect")
    for command in commands:
        assert command in text, f"--help does not name {command}"
    done = subprocess.run([sys.executable, "-c", HELPS, *commands], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, f"lowbit nope gave {done.returncode}: {done.stderr[-600:]}"
    assert done.stdout.count("Usage") == len(commands), done.stdout[-600:]
    assert done.stdout.rstrip().splitlines()[-1].startswith("lowbit-attention ")
    assert "No such command" in done.stderr
    return f"{len(commands)} commands"


def doctor() -> str:
    """``lowbit doctor``, for people and as JSON."""
    assert "torch" in lowbit("doctor")
    found = json.loads(lowbit("doctor", "--json"))
    return "; ".join(found["problems"])


def evaluate() -> str:
    """``lowbit evaluate`` on a synthetic family, with JSON written."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        lowbit("evaluate", "--family", "normal", "--length", "64", "-r", "sage2_8b", "--json", str(file))
        json.loads(file.read_text())
    return ""


def calibrate() -> str:
    """``lowbit calibrate`` of a small module; its policy loads and applies."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny_subject.py").write_text(SUBJECT)
        lowbit("calibrate", "-s", "tiny_subject:make", "-o", "out", "-r", "sage2_8b", "-r", "sage2_4b", cwd=folder)
        code = (
            "import tiny_subject, torch\n"
            "from lowbit_attention.adaptive import Policy\n"
            "subject = tiny_subject.make()\n"
            "policy = Policy.load('out/policy.json')\n"
            "with torch.no_grad(), policy.applied(subject.model): subject.run(subject.prompts[0])\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=300)
    return ""


def calls() -> str:
    """`CALLS` calls over recipes, masks and layouts, each against exact."""
    import torch

    from lowbit_attention import RECIPES, attention

    torch.manual_seed(0)
    seen = torch.rand(2, 1, 70, 70) > 0.3
    seen[..., 0] = True
    masks: tuple[dict[str, Any], ...] = (
        {},
        {"is_causal": True},
        {"attn_mask": seen},
        {"attn_mask": torch.randn(1, 4, 1, 70)},
    )
    worst = dict.fromkeys(LIMITS, 0.0)
    made = 0
    for round_, name in itertools.islice(_over(sorted(RECIPES)), CALLS):
        options = masks[(made + round_) % len(masks)]
        layout: Literal["HND", "NHD"] = "NHD" if round_ % 2 else "HND"
        dtype = (torch.float32, torch.bfloat16, torch.float16)[made % 3]
        q, k, v = (torch.randn(2, heads, 70, 32) for heads in (4, 2, 2))
        if layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k, v = (x.to(dtype) for x in (q, k, v))
        exact = attention(q, k, v, recipe="exact", layout=layout, **options).float()
        out = attention(q, k, v, recipe=name, layout=layout, **options)
        assert out.dtype == dtype, f"{name} gave {out.dtype}"
        error = ((out.float() - exact).abs().sum() / exact.abs().sum()).item()
        bits = RECIPES[name].qk_bits
        assert error <= LIMITS[bits], f"{name}, {layout}, {dtype}, {list(options)}: {error:.3f}"
        worst[bits] = max(worst[bits], error)
        made += 1
    return f"{made}, relative L1 at most {worst[8]:.3f} at 8 bits, {worst[4]:.3f} at 4"


def _over(names: list[str]) -> Iterator[tuple[int, str]]:
    for round_ in itertools.count():
        for name in names:
            yield round_, name


def reroutes() -> str:
    """`sdpa_enabled` reroutes torch's function, counts, and leaves nothing behind."""
    import torch
    from torch.nn import functional

    from lowbit_attention import sdpa_enabled

    original = functional.scaled_dot_product_attention
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    with torch.no_grad(), sdpa_enabled(layer, recipe="sage2_8b") as report:
        layer(torch.randn(1, 40, 32))
    assert report.ran == 1, str(report)
    assert functional.scaled_dot_product_attention is original
    return ""


def compiles() -> str:
    """`torch.compile` of a call: no graph breaks, eager's numbers."""
    import torch

    from lowbit_attention import attention

    q = torch.randn(1, 2, 48, 32)

    def call(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, recipe="sage2_8b") * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), call(q))
    return ""


def pickles() -> str:
    """Recipes and errors survive pickling."""
    from lowbit_attention import RECIPES, InvalidArgumentError

    for recipe in RECIPES.values():
        assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert str(pickle.loads(pickle.dumps(InvalidArgumentError("q is wrong")))) == "q is wrong"
    return ""


def kernel() -> str:
    """NVRTC compiles one kernel, where one of the CUDA extras is installed."""
    try:
        metadata.version("cuda-core")
    except metadata.PackageNotFoundError:
        return "no CUDA extra"
    with tempfile.TemporaryDirectory() as folder:
        text = lowbit(
            "warmup",
            "--arch",
            "sm_90a",
            "--recipe",
            "pack sm_90a HEAD_DIM=64 INPUT_DTYPE=0",
            env={"LOWBIT_CACHE_DIR": folder},
        )
    return " ".join(text.split()).partition(",")[0]


def lowbit(*arguments: str, code: int = 0, cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run the installed command; its output."""
    command = Path(sys.executable).with_name("lowbit")
    done = subprocess.run(
        [command, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **(env or {})},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == code, f"lowbit {' '.join(arguments)} gave {done.returncode}: {output[-600:]}"
    assert "Traceback" not in output, output[-600:]
    return done.stdout if code == 0 else output


STEPS: tuple[Callable[[], str], ...] = (
    imports, submodules, alias, helps, doctor, calls, reroutes, compiles, pickles, evaluate, calibrate, kernel,
)  # fmt: skip


def main() -> None:
    """Run every step, or those named as arguments; a failed one does not keep the others."""
    for step in [step for step in STEPS if step.__name__ in sys.argv[1:] or not sys.argv[1:]]:
        began, out = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                found, passed = step(), True
        except Exception:
            found, passed = traceback.format_exc(limit=-3)[-1500:], False
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({"step": step.__name__, "passed": passed, "seconds": seconds, "note": found}), flush=True)


if __name__ == "__main__":
    main()
