"""`intercepted` reroutes torch's attention call, only where and as long as it should, and leaves torch as it was."""

import copy
import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_attention.integrations import intercept
from lowbit_attention.integrations.intercept import intercepted


def torchs():
    """Torch's own function (a global of this module would be rerouted, too)."""
    return torch._C._nn.scaled_dot_product_attention


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.linear = Attention(), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.attn(x))


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(seed=0):
    return torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed))


def recorder():
    """A handler that answers as torch does, and the names it was called with."""
    names = []

    def handler(original, name, *args, **kwargs):
        names.append(name)
        return original(*args, **kwargs)

    return handler, names


def state_of(model):
    return [
        (list(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks), list(m._forward_hooks_always_called))
        for m in model.modules()
    ]


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    fastpath = torch.backends.mha.get_fastpath_enabled()
    everything = dict(vars(F))
    yield
    assert vars(F) == everything
    assert F.scaled_dot_product_attention is torchs()
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert intercept._blocks == []
    assert intercept._stood is None


def test_process_wide_gets_every_argument():
    seen = []

    def handler(original, name, *args, **kwargs):
        seen.append((original, name, args, kwargs))
        return args[0] * 2

    x, mask = tokens(), torch.ones(5, 5, dtype=torch.bool)
    with intercepted(handler):
        out = F.scaled_dot_product_attention(x, x, x, mask, 0.0, scale=0.3)
    assert torch.equal(out, x * 2)
    assert seen == [(torchs(), None, (x, x, x, mask, 0.0), {"scale": 0.3})]


def test_names_that_other_modules_bound_earlier_later_and_under_another_name(monkeypatch):
    early, late = types.ModuleType("early"), types.ModuleType("late")
    early.scaled_dot_product_attention = early.another_name = F.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "early", early)
    monkeypatch.setitem(sys.modules, "late", late)
    handler, names = recorder()
    x = tokens()
    with intercepted(handler):
        late.scaled_dot_product_attention = F.scaled_dot_product_attention
        for function in (early.scaled_dot_product_attention, early.another_name, late.scaled_dot_product_attention):
            function(x, x, x)
    assert names == [None] * 3
    assert early.scaled_dot_product_attention is early.another_name is late.scaled_dot_product_attention is torchs()


def test_a_model_only_gets_its_own_calls_by_name():
    model, other, x = Net(), Net(), tokens()
    handler, names = recorder()
    want, before = model(x), state_of(model)
    with intercepted(handler, model):
        assert torch.equal(model(x), want)
        assert names == [f"layers.{n}.attn" for n in range(3)]
        other(x)
        F.scaled_dot_product_attention(x, x, x)
        assert len(names) == 3
        model.layers[1](x)  # a part of it, called on its own
        assert names[3:] == ["layers.1.attn"]
    assert state_of(model) == before


def test_a_model_that_calls_it_itself_has_the_empty_name():
    handler, names = recorder()
    with intercepted(handler, model := Attention()):
        model(tokens())
    assert names == [""]


def test_nested_the_innermost_that_applies_wins():
    model, x = Net(1), tokens()
    (outer, outer_names), (inner, inner_names), (one, one_names) = recorder(), recorder(), recorder()
    with intercepted(outer):
        with intercepted(inner, model), intercepted(one, model.layers[0].attn):
            model(x)
            F.scaled_dot_product_attention(x, x, x)
        with intercepted(inner, model):
            model(x)
        model(x)
    assert (outer_names, inner_names, one_names) == ([None, None], ["layers.0.attn"], [""])


def test_blocks_may_end_in_any_order():
    model, x = Net(1), tokens()
    (first, first_names), (second, second_names) = recorder(), recorder()
    before = state_of(model)
    a, b = intercepted(first, model), intercepted(second, model)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    model(x)
    b.__exit__(None, None, None)
    model(x)
    assert (first_names, second_names) == ([], ["layers.0.attn"])
    assert state_of(model) == before


def test_what_a_handler_calls_goes_to_torch():
    calls = []

    def handler(original, name, *args, **kwargs):
        calls.append(name)
        return F.scaled_dot_product_attention(*args, **kwargs)

    x = tokens()
    with intercepted(handler):
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), torchs()(x, x, x))
    assert calls == [None]


def test_exceptions():
    """Of the handler, of a forward inside, and out of the block."""
    model, x = Net(), tokens()
    before = state_of(model)

    def handler(original, name, *args, **kwargs):
        raise ValueError(name)

    with pytest.raises(ValueError, match=r"layers\.0\.attn"), intercepted(handler, model):
        model(x)
    assert state_of(model) == before
    handler, names = recorder()
    with intercepted(handler, model):
        with pytest.raises(RuntimeError):
            model(x[..., :7])  # the first linear layer fails
        names.clear()
        F.scaled_dot_product_attention(x, x, x)  # outside of the model, although a forward was left by an exception
        assert names == []
        model(x)
        assert len(names) == 3


def test_an_interrupt_leaves_no_name_behind():
    class Interrupted(Attention):
        def forward(self, x):
            if len(x) == 1:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Net(1)
    model.layers[0].attn = Interrupted()
    handler, names = recorder()
    x = tokens()
    with intercepted(handler, model):
        with pytest.raises(KeyboardInterrupt):
            model(x[:1])
        model(x)
        F.scaled_dot_product_attention(x, x, x)
    assert names == ["layers.0.attn"]


def test_other_threads():
    """Process-wide means all threads; which module runs is a matter of each thread."""
    model, x = Net(1), tokens()
    handler, names = recorder()

    class Waiting(Attention):
        def forward(self, x):
            inside.set()
            assert leave.wait(10)
            return x

    inside, leave = threading.Event(), threading.Event()
    slow = nn.Sequential(Waiting())
    with intercepted(handler, slow):
        thread = threading.Thread(target=slow, args=(x,))
        thread.start()
        assert inside.wait(10)
        F.scaled_dot_product_attention(x, x, x)  # the other thread is inside the model, this one is not
        leave.set()
        thread.join()
    assert names == []
    with intercepted(handler), intercepted(handler, model):
        for target, args in ((model, (x,)), (F.scaled_dot_product_attention, (x, x, x))):
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
    assert names == ["layers.0.attn", None]


def test_a_patch_by_someone_else_in_the_block_is_kept():
    handler, names = recorder()
    x = tokens()

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    with intercepted(handler):
        ours = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = theirs
        F.scaled_dot_product_attention(x, x, x)
    assert F.scaled_dot_product_attention is theirs
    assert torch.equal(theirs(x, x, x), torchs()(x, x, x))  # our function without a block is torch's
    assert names == [None]
    F.scaled_dot_product_attention = torchs()


def test_a_patch_by_someone_else_before_the_block_is_put_back(monkeypatch):
    def theirs(*args, **kwargs):
        return torchs()(*args, **kwargs) + 1

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    handler, names = recorder()
    x = tokens()
    with intercepted(handler):
        out = F.scaled_dot_product_attention(x, x, x)
    assert names == []  # it went past us
    assert torch.equal(out, torchs()(x, x, x) + 1)
    assert F.scaled_dot_product_attention is theirs
    monkeypatch.undo()


def test_a_copy_made_in_the_block_works_on_its_own():
    model, x = Net(), tokens()
    handler, names = recorder()
    with intercepted(handler, model):
        twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.zero_()
    assert not torch.equal(twin(x), model(x))
    assert names == []
    assert pickle.loads(pickle.dumps(model)).layers[0].linear.weight.equal(model.layers[0].linear.weight)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    """Its fused path skips the function and is switched off; with weights it computes them itself."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    handler, names = recorder()
    x = tokens()[0]
    with torch.no_grad():
        want, _ = module(x, x, x, need_weights=need_weights)
        encoded = encoder(x)
        with intercepted(handler):
            got, _ = module(x, x, x, need_weights=need_weights)
            torch.testing.assert_close(got, want)
            assert names == ([] if need_weights else [None])
            torch.testing.assert_close(encoder(x), encoded)
            assert len(names) == 2 - need_weights
        encoder(x)
        assert len(names) == 2 - need_weights


# ---- torch.compile


class Scaled:
    """Answers with a value that tells which handler and which module it was."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, original, name, *args, **kwargs):
        index = 7 if not name else int(name.split(".")[1])
        return original(*args, **kwargs) * self.factor + index


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "in_place": lambda model: model.compile(backend="eager", fullgraph=True) or model,
    "layers": lambda model: [layer.compile(backend="eager", fullgraph=True) for layer in model.layers] and model,
    "wrapped_layers": lambda model: (
        setattr(model, "layers", nn.ModuleList(torch.compile(m, backend="eager", fullgraph=True) for m in model.layers))
        or model
    ),
}


@pytest.mark.parametrize("before", [True, False], ids=["compiled_before", "compiled_inside"])
@pytest.mark.parametrize("how", COMPILED)
@torch.no_grad()
def test_compiled(how, before):
    torch._dynamo.reset()
    model, x = Net(), tokens()
    plain = model(x)
    with intercepted(Scaled(2.0), model):
        want = model(x)
    assert not torch.equal(plain, want)
    if before:
        compiled = COMPILED[how](model)
        assert torch.equal(compiled(x), plain)
    for _ in range(2):
        with intercepted(Scaled(2.0), compiled if before else model):
            compiled = compiled if before else COMPILED[how](model)
            before = True
            assert torch.equal(compiled(x), want)
        assert torch.equal(compiled(x), plain)
    with intercepted(Scaled(-1.0), model):  # another handler of the same kind: nothing of the last is left
        assert not torch.equal(compiled(x), want)
        assert not torch.equal(compiled(x), plain)


@pytest.mark.parametrize("how", ["whole", "layers"])
@torch.no_grad()
def test_another_block_compiles_nothing_anew(how):
    """Once without a block and once with one: not for each layer, nor for another handler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = Net(), tokens()
    compiled = COMPILED[how](model)
    for factor in (2.0, 3.0):
        for handler in (Scaled(factor), recorder()[0]):
            with intercepted(handler, model):
                compiled(x)
            compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
