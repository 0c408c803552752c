"""`sdpa_enabled`: every call runs by the recipe or by torch for a reason that is told; never silently otherwise."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_attention import (
    InvalidArgumentError,
    InvalidRecipeError,
    UnsupportedError,
    compare,
    disable_sdpa,
    enable_sdpa,
    make_sdpa,
    recipe,
    sdpa_enabled,
)
from lowbit_attention.integrations import intercept
from lowbit_attention.recipes.machine import MACHINES

HEADS, DIM = 4, 16


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(64, 192), nn.Linear(64, 64), dropout

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(out.transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self, layers=2, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(Attention(dropout) for _ in range(layers))

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    disable_sdpa()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert intercept._stood is None


def tokens(*shape, seed=0):
    return torch.randn(*(shape or (2, 48, 64)), generator=torch.Generator().manual_seed(seed))


def qkv(*shape, **options):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*(shape or (2, 4, 48, 16)), generator=g, **options) for _ in range(3)]


# ---- what runs


@pytest.mark.parametrize("target", ["model", "process"])
@torch.no_grad()
def test_every_layer_runs_the_recipe(model, target):
    x = tokens()
    native = model(x)
    with sdpa_enabled(model if target == "model" else None, recipe="sage2_8b") as report:
        out = model(x)
        assert report.by_implementation() == {"emulation": 2}
    assert report.ran == report.calls == 2
    assert compare(native, out).cos_sim > 0.999
    assert not torch.equal(native, out)
    assert torch.equal(model(x), native)
    assert report.calls == 2


@torch.no_grad()
def test_the_numbers_are_make_sdpas(model):
    q, k, v = qkv()
    for spec, like in (("sage2_8b", None), ("sage2_4b:smooth_q=false", "sm_90a"), (recipe("int8_u8"), None)):
        with sdpa_enabled(recipe=spec, like=like):
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.equal(got, make_sdpa(spec, like=like)(q, k, v, is_causal=True))


@torch.no_grad()
def test_a_machine_object():
    q, k, v = qkv()
    with sdpa_enabled(recipe="sage2_8b", like=MACHINES["sm_90a"]):
        got = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(got, make_sdpa("sage2_8b", like="sm_90a")(q, k, v))


@torch.no_grad()
def test_only_the_model(model):
    other, x = Model(1), tokens()
    with sdpa_enabled(model, "sage2_8b") as report:
        other(x)
        F.scaled_dot_product_attention(*qkv())
        assert report.calls == 0
        model.layers[0](x)
    assert report.ran == 1


@torch.no_grad()
def test_auto_says_why_torch_ran():
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v)
    with sdpa_enabled() as report:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), want)
    assert (report.calls, report.ran) == (1, 0)
    ((reason, n),) = report.fallbacks.items()
    assert n == 1
    assert reason.startswith("recipe auto: it runs on Hopper GPUs")


@torch.no_grad()
def test_exact_is_the_librarys():
    q, k, v = qkv()
    with sdpa_enabled(recipe="exact") as report:
        F.scaled_dot_product_attention(q, k, v)
    assert report.by_implementation() == {"torch_sdpa": 1}


REFUSED = {
    "float64": (lambda: [t.double() for t in qkv()], {}, "float64"),
    "head_dim": (lambda: qkv(1, 1, 3, 272), {}, "head_dim 272 is above 256"),
    "dropout": (qkv, {"dropout_p": 0.5}, "dropout"),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_refusals_fall_back_and_are_counted(case):
    make, options, reason = REFUSED[case]
    q, k, v = make()
    torch.manual_seed(0)
    want = F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_enabled(recipe="sage2_8b") as report:
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, **options), want)
    assert report.by_implementation() == {"torch": 1}
    assert reason in next(iter(report.fallbacks))
    with sdpa_enabled(recipe="sage2_8b", strict=True), pytest.raises(UnsupportedError, match=reason):
        F.scaled_dot_product_attention(q, k, v, **options)


def test_torchs_own_errors_are_raised():
    q, k, v = qkv()
    with sdpa_enabled(recipe="sage2_8b") as report:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k[..., :8], v)
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q, k)
        with pytest.raises(TypeError, match="softmax_scale"):
            F.scaled_dot_product_attention(q, k, v, softmax_scale=1.0)
    assert "head dimensions" in next(iter(report.fallbacks))


def test_gradients_run_torch_or_are_refused(model):
    x = tokens()
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with sdpa_enabled(model, "sage2_8b") as report:
        got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert report.fallbacks == {"gradients are asked for": 2}
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with sdpa_enabled(model, "sage2_8b", training="refuse"):
        with pytest.raises(UnsupportedError, match="no_grad"):
            model(x)
        with torch.no_grad():
            model(x)


def test_arguments_are_checked():
    for wrong, error in (
        ({"recipe": "sage9"}, InvalidRecipeError),
        ({"training": "yes"}, InvalidArgumentError),
        ({"strict": 1}, InvalidArgumentError),
        ({"like": "sm_90a"}, InvalidArgumentError),
    ):
        with pytest.raises(error), sdpa_enabled(**wrong):
            pass
        with pytest.raises(error):
            enable_sdpa(**wrong)
    assert inspect.signature(enable_sdpa).parameters == inspect.signature(sdpa_enabled).parameters


# ---- enable and disable


@torch.no_grad()
def test_enable_and_disable(model):
    other, x = Model(1), tokens()
    mine = enable_sdpa(model, "sage2_8b")
    everyone = enable_sdpa(recipe="int8_fp16")
    model(x)
    other(x)
    assert (mine.ran, everyone.ran) == (0, 3)  # the innermost gets a call, and that is the last one begun
    disable_sdpa(other)  # nothing was begun for it
    enable_sdpa(model, "sage2_8b")
    again = enable_sdpa(model, "sage2_4b")  # replaces
    model(x)
    other(x)
    assert (mine.ran, everyone.ran, again.ran) == (0, 4, 2)
    disable_sdpa(model)
    model(x)
    assert (everyone.ran, again.ran) == (6, 2)
    disable_sdpa()
    disable_sdpa()
    model(x)
    assert everyone.ran == 6


@torch.no_grad()
def test_enabled_in_every_thread(model):
    x = tokens()
    report = enable_sdpa(recipe="sage2_8b")
    threads = [threading.Thread(target=torch.no_grad()(model), args=(x,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert report.ran == 8


# ---- the report


@torch.no_grad()
def test_the_table():
    q, k, v = qkv()
    with sdpa_enabled(recipe="sage2_8b") as report:
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    text = str(report)
    assert "4 calls of scaled_dot_product_attention, 3 by this library" in text
    (ours,) = (line for line in text.splitlines() if "emulation" in line)
    assert "3" in ours
    assert "sage2_8b" in ours
    (theirs,) = (line for line in text.splitlines() if "float64" in line)
    assert "1 │ torch" in theirs
    report.clear()
    assert report.calls == 0


@torch.no_grad()
def test_the_report_stays_small():
    with sdpa_enabled(recipe="sage2_8b") as report:
        for n in range(250):
            q = torch.ones(1, 1, 1, 257 + n)
            F.scaled_dot_product_attention(q, q, q)
    assert report.calls == 250
    assert len(report.counts) == 201
    assert report.fallbacks["other reasons"] == 50


# ---- torch.compile and export

BACKENDS = ["eager", "aot_eager"]


@pytest.mark.parametrize("backend", [*BACKENDS, "inductor"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_compiled_is_eager_and_counts_every_run(model, backend, masked):
    torch._dynamo.reset()
    x = tokens()
    mask = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    native = compiled(x, mask)
    with sdpa_enabled(model, "sage2_8b") as report:
        want = model(x, mask)
        assert report.ran == 2
        for n in (1, 2, 3):
            got = compiled(x, mask)
            assert report.by_implementation() == {"emulation": 2 + 2 * n}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # (inductor's linear layers sum in another order)
    assert not torch.allclose(got, native, rtol=1e-4, atol=1e-4)
    with sdpa_enabled(model, "sage2_8b") as second:
        torch._dynamo.utils.counters.clear()
        assert torch.equal(compiled(x, mask), got)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # the code of the first block
    assert (report.ran, second.ran) == (8, 2)
    with sdpa_enabled(model, "sage2_4b") as other:  # another recipe is not run by the first one's code
        assert not torch.equal(compiled(x, mask), got)
    assert other.ran == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_falls_back_and_is_counted(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(dropout=0.3)
    x = tokens()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with sdpa_enabled(recipe="sage2_8b") as report:
        for n in (1, 2, 3):
            compiled(x).sum().backward()
            assert report.fallbacks == {"gradients are asked for": 2 * n}
        with torch.no_grad():
            compiled(x)
        assert report.fallbacks == {"gradients are asked for": 6, "dropout": 2}
        model.eval()
        with torch.no_grad():
            compiled(x)
    assert report.by_implementation() == {"torch": 8, "emulation": 2}
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_compiled_refusals_fall_back_when_run(model):
    torch._dynamo.reset()
    x = tokens().double()
    model = model.double()
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sdpa_enabled(recipe="sage2_8b") as report:
        torch.testing.assert_close(compiled(x), want)
    assert report.by_implementation() == {"torch": 2}
    with sdpa_enabled(recipe="sage2_8b", strict=True), pytest.raises(UnsupportedError, match="float64"):
        compiled(x)


@torch.no_grad()
def test_compiled_with_changing_lengths(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with sdpa_enabled(model, "sage2_8b") as report:
        for length in (17, 48, 33, 70):
            x = tokens(2, length, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert report.ran == 16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", ["model", "process"])
@torch.no_grad()
def test_compiled_multihead_attention(backend, target):
    """torch.compile keeps its function as one node, in which no module would be known to run."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3).eval()
    compiled, x = torch.compile(encoder, fullgraph=True, backend=backend), tokens()
    native = compiled(x)
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        with sdpa_enabled(encoder if target == "model" else None, "sage2_8b") as report:
            want = encoder(x)
            got = compiled(x)
        assert report.by_implementation() == {"emulation": 6}
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert torch.equal(compiled(x), native)


@torch.no_grad()
def test_compiled_under_autocast(model):
    torch._dynamo.reset()
    x = tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sdpa_enabled(model, "sage2_8b") as report, torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        got = compiled(x)
    assert report.ran == 4
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported(model, strict):
    """The program holds our operator, and runs by itself, outside of the block."""
    x = tokens()
    with sdpa_enabled(model, "sage2_8b"):
        want = model(x)
        program = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("lowbit_attention.rerouted_sdpa.default") == 2
    assert not any("scaled_dot_product" in target for target in targets)
    assert torch.equal(program.module()(x), want)


OPCHECK = {
    "plain": ((), {}),
    "by_token": ((), {"transposed": True}),
    "gqa": ((), {"kv_heads": 2, "enable_gqa": True}),
    "broadcast": ((), {"kv_heads": 1}),
    "causal": ((), {"is_causal": True}),
}


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case):
    _, options = OPCHECK[case]
    q, k, v = qkv(2, 4, 24, 16)
    if options.get("transposed"):
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    k, v = (t[:, : options.get("kv_heads", 4)] for t in (k, v))
    arguments = (
        q, k, v, None, options.get("is_causal", False), None, options.get("enable_gqa", False), "sage2_8b", None,
        False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.lowbit_attention.rerouted_sdpa.default, arguments)


@pytest.mark.parametrize("function", ["sdpa", "rerouted"])
@torch.no_grad()
def test_output_memory_follows_the_query(function):
    """Where the query is a transposed [B, N, H, D], the transpose that comes next is no copy; eager and compiled."""
    for by_token in (False, True):
        q, k, v = qkv(2, 4, 24, 16)
        if by_token:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)

        def call(*t):
            return (make_sdpa("sage2_8b") if function == "sdpa" else F.scaled_dot_product_attention)(*t)

        with sdpa_enabled(recipe="sage2_8b"):
            eager = call(q, k, v)
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
        assert (eager.transpose(1, 2) if by_token else eager).is_contiguous()
        assert eager.stride() == compiled.stride()
        assert torch.equal(eager, compiled)
