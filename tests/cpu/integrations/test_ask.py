"""Calls that are made to a block itself (`intercept.ask`, `with_lse.ask_with_lse`), not by torch's name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_attention import UnsupportedError, attention, sdpa_enabled
from lowbit_attention.adaptive import observe
from lowbit_attention.call.torch_call import TorchCall
from lowbit_attention.integrations import traced
from lowbit_attention.integrations.intercept import ask, intercepted
from lowbit_attention.integrations.scope import Block
from lowbit_attention.integrations.torch_sdpa import Caught
from lowbit_attention.integrations.with_lse import ask_with_lse


def tokens():
    torch.manual_seed(0)
    return torch.randn(1, 2, 24, 16)


class Asking(nn.Module):
    """Attention by a block's number."""

    def __init__(self, number, with_lse=False):
        super().__init__()
        self.number, self.with_lse = number, with_lse

    def forward(self, x):
        if self.with_lse:
            return ask_with_lse(self.number, TorchCall.of(x, x, x))
        return ask(self.number, x, x, x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def block():
    return Block(Caught("sage2_8b"))


def test_a_block_that_is_not_in_force_is_asked(block):
    x, number = tokens(), traced.number_of_block(block)
    assert torch.equal(ask(number, x, x, x), attention(x, x, x, recipe="sage2_8b"))
    assert block.handler.report.ran == 1
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
@torch.no_grad()
def test_blocks_entered_after_it_come_first_and_those_before_do_not(block, compiled, with_lse):
    x = tokens()
    model = Around(Asking(traced.number_of_block(block), with_lse))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    entered = intercepted(block.handler)
    entered.block = block
    for scope in (model, None):
        with sdpa_enabled(scope, recipe="sage2_4b") as outer, entered:
            run(x)
            assert outer.calls == 0
        with entered, sdpa_enabled(scope, recipe="sage2_4b") as inner:
            run(x)
            assert inner.ran == 1
    assert block.handler.report.ran == 2


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_the_name_is_that_of_the_innermost_module(block, compiled):
    model = Around(Asking(traced.number_of_block(block)))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = tokens()
    with observe(model, ["sage2_8b"]) as watch:
        out = run(x)
    assert [key.name for key in watch.observations.records] == ["inner"]
    assert torch.allclose(out, F.scaled_dot_product_attention(x, x, x), atol=1e-6)


def test_what_else_stands_in_the_names_place_is_not_asked(block, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: pytest.fail("asked"))
    x = tokens()
    with sdpa_enabled(nn.Identity(), recipe="sage2_4b"):
        ask(traced.number_of_block(block), x, x, x)
    assert block.handler.report.ran == 1


@torch.no_grad()
def test_lse(block):
    x, number = tokens(), traced.number_of_block(block)
    out, lse = ask_with_lse(number, TorchCall.of(x, x, x, is_causal=True))
    wanted = attention(x, x, x, recipe="sage2_8b", is_causal=True, return_lse=True)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    compiled = torch.compile(Asking(number, with_lse=True), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x)[1], attention(x, x, x, recipe="sage2_8b", return_lse=True)[1])
    with observe(candidates=["sage2_8b"]):  # (which has none: the whole process is exact)
        out, lse = ask_with_lse(traced.number_of_block(Block(Caught("auto"))), TorchCall.of(x, x, x))
    exact = attention(x, x, x, recipe="exact", return_lse=True)
    assert torch.equal(out, exact[0])
    assert torch.equal(lse, exact[1])


def test_lse_with_gradients_and_dropout_are_refused(block):
    x, number = tokens(), traced.number_of_block(block)
    with pytest.raises(UnsupportedError, match="return_lse=True has no gradients"):
        ask_with_lse(number, TorchCall.of(x.requires_grad_(), x, x))
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"no dropout, and dropout_p=0\.5"):
        ask_with_lse(number, TorchCall.of(x, x, x, dropout_p=0.5))
