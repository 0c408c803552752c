"""`TorchCall`: torch's signature, spelled once."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_attention.call.torch_call import TorchCall, of_operands

SDPA = torch._C._nn.scaled_dot_product_attention


def tensors(count=3):
    return [torch.randn(1, 2, 4, 8) for _ in range(count)]


RIGHT = {
    "three": (3, {}),
    "by_name": (0, {"value": 2, "query": 0, "key": 1}),
    "mask": (4, {}),
    "all": (3, {"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": 0.5, "enable_gqa": True}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_torch_takes_is_taken_and_means_the_same(case):
    count, named = RIGHT[case]
    three = tensors()
    given = [*three, torch.ones(4, 4, dtype=torch.bool)][:count]
    words = {name: three[value] if type(value) is int else value for name, value in named.items()}
    call = TorchCall.of(*given, **words)
    assert torch.equal(call.run(SDPA), SDPA(*given, **words))
    assert call.run(lambda *args, **kwargs: args[:2], "first", 2) == ("first", 2)


def test_positions_are_torchs():
    q, k, v, mask = tensors(4)
    assert TorchCall.of(q, k, v, mask, 0.25, True)[:6] == (q, k, v, mask, 0.25, True)


WRONG = {
    "too_few": (2, {}),
    "unknown": (3, {"window": 3}),
    "scale_by_position": (3, {}, None, 0.0, False, 0.5),
    "twice": (3, {"query": 1}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("function", [SDPA, TorchCall.of, F.scaled_dot_product_attention])
def test_what_torch_refuses_is_refused_in_its_name(case, function):
    count, named, *more = WRONG[case]
    with pytest.raises(TypeError, match=r"scaled_dot_product_attention\(\)"):
        function(*tensors()[:count], *more, **named)


def test_an_operators_arguments_and_back():
    q, k, v, mask = tensors(4)
    call = TorchCall.of(q, k, v, mask, 0.0, True, scale=0.5)
    assert of_operands(*call.operands(), "more", 3) == (call, ("more", 3))


def test_autocast_is_torchs():
    q, k, v = tensors()
    call = TorchCall.of(q, k, v, torch.zeros(4, 4), is_causal=False)
    assert call.in_autocast() is call
    with torch.autocast("cpu", torch.bfloat16):
        inside = call.in_autocast()
        assert inside.run(SDPA).dtype == SDPA(q, k, v).dtype == torch.bfloat16
        assert [t.dtype for t in inside[:4]] == [torch.bfloat16] * 4
        double = TorchCall.of(q.double(), k.double(), v.double())
        assert double.in_autocast().query.dtype == torch.float64


def test_the_empty_answer_is_like_the_answer():
    q = torch.randn(2, 10, 4, 8).transpose(1, 2)
    k, v = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 16)
    call = TorchCall.of(q, k, v, enable_gqa=True)
    assert call.empty_answer().shape == call.run(SDPA).shape
    assert call.empty_answer().stride(1) < call.empty_answer().stride(2)
    assert TorchCall.of(q[0, 0], k[0, 0], v[0, 0]).empty_answer().shape == (10, 16)


def test_dynamo_traces_it():
    def function(*args, **kwargs):
        call = TorchCall.of(*args, **kwargs)
        call, more = of_operands(*call.in_autocast().operands(), 2.0)
        return call.run(SDPA) * more[0] + call.leading()[0][0]

    q, k, v = tensors()
    traced = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(traced(q, k, v, is_causal=True), function(q, k, v, is_causal=True))
