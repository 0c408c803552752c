"""`Rerouter`: decide, run, fall back, count, for a toy library whose attention has words and a layout of its own."""

import dataclasses
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lowbit_attention import FallbackWarning, InvalidArgumentError, UnsupportedError, make_sdpa
from lowbit_attention.backends import failures
from lowbit_attention.backends.base import Implementation
from lowbit_attention.backends.registry import IMPLEMENTATIONS
from lowbit_attention.call.torch_call import TorchCall
from lowbit_attention.integrations.rerouting import Rerouter
from lowbit_attention.recipes.machine import MACHINES


def toy(rerouter):
    """A door: how the call is named, and what its arguments mean."""

    def attend(queries, keys, values, bias=None, temperature=None, drop=0.0, softcap=0.0):
        """``[B, N, H, D]``."""
        scale = None if temperature is None else 1 / temperature
        q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        call = TorchCall.of(q, k, v, bias, drop, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        why_not = "softcap" if softcap else ""  # (no value in it: torch.compile makes it a symbol)
        return rerouter.run(call, F.scaled_dot_product_attention, why_not=why_not).transpose(1, 2)

    return attend


def tokens(*shape):
    return torch.randn(*(shape or (2, 48, 4, 16)), generator=torch.Generator().manual_seed(0))


def by_recipe(name, x, **options):
    x = x.transpose(1, 2)
    return make_sdpa(name)(x, x, x, **options).transpose(1, 2)


@torch.no_grad()
def test_what_the_recipe_can_run_it_runs():
    rerouter, x = Rerouter("sage2_8b"), tokens()
    attend = toy(rerouter)
    assert torch.equal(attend(x, x, x, temperature=2.0), by_recipe("sage2_8b", x, scale=0.5))
    assert attend(x, x[:, :, :2], x[:, :, :2]).shape == x.shape
    assert rerouter.report.by_implementation() == {"emulation": 2}
    assert rerouter.report.fallbacks == {}


DECLINED = {
    "dropout": ({"drop": 0.5}, None, "dropout"),
    "own": ({"softcap": 3.0}, None, "softcap"),
    "head_dim": ({}, (1, 16, 2, 260), "head_dim 260 is above 256"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", DECLINED)
def test_what_it_cannot_run_the_original_runs_and_is_counted(case):
    options, shape, reason = DECLINED[case]
    rerouter, x = Rerouter("sage2_8b"), tokens(*(shape or ()))
    torch.manual_seed(1)
    out = toy(rerouter)(x, x, x, **options)
    torch.manual_seed(1)
    t = x.transpose(1, 2)
    want = F.scaled_dot_product_attention(t, t, t, dropout_p=options.get("drop", 0.0))
    assert torch.equal(out, want.transpose(1, 2))
    assert rerouter.report.fallbacks == {reason: 1}
    with pytest.raises(UnsupportedError, match="dropout" if case == "dropout" else reason):
        toy(Rerouter("sage2_8b", strict=True))(x, x, x, **options)


def test_gradients_are_the_originals():
    rerouter, x = Rerouter("sage2_8b"), tokens().requires_grad_()
    toy(rerouter)(x, x, x).sum().backward()
    assert x.grad is not None
    assert rerouter.report.fallbacks == {"gradients are asked for": 1}
    with pytest.raises(UnsupportedError, match="a gradient is asked"):
        toy(Rerouter("sage2_8b", training="refuse"))(x, x, x)


def test_a_forward_that_will_run_again_is_exact():
    rerouter, x = Rerouter("sage2_8b"), tokens().requires_grad_()
    checkpoint(toy(rerouter), x, x, x, use_reentrant=True).sum().backward()
    assert rerouter.report.ran == 0
    assert set(rerouter.report.fallbacks) == {"a checkpoint will ask for gradients", "gradients are asked for"}


@torch.no_grad()
def test_auto_says_why_the_original_ran():
    rerouter, x = Rerouter(), tokens()
    for _ in range(2):
        toy(rerouter)(x, x, x)
    ((reason, n),) = rerouter.report.fallbacks.items()
    assert reason.startswith("recipe auto: ")
    assert n == 2


@torch.no_grad()
@pytest.mark.parametrize("drop", [0, False, 0.0])
def test_no_dropout_in_any_spelling(drop):
    rerouter, x = Rerouter("sage2_8b"), tokens()
    toy(rerouter)(x, x, x, drop=drop)
    assert rerouter.report.ran == 1


@torch.no_grad()
@pytest.mark.parametrize("words", [{"drop": "half"}, {"drop": None}, {"temperature": "warm"}])
def test_wrong_arguments_are_the_originals_to_refuse(words):
    x = tokens()
    with pytest.raises(TypeError):
        toy(Rerouter("sage2_8b"))(x, x, x, **words)


class Broken(Implementation):
    name, is_kernel = "broken", True

    def not_supported_reasons(self, request, recipe):
        return ("exact",) if recipe.is_exact else ()

    def run(self, *_):
        raise RuntimeError("no such instruction")


@torch.no_grad()
def test_a_kernel_that_fails_is_gone_round_with_one_warning(monkeypatch):
    monkeypatch.setattr(failures, "_failures", {})
    IMPLEMENTATIONS.insert(0, Broken())
    try:
        rerouter, x = Rerouter("sage2_8b"), tokens()
        attend = toy(rerouter)
        with pytest.warns(FallbackWarning, match="no such instruction") as warned:
            out = [attend(x, x, x) for _ in range(3)]
        assert len(warned) == 1
        assert torch.equal(out[0], out[2])
        assert sum(rerouter.report.fallbacks.values()) == 3
        with pytest.raises(RuntimeError, match="no such instruction"):
            toy(Rerouter("sage2_8b", strict=True))(x, x, x)
    finally:
        del IMPLEMENTATIONS[0]


def test_a_wrong_recipe_or_option():
    for options in ({"training": "later"}, {"strict": 1}, {"like": "sm_89"}):
        with pytest.raises(InvalidArgumentError):
            Rerouter(**options)


@torch.no_grad()
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data(device):
    rerouter = Rerouter("sage2_8b")
    if device == "meta":
        x = tokens().to("meta")
        assert toy(rerouter)(x, x, x).shape == x.shape
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(tokens())
        assert toy(rerouter)(x, x, x).shape == x.shape


# ---- compiled code and exported programs


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_compiled_code_counts_too():
    rerouter, x = Rerouter("sage2_8b"), tokens()
    attend = compiled(toy(rerouter))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(attend(x, x, x), by_recipe("sage2_8b", x))
        attend(x, x, x, softcap=2.0)
        attend(x, x, x, drop=0.5)
    needs = x.clone().requires_grad_()
    attend(needs, x, x).sum().backward()
    assert needs.grad is not None
    assert rerouter.report.by_implementation() == {"emulation": 2, "torch": 3}
    assert rerouter.report.fallbacks == {"softcap": 1, "dropout": 1, "gradients are asked for": 1}


@torch.no_grad()
def test_compiled_code_knows_whose_calls_it_counts():
    x = tokens()
    one, other = Rerouter("sage2_8b"), Rerouter("sage2_4b")
    torch._dynamo.reset()
    for rerouter in (one, other, one):
        attend = torch.compile(toy(rerouter), backend="aot_eager", fullgraph=True)
        assert torch.equal(attend(x, x, x), by_recipe(rerouter.recipe.name, x))
    assert (one.report.ran, other.report.ran) == (2, 1)


@torch.no_grad()
def test_compiled_code_runs_a_machine_of_the_callers_own():
    x, machine = tokens(), dataclasses.replace(MACHINES["sm_80"], name="mine")
    attend = compiled(toy(Rerouter("sage1", like=machine)))
    assert torch.equal(attend(x, x, x), make_sdpa("sage1", like=machine)(*[x.transpose(1, 2)] * 3).transpose(1, 2))


@torch.no_grad()
def test_what_is_strict_is_strict_in_compiled_code():
    x = tokens()
    attend = compiled(toy(Rerouter("sage2_8b", strict=True)))
    with pytest.raises(UnsupportedError, match="softcap"):
        attend(x, x, x, softcap=2.0)
    with pytest.raises(UnsupportedError, match="dropout"):
        attend(x, x, x, drop=0.5)


@torch.no_grad()
def test_under_autocast_compiled_or_not():
    rerouter, x = Rerouter("sage2_8b"), tokens()
    attend = toy(rerouter)
    with torch.autocast("cpu", torch.bfloat16):
        eager = attend(x, x, x)
        assert torch.equal(compiled(attend)(x, x, x), eager)
    assert eager.dtype == torch.bfloat16
    assert rerouter.report.ran == 2


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_needs_nobody(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = toy(Rerouter("sage2_8b"))

        def forward(self, x):
            return self.attend(x, x, x, softcap=0.0) + self.attend(x, x, x, softcap=1.0)

    x, model = tokens(), Model()
    want = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    del model, program
    gc.collect()
    assert torch.equal(torch.export.load(file).module()(x), want)
