"""One operator stands for a call under torch.compile and for fake tensors; remembered calls are never confused."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_attention import InvalidArgumentError, attention, make_sdpa, recipe, sdpa
from lowbit_attention.recipes.machine import MACHINES

LAYOUTS = {"HND": (2, 4, 48, 32), "NHD": (2, 48, 4, 32)}


def qkv(layout="HND", **options):
    shape = LAYOUTS[layout]
    return [torch.randn(shape, **options) for _ in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sage2_8b", "exact", "auto", "sage2_4b:smooth_q=false"])
def test_compiled_without_graph_breaks_is_eager(name, layout):
    q, k, v = qkv(layout)
    options = {"recipe": name, "layout": layout, "is_causal": True, "sm_scale": 0.2}
    call = torch.compile(lambda *t: attention(*t, **options) + 1, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(call(q, k, v), attention(q, k, v, **options) + 1)


def test_compiled_with_mask_and_lse():
    q, k, v = qkv()
    mask = torch.rand(48, 48) > 0.3
    call = torch.compile(
        lambda *t: attention(*t, attn_mask=mask, recipe="sage2_8b", return_lse=True, like="sm_90a"),
        fullgraph=True,
        backend="eager",
    )
    with torch.no_grad():
        for ours, eager in zip(
            call(q, k, v),
            attention(q, k, v, attn_mask=mask, recipe="sage2_8b", return_lse=True, like="sm_90a"),
            strict=True,
        ):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fake_is_exact(layout, return_lse):
    q, k, _ = qkv(layout, dtype=torch.bfloat16)
    v = torch.randn(*LAYOUTS[layout][:3], 24, dtype=torch.bfloat16)
    options = {"recipe": "sage2_8b", "layout": layout, "return_lse": return_lse}
    real = attention(q, k, v, **options)
    mode = FakeTensorMode()
    with mode:
        fake = attention(*(mode.from_tensor(t) for t in (q, k, v)), **options)
    for a, b in zip(*(x if return_lse else (x,) for x in (real, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_opcheck():
    q, k, v = qkv()
    arguments = (q, k, v, [], "none", "sage2_8b", False, None, None, "HND", True, None)
    torch.library.opcheck(torch.ops.lowbit_attention.attention.default, arguments)
    padded = (q, k, v, [torch.tensor([9, 30], dtype=torch.int32)], "key_padding", *arguments[5:])
    torch.library.opcheck(torch.ops.lowbit_attention.attention.default, padded)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", ["attention", "make_sdpa", "sdpa"])
def test_recipe_objects_and_sdpa_compile_without_graph_breaks(function, backend):
    q, k, v = qkv()
    mine = recipe("sage2_8b").replace(smooth_v=True)
    calls = {
        "attention": lambda *t: attention(*t, recipe=mine),
        "make_sdpa": lambda *t: make_sdpa(mine, like="sm_90a")(*t, is_causal=True, scale=0.3),
        "sdpa": lambda *t: sdpa(*t, torch.ones(48, 48, dtype=torch.bool).tril(), enable_gqa=True),
    }
    with torch.no_grad():
        got = torch.compile(calls[function], fullgraph=True, backend=backend)(q, k, v)
        assert torch.equal(got, calls[function](q, k, v))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(layout, strict):
    """A module that calls us exports with a dynamic length, and its program gives eager's numbers."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            out, lse = attention(q, k, v, recipe="sage2_8b", is_causal=True, layout=layout, return_lse=True)
            return out + 1, lse

    tokens = 2 if layout == "HND" else 1
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = tuple({tokens: length} for _ in range(3))
    with torch.no_grad():
        program = torch.export.export(Module(), tuple(qkv(layout)), dynamic_shapes=shapes, strict=strict)
        assert any("lowbit_attention.attention" in str(node.target) for node in program.graph.nodes)
        for n in (48, 77):
            given = [torch.randn(*(n if i == tokens else s for i, s in enumerate(LAYOUTS[layout]))) for _ in range(3)]
            for ours, eager in zip(program.module()(*given), Module()(*given), strict=True):
                assert torch.equal(ours, eager)


def test_a_recipe_object_crosses_as_json():
    q, k, v = qkv()
    mine = recipe("sage2_8b").replace(smooth_v=True)
    out, lse = torch.ops.lowbit_attention.attention(
        q, k, v, [], "none", mine.to_json(), False, None, None, "HND", False, None
    )
    assert torch.equal(out, attention(q, k, v, recipe=mine))
    assert lse.numel() == 0


def test_a_machine_object_crosses_by_its_name():
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 16)
        assert attention(q, q, q, recipe="sage2_8b", like=MACHINES["sm_90a"]).shape == q.shape
        with pytest.raises(InvalidArgumentError, match=r"like='mine': inside torch.compile give one of the names"):
            attention(q, q, q, recipe="sage2_8b", like=replace(MACHINES["sm_90a"], name="mine"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"sm_scale": 1.0}, {"sm_scale": True}),
        ({"return_lse": False}, {"return_lse": 0}),
    ],
)
def test_a_remembered_call_excuses_no_wrong_argument(first, second):
    q, k, v = qkv()
    attention(q, k, v, recipe="sage2_8b", **first)
    with pytest.raises(InvalidArgumentError):
        attention(q, k, v, recipe="sage2_8b", **second)


def test_remembered_calls_differ_where_arguments_do():
    q, k, v = qkv()
    calls = [{}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "top_left"}, {"sm_scale": 0.5}]
    first = [attention(q, k[:, :, :40], v[:, :, :40], recipe="sage2_8b", **c) for c in calls]
    again = [attention(q, k[:, :, :40], v[:, :, :40], recipe="sage2_8b", **c) for c in calls]
    for i, a in enumerate(first):
        assert torch.equal(a, again[i])
        assert not any(torch.equal(a, b) for b in first[i + 1 :])
