"""What `matrix` runs inside a fresh environment: every door of the installed package once, one JSON object a step.

Nothing but the standard library, torch and the package, so that a hidden dependency shows; and the examples of the
documents beside this script's folder.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PAGES = (("README.md", "python"), ("docs/pytorch.md", "python"), ("docs/adaptive.md", "python runs"))
"""Whose blocks of which language run as they stand."""
CALLS = 50
LIMIT = 300 * float(os.environ.get("MATRIX_PATIENCE", "1"))
"""Seconds for one process."""
LIMITS = {None: 0.0, 8: 0.06, 4: 0.3}
"""Relative L1 against exact by the bits of Q and K: one and a half times what the worst recipe gives on such inputs."""
NUMPY = "Failed to initialize NumPy"
"""What torch itself warns of where there is no numpy, up to some version."""
FAST_PATH = "aten._transformer_encoder_layer_fwd"
"""What torch 2.5 does not compile, outside of our blocks."""
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
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=LIMIT
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
    """A public name stays a function whatever is imported; what users import by its module is there."""
    python(
        "-c",
        "import lowbit_attention.recipes, lowbit_attention.functional, lowbit_attention.integrations.flash_impl\n"
        "import lowbit_attention.adaptive, lowbit_attention.compat.sageattention\n"
        "from lowbit_attention import merge_state, pack_kv, recipe, sdpa\n"
        "assert all(map(callable, (merge_state, pack_kv, recipe, sdpa)))",
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
    done = subprocess.run([sys.executable, "-c", HELPS, *commands], capture_output=True, text=True, timeout=LIMIT)
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
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=LIMIT)
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


def doors() -> str:
    """The functions that one calls: with and without lengths, torch's signature, a reason for what would run."""
    import torch

    from lowbit_attention import attention, attention_varlen, explain, make_sdpa, sdpa

    torch.manual_seed(0)
    q = torch.randn(1, 2, 40, 16)
    want = attention(q, q, q, recipe="sage2_8b")
    assert torch.equal(make_sdpa("sage2_8b")(q, q, q), want)
    assert sdpa(q, q, q).shape == want.shape  # "auto"
    packed, ends = q[0].transpose(0, 1), torch.tensor([0, 15, 40], dtype=torch.int32)
    out = attention_varlen(packed, packed, packed, ends, ends, recipe="sage2_8b")
    first = attention(*[q[:, :, :15]] * 3, recipe="sage2_8b")
    assert torch.equal(out[:15].transpose(0, 1), first[0])
    assert "emulation" in str(explain(q, q, q, recipe="sage2_8b"))
    return ""


def attend() -> tuple[nn.Sequential, Tensor]:
    """A model of two layers that call torch's function, and an input."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        scale = 0.5

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.scale * part for part in (x, x, x))  # (a closure over self)
            return x + functional.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()).eval(), torch.randn(1, 2, 40, 16)


def reroutes() -> str:
    """A block takes its own model's calls, in any thread; it counts all, and leaves nothing behind."""
    import torch
    from torch.nn import functional

    from lowbit_attention import disable_sdpa, enable_sdpa, sdpa_enabled

    original = functional.scaled_dot_product_attention
    (model, x), (other, _) = attend(), attend()
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    with torch.no_grad(), sdpa_enabled(layer, recipe="sage2_8b") as report:
        layer(torch.randn(1, 40, 32))
    assert report.ran == 1, str(report)
    with torch.no_grad():
        native = model(x)
        with sdpa_enabled(recipe="sage2_4b") as outer, sdpa_enabled(model, recipe="sage2_8b", strict=True) as inner:
            thread = threading.Thread(target=torch.no_grad()(model), args=(x,))
            thread.start()
            thread.join()
            assert not torch.equal(model(x), native)
            twin = copy.deepcopy(model)
            twin(x), other(x)
        assert (outer.ran, inner.ran) == (4, 4), f"{outer}\n{inner}"
        assert torch.equal(model(x), native)
        report = enable_sdpa(model, "sage2_8b")
        model(x)
        disable_sdpa(model)
        model(x)
        assert report.ran == 2, str(report)
    assert functional.scaled_dot_product_attention is original
    return ""


def refusals() -> str:
    """What goes to torch's own function, by what reason: gradients, float64, dropout, what stood there before."""
    import torch
    from torch.nn import functional

    from lowbit_attention import UnsupportedError, sdpa_enabled

    original = functional.scaled_dot_product_attention
    model, x = attend()

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    with sdpa_enabled(model, recipe="sage2_8b") as report:
        model(x.clone().requires_grad_()).sum().backward()
        with torch.no_grad():
            model(x.double())
    with torch.no_grad(), sdpa_enabled(None, recipe="sage2_8b") as dropped:
        functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert (report.calls, report.ran, dropped.fallbacks) == (4, 0, {"dropout": 1}), f"{report}\n{dropped}"
    assert report.fallbacks["gradients are asked for"] == 2, str(report)
    functional.scaled_dot_product_attention = theirs
    try:
        with torch.no_grad(), sdpa_enabled(model, recipe="sage2_8b") as report:
            model(x)
        assert report.by_implementation() == {"replacement": 2}, str(report)
        assert functional.scaled_dot_product_attention is theirs
    finally:
        functional.scaled_dot_product_attention = original
    try:
        with torch.no_grad(), sdpa_enabled(model, recipe="sage2_8b", strict=True):
            model(x.double())
    except UnsupportedError:
        return ""
    raise AssertionError("strict=True let float64 pass")


def pipelines() -> str:
    """A pipeline stands for its transformer."""
    import torch

    from lowbit_attention import sdpa_enabled

    class Pipeline:
        components: dict[str, Any]

    model, x = attend()
    pipeline = Pipeline()
    pipeline.components = {"transformer": model, "scheduler": None}
    with torch.no_grad(), sdpa_enabled(pipeline, recipe="sage2_8b") as report:
        model(x)
    assert (report.ran, report.of) == (2, "transformer of Pipeline"), f"{report}; {report.of}"
    return ""


def compiles() -> str:
    """`torch.compile` of a call and of a model in a block: no graph breaks, eager's numbers, gradients by torch."""
    import torch

    from lowbit_attention import attention, make_sdpa, sdpa_enabled

    q = torch.randn(1, 2, 48, 32)

    def call(q: Tensor) -> Tensor:
        return attention(q, q, q, recipe="sage2_8b") * 2

    for function in (call, lambda q: make_sdpa("sage2_8b")(q, q, q)):
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(q), function(q))

    def train(q: Tensor) -> Tensor:
        return attention(q, q, q, recipe="sage2_8b", training="exact")

    wanted = q.clone().requires_grad_()
    out = torch.compile(train, fullgraph=True, backend="aot_eager")(wanted)
    torch.autograd.grad(out.sum(), wanted)
    model, x = attend()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        native = compiled(x)
        with sdpa_enabled(model, recipe="sage2_8b"):
            want = model(x)
        with sdpa_enabled(model, recipe="sage2_8b") as report:
            assert torch.equal(compiled(x), want)
            assert torch.equal(compiled(x), want)
        assert report.ran == 4, str(report)
        with sdpa_enabled(model[1], recipe="sage2_8b") as report:  # (a part of what is compiled)
            compiled(x)
        assert report.ran == 1, str(report)
        assert torch.equal(compiled(x), native)
    with sdpa_enabled(model, recipe="sage2_8b") as report:
        compiled(x.clone().requires_grad_()).sum().backward()
    assert report.fallbacks == {"gradients are asked for": 2}, str(report)
    return ""


def exports() -> str:
    """`torch.export` in a block, by both exporters: the program runs the recipe by itself."""
    import torch

    from lowbit_attention import sdpa_enabled

    model, x = attend()
    for strict in (True, False):
        with torch.no_grad(), sdpa_enabled(model, recipe="sage2_8b"):
            want = model(x)
            program = torch.export.export(model, (x,), strict=strict)
        names = Counter(str(node.target) for node in program.graph.nodes)
        assert names["lowbit_attention.rerouted_sdpa.default"] == 2, f"strict={strict}: {names}"
        assert torch.equal(program.module()(x), want)
    return ""


def pages() -> str:
    """The examples of the documents run as they stand, those of a page one after the other."""
    import torch

    made, note = 0, ""
    for page, language in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        namespace: dict[str, Any] = {}
        torch.manual_seed(0)
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            code = compile(block, page, "exec")
            try:
                exec(code, namespace)
            except Exception as error:
                if FAST_PATH not in str(error) or note:
                    raise
                torch.backends.mha.set_fastpath_enabled(False)
                exec(code, namespace)
                note = ", one without the encoder's fast path, which torch itself cannot compile"
            made += 1
    return f"{made} examples{note}"


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
        [command, *arguments], capture_output=True, text=True, cwd=cwd, timeout=LIMIT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **(env or {})},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == code, f"lowbit {' '.join(arguments)} gave {done.returncode}: {output[-600:]}"
    assert "Traceback" not in output, output[-600:]
    return done.stdout if code == 0 else output


STEPS: tuple[Callable[[], str], ...] = (
    imports, submodules, alias, helps, doctor, calls, doors, reroutes, refusals, pipelines, compiles, exports, pages,
    pickles, evaluate, calibrate, kernel,
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
