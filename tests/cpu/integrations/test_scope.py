"""Whose a call is, whatever happened before it: no call of anybody else's is rerouted, and torch comes back as it was.

The reports T1 T2 T3 T4 T5 S7 S8 S12 S15 S17 S19 are tested here.
"""

import asyncio
import copy
import gc
import importlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowbit_attention import InvalidArgumentError, UnsupportedError, disable_sdpa, enable_sdpa, make_sdpa, sdpa_enabled
from lowbit_attention.integrations import intercept, scope, torch_sdpa, traced
from lowbit_attention.integrations.intercept import intercepted

TORCH = {"function": torch._C._nn.scaled_dot_product_attention}  # (not a global: those are rerouted)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        x = self.linear(x)
        return F.scaled_dot_product_attention(x, x, x)


class Net(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).eval().requires_grad_(False)


def tokens(seed=0):
    return torch.randn(1, 2, 33, 16, generator=torch.Generator().manual_seed(seed))


def recorder():
    names = []

    def handler(original, name, *args, **kwargs):
        names.append(name)
        return original(*args, **kwargs)

    return handler, names


def state():
    early = sys.modules.get("early_user_of_attention")
    return (
        F.scaled_dot_product_attention is TORCH["function"],
        F.multi_head_attention_forward is intercept._MHA,
        torch.backends.mha.get_fastpath_enabled(),
        sum((block := ref()) is not None and block.wanted for ref in intercept._blocks),
        early is None or early.attend is TORCH["function"],
    )


CLEAN = (True, True, True, 0, True)


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    assert state() == CLEAN
    yield
    disable_sdpa()
    gc.collect()
    assert state() == CLEAN


@pytest.fixture
def early(monkeypatch):
    """A module that bound torch's function before."""
    module = types.ModuleType("early_user_of_attention")
    module.attend = TORCH["function"]
    monkeypatch.setitem(sys.modules, "early_user_of_attention", module)
    return module


# ---- interrupts

OURS = tuple(module.__file__ for module in (intercept, scope, torch_sdpa, traced))


class InterruptAt:
    """Raises KeyboardInterrupt at one bytecode: the ``n``-th that ``code`` runs from now on."""

    def __init__(self, code, n):
        self.code, self.left = code, n

    def __enter__(self):
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def on_call(self, frame, event, arg):
        if frame.f_code is not self.code or self.left < 0:
            return None
        frame.f_trace_opcodes = True
        return self.on_bytecode

    def on_bytecode(self, frame, event, arg):
        if event == "opcode":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.on_bytecode


class Counting:
    """Counts the bytecodes that each function of ours runs."""

    def __init__(self):
        self.counts = {}

    def __enter__(self):
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def on_call(self, frame, event, arg):
        if frame.f_code.co_filename not in OURS and frame.f_code.co_filename != __file__:
            return None
        frame.f_trace_opcodes = True
        return self.on_bytecode

    def on_bytecode(self, frame, event, arg):
        if event == "opcode":
            self.counts[frame.f_code] = self.counts.get(frame.f_code, 0) + 1
        return self.on_bytecode


@torch.no_grad()
@pytest.mark.parametrize("target", ["model", "process"])
def test_interrupts_at_random_bytecodes(target, early, monkeypatch):
    """At 1,000 moments each: in the block's beginning and end, in a call, in the model and in the caller."""
    model, other, x = net(), net(1), tokens()
    monkeypatch.setattr(intercept, "_every_module", lambda: [early])  # (or most moments are in the walk over all)
    native, foreign = F.scaled_dot_product_attention(x, x, x), other(x)

    def use(reports):
        with sdpa_enabled(model if target == "model" else None, "sage2_8b") as report:
            reports.append(report)
            model(x)
            early.attend(x, x, x)

    use([])
    with Counting() as counting:
        use([])
    codes = sorted(counting.counts, key=lambda code: (code.co_filename, code.co_firstlineno))
    assert len(codes) > 25
    rng, interrupted = random.Random(0), 0
    for _ in range(1000):
        code, reports = rng.choice(codes), []
        try:
            with InterruptAt(code, rng.randrange(counting.counts[code])):
                use(reports)
        except KeyboardInterrupt:
            interrupted += 1
        counted = [report.calls for report in reports]
        if rng.random() < 0.5:
            assert torch.equal(F.scaled_dot_product_attention(x, x, x), native), code
        else:
            assert torch.equal(other(x), foreign), code
        assert [report.calls for report in reports] == counted, code
        assert state() == CLEAN, code
    assert interrupted > 900


@torch.no_grad()
def test_interrupts_by_a_signal(early):
    """200 real ones, whenever they come; also while the block looks through every module."""
    model, x = net(), tokens()
    native = F.scaled_dot_product_attention(x, x, x)
    rng, interrupted = random.Random(1), 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.02))
                for _ in range(50):  # (Python swallows one that comes while a block's __del__ runs)
                    with sdpa_enabled(model, "sage2_8b"):
                        model(x)
            except KeyboardInterrupt:
                interrupted += 1
            assert torch.equal(F.scaled_dot_product_attention(x, x, x), native)
            assert state() == CLEAN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, SystemExit, GeneratorExit])
@torch.no_grad()
def test_an_interrupted_forward_claims_nothing_afterwards(error):
    class Interrupted(Attention):
        def forward(self, x):
            raise error

    model, other, x = net(), net(1), tokens()
    model.layers[1] = Interrupted()
    report = enable_sdpa(model, "sage2_8b")
    native = other(x)
    with pytest.raises(error) as kept:  # (and the traceback, with all its frames, stays alive)
        model(x)
    assert report.calls == 1
    assert torch.equal(other(x), native)
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), TORCH["function"](x, x, x))
    assert report.calls == 1
    assert kept.value is not None


@torch.no_grad()
def test_an_exception_in_a_hook():
    model, x = net(), tokens()

    def fails(*_):
        raise ValueError("mine")

    with sdpa_enabled(model, "sage2_8b") as report:
        for register in ("register_forward_pre_hook", "register_forward_hook"):
            handle = getattr(model.layers[0], register)(fails)
            with pytest.raises(ValueError, match="mine"):
                model(x)
            handle.remove()
            counted = report.calls
            F.scaled_dot_product_attention(x, x, x)
            assert report.calls == counted


# ---- blocks that end in other ways


@torch.no_grad()
def test_a_generator_that_is_dropped_ends_its_block():
    def serve():
        with sdpa_enabled(recipe="sage2_8b") as report:
            yield report

    x, served = tokens(), serve()
    report = next(served)
    F.scaled_dot_product_attention(x, x, x)
    assert report.ran == 1
    del served
    gc.collect()
    assert state() == CLEAN


@torch.no_grad()
def test_a_block_that_nobody_refers_to_is_over():
    sdpa_enabled(recipe="sage2_8b").__enter__()
    gc.collect()
    assert state() == CLEAN


@torch.no_grad()
def test_tasks_and_threads_interleave():
    models, x = [net(seed) for seed in range(3)], tokens()

    async def work(model, turns):
        with sdpa_enabled(model, "sage2_8b") as report:
            for _ in range(turns):
                model(x)
                await asyncio.sleep(0)
        return report.ran

    async def cancelled(model):
        with sdpa_enabled(model, "sage2_8b"):
            await asyncio.sleep(10)

    async def everything():
        task = asyncio.create_task(cancelled(models[0]))
        done = await asyncio.gather(*(work(model, turns) for model, turns in zip(models, (1, 4, 2), strict=True)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return done

    assert asyncio.run(everything()) == [2, 8, 4]
    assert state() == CLEAN


@torch.no_grad()
def test_a_block_is_used_once_at_a_time_and_again_afterwards():
    x, block = tokens(), sdpa_enabled(recipe="sage2_8b")
    for turn in (1, 2):
        with block as report:
            F.scaled_dot_product_attention(x, x, x)
            with pytest.raises(InvalidArgumentError, match="in force already"):
                block.__enter__()
        assert report.ran == turn


@torch.no_grad()
def test_as_a_decorator():
    x = tokens()

    @sdpa_enabled(recipe="sage2_8b")
    def attend(depth):
        out = F.scaled_dot_product_attention(x, x, x)
        return out if depth == 0 else attend(depth - 1)

    assert torch.equal(attend(2), make_sdpa("sage2_8b")(x, x, x))
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), TORCH["function"](x, x, x))


@torch.no_grad()
def test_a_model_that_calls_itself_and_attends_after_that():
    class Recursive(nn.Module):
        def forward(self, x, depth):
            if depth:
                x = self(x, depth - 1)
            return F.scaled_dot_product_attention(x, x, x)

    model = Recursive()
    with sdpa_enabled(model, "sage2_8b") as report:
        model(tokens(), 3)
    assert report.ran == 4


# ---- copies and files


@torch.no_grad()
def test_copies_and_files_hold_nothing_of_ours(tmp_path):
    model, x = net(), tokens()
    clean = pickle.dumps(model)
    with sdpa_enabled(model, "sage2_8b") as report:
        assert pickle.dumps(model) == clean
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        twin(x)
        torch.load(tmp_path / "model.pt", weights_only=False)(x)
        assert report.calls == 0
    assert pickle.dumps(model) == clean


@torch.no_grad()
def test_copies_of_a_model_whose_forwards_a_clock_counts(tmp_path):
    from lowbit_attention.adaptive import observe

    model, x = net(), tokens()
    with observe(model, ["sage2_8b"], timesteps="forwards") as watch:
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        saved = torch.load(tmp_path / "model.pt", weights_only=False)
        model(x)
        for other in (twin, saved):
            other(x)
        assert watch.clock.number == 0
    assert not twin._forward_pre_hooks  # gone with the first forward
    assert b"lowbit_attention.adaptive" not in (tmp_path / "model.pt").read_bytes()  # (it loads without us)


@torch.no_grad()
def test_a_replica_of_data_parallel_counts_as_the_model():
    model, x = net(), tokens()
    with sdpa_enabled(model, "sage2_8b") as report:
        replica = model._replicate_for_data_parallel()
        for name, child in model._modules.items():
            replica._modules[name] = child
        replica._modules["layers"] = model.layers._replicate_for_data_parallel()
        replica(x)
    assert report.ran == 2


# ---- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@torch.no_grad()
def test_a_fork_while_another_thread_enters_a_block(monkeypatch):
    held, leave = threading.Event(), threading.Event()
    plain = intercept._every_module

    def slowly():
        if threading.current_thread() is not threading.main_thread():
            held.set()
            leave.wait(60)
        return plain()

    monkeypatch.setattr(intercept, "_every_module", slowly)
    thread = threading.Thread(target=lambda: sdpa_enabled(recipe="sage2_8b").__enter__())
    thread.start()
    try:
        assert held.wait(30)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with sdpa_enabled(recipe="sage2_8b") as report:
                    F.scaled_dot_product_attention(tokens(), tokens(), tokens())
                code = 0 if report.ran == 1 else 2
            finally:
                os._exit(code)
    finally:
        leave.set()
        thread.join()
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        threading.Event().wait(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child hangs")


@torch.no_grad()
def test_many_threads_begin_and_end_blocks_at_once():
    x, errors = tokens(), []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(15):
            model = net(seed)
            with sdpa_enabled(model, "sage2_8b") as report:
                model(x)
                if rng.random() < 0.5:
                    gc.collect(0)
            if report.ran != 2:
                errors.append(report.counts)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []
    assert state() == CLEAN


EXIT = """
import atexit, torch, torch.nn.functional as F
x = torch.randn(1, 1, 4, 8)
def late():
    F.scaled_dot_product_attention(x, x, x)
    print("late", F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention)
atexit.register(late)
from lowbit_attention import enable_sdpa
report = enable_sdpa(recipe="sage2_8b")
class AtTheEnd:
    def __del__(self):
        F.scaled_dot_product_attention(x, x, x)
keep = AtTheEnd()
torch.the_end = keep
with torch.no_grad():
    F.scaled_dot_product_attention(x, x, x)
print("ran", report.ran)
"""


def test_the_interpreter_exits_while_enabled():
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran", "1", "late", "True"]
    assert "Error" not in done.stderr


RELOAD = """
import importlib, sys, torch, torch.nn.functional as F
import lowbit_attention
x = torch.randn(1, 1, 4, 8)
torch.set_grad_enabled(False)
report = lowbit_attention.enable_sdpa(recipe="sage2_8b")
ours = "call.memo call.torch_call call.checked ops api functional".split()
ours += ["integrations." + name for name in "rerouting traced intercept torch_sdpa".split()]
for name in ours:
    importlib.reload(sys.modules["lowbit_attention." + name])
importlib.reload(lowbit_attention)
lowbit_attention.attention(x, x, x, recipe="sage2_8b")
with lowbit_attention.sdpa_enabled(recipe="sage2_8b") as report:
    F.scaled_dot_product_attention(x, x, x)
lowbit_attention.disable_sdpa()
import gc; gc.collect()
F.scaled_dot_product_attention(x, x, x)
print(report.ran, F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention)
"""


def test_reloading_what_torch_knows_of():
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", "True"]


# ---- what stood there before, and what refuses


class Refuses(types.ModuleType):
    def __setattr__(self, name, value):
        raise AttributeError("read only")


class Lazy(types.ModuleType):
    @property
    def __dict__(self):
        raise ImportError("not now")


@torch.no_grad()
def test_modules_that_refuse(monkeypatch):
    refuses = Refuses("refuses")
    vars(refuses)["attend"] = TORCH["function"]
    monkeypatch.setitem(sys.modules, "refuses", refuses)
    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "nothing", None)
    x = tokens()
    with sdpa_enabled(recipe="sage2_8b") as report:
        F.scaled_dot_product_attention(x, x, x)
    assert report.ran == 1


def foreign(kind, calls):
    function = TORCH["function"]

    def in_a_closure(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    if kind == "closure":
        return in_a_closure
    module = types.ModuleType("somebody_elses")
    module.attend, module.calls = function, calls
    exec("def replacement(*args, **kwargs):\n    calls.append(1)\n    return attend(*args, **kwargs)", vars(module))
    sys.modules["somebody_elses"] = module
    return module.replacement


@pytest.mark.parametrize("kind", ["closure", "global"])
@torch.no_grad()
def test_somebody_elses_replacement_is_called_for_every_call(kind, monkeypatch):
    """Also for those of the block; what it asks of torch by a global name comes back, and what not is counted."""
    calls, x, model, other = [], tokens(), net(), net(1)
    monkeypatch.setitem(sys.modules, "somebody_elses", types.ModuleType("somebody_elses"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", foreign(kind, calls))
    native = other(x)
    calls.clear()
    with sdpa_enabled(model, "sage2_8b") as report:
        model(x)
        assert len(calls) == 2
        assert torch.equal(other(x), native)
        F.scaled_dot_product_attention(x, x, x)
        assert len(calls) == 5
    assert report.calls == 2
    assert report.ran == (2 if kind == "global" else 0)
    if kind == "closure":
        assert "had been replaced before by" in str(report)
        assert report.by_implementation() == {"replacement": 2}
        with sdpa_enabled(model, "sage2_8b", strict=True), pytest.raises(UnsupportedError, match="in_a_closure"):
            model(x)
    F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == (6 if kind == "global" else 7)
    monkeypatch.undo()


CONTEXT_PARALLEL = """
import os, sys, torch, torch.nn.functional as F, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from lowbit_attention import sdpa_enabled
torch.set_grad_enabled(False)
x = torch.randn(1, 2, 32, 16)
with context_parallel(init_device_mesh("cpu", (1,)), buffers=[x], buffer_seq_dims=[2]):
    theirs = F.scaled_dot_product_attention
    replaced = theirs is not torch._C._nn.scaled_dot_product_attention
    with sdpa_enabled(recipe="sage2_8b") as report:
        try:
            F.scaled_dot_product_attention(x, x, x)
        except Exception as error:
            print("raised", type(error).__name__)
    print("replaced", replaced, "ran", report.ran, "back", F.scaled_dot_product_attention is theirs)
dist.destroy_process_group()
"""


def test_the_wrapper_of_context_parallel_is_not_dropped():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", CONTEXT_PARALLEL, port], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "replaced True ran 0 back True" in done.stdout, done.stdout


class Pipeline:
    """As a diffusers pipeline: its modules by name, and more."""

    def __init__(self, **components):
        self.components = components

    def __call__(self, x):
        return self.components["transformer"](self.components["text_encoder"](x))


@torch.no_grad()
def test_a_pipeline_means_its_transformers():
    pipe = Pipeline(transformer=net(0), transformer_2=net(1), text_encoder=net(2), vae=None, scheduler=object())
    handler, names = recorder()
    with intercepted(handler, pipe):
        pipe(tokens())
    assert names == ["transformer.layers.0", "transformer.layers.1"]
    with sdpa_enabled(pipe, "sage2_8b") as report:
        pipe(tokens())
    assert report.ran == 2
    assert report.of == "transformer, transformer_2 of Pipeline"
    assert "of Pipeline" in str(report)
    with pytest.raises(InvalidArgumentError, match="no component named like a transformer or unet, but vae"):
        sdpa_enabled(Pipeline(vae=net()))
    with pytest.raises(InvalidArgumentError, match="a pipeline of modules or None, got str"):
        sdpa_enabled("wan")


# ---- TorchScript, checkpoints


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("target", ["process", "the_model", "another"])
@torch.no_grad()
def test_torchscript_sees_torchs_own(target):
    model, x = Scripted(), tokens()
    want = model(x)
    subject = {"process": None, "the_model": model, "another": net()}[target]
    with sdpa_enabled(subject, "sage2_8b") as report:
        scripted = torch.jit.script(model)
        made = torch.jit.trace(model, (x,))
        counted = report.calls
        for program in (scripted, made):
            assert torch.equal(program(x), want)
    assert report.calls == counted
    for program in (scripted, made):
        assert torch.equal(program(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_training_is_exact_twice(reentrant):
    torch.manual_seed(0)
    model, x = Attention(), tokens().requires_grad_()

    def grads():
        model.zero_grad()
        out = checkpoint(model, x, use_reentrant=reentrant)
        out.sum().backward()
        return out.detach().clone(), model.linear.weight.grad.clone()

    want = grads()
    with sdpa_enabled(model, "sage2_8b") as report:
        found = grads()
        assert report.ran == 0
        assert report.calls == 2
        with torch.no_grad():
            checkpoint(model, x, use_reentrant=reentrant)
        assert report.ran == 1
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_any_function_that_will_recompute():
    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.scaled_dot_product_attention(x, x, x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    x = tokens()
    with sdpa_enabled(recipe="sage2_8b") as report:
        Recomputes.apply(x.clone().requires_grad_())
        assert report.fallbacks == {"a checkpoint will ask for gradients": 1}
        Recomputes.apply(x)
    assert report.ran == 1


# ---- compiled code


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled_twins_keep_apart(backend):
    """One code for all layers of both models, and only one model is enabled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mine, other, x = net(0, layers=3), net(1, layers=3), tokens()
    native = [model(x) for model in (mine, other)]
    for model in (mine, other):
        for layer in model.layers:
            layer.compile(backend=backend, fullgraph=True)
    handler, names = recorder()
    with intercepted(handler, mine):
        for model, want in zip((other, mine), reversed(native), strict=True):
            torch.testing.assert_close(model(x), want)
    assert names == [f"layers.{n}" for n in range(3)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_a_compiled_function_of_several_models():
    torch._dynamo.reset()
    models, x = {"a": net(0), "b": net(1)}, tokens()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x):
        return models["a"](x) + models["b"](x)

    (first, first_names), (second, second_names) = recorder(), recorder()
    with intercepted(first, models["a"]), intercepted(second, models["b"].layers[1]):
        both(x)
        assert (first_names, second_names) == (["layers.0", "layers.1"], [""])
        models["a"] = net(2)  # another of the same class: its calls are not the first block's
        both(x)
    assert (len(first_names), len(second_names)) == (2, 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_a_part_of_a_model_that_is_compiled_as_a_whole(backend):
    torch._dynamo.reset()
    model, x = net(0, layers=3), tokens()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    (part, part_names), (whole, whole_names) = recorder(), recorder()
    with intercepted(whole, model), intercepted(part, model.layers[1]):
        compiled(x)
    assert (whole_names, part_names) == (["layers.0", "layers.2"], [""])


@torch.no_grad()
def test_graph_breaks_and_interrupts_in_between():
    class Breaks(Net):
        interrupted = False

        def forward(self, x):
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            if self.interrupted:
                raise KeyboardInterrupt
            return self.layers[1](F.scaled_dot_product_attention(x, x, x))

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, other, x = Breaks().eval().requires_grad_(False), net(1), tokens()
    compiled, foreign = (torch.compile(m, backend="aot_eager") for m in (model, other))
    native = other(x)
    handler, names = recorder()
    with intercepted(handler, model):
        compiled(x)
        assert names == ["layers.0", "", "layers.1"]
        model.interrupted = True
        with pytest.raises(KeyboardInterrupt):
            compiled(x)
        names.clear()
        torch.testing.assert_close(foreign(x), native)
        assert names == []


def test_importing_it_again_is_the_same_module():
    assert importlib.import_module("lowbit_attention.integrations.intercept") is intercept
