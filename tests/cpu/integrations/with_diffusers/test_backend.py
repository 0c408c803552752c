"""The door itself: names, arguments, masks, which calls are whose, and that everything is undone."""

import copy
import gc
import weakref

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import attention_backend
from diffusers.models import attention_dispatch as library
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from lowbit_attention import RECIPES, UnsupportedError, attention, sdpa_enabled
from lowbit_attention.errors import InvalidArgumentError, MissingExtraError
from lowbit_attention.integrations.diffusers import library as ours
from lowbit_attention.integrations.diffusers import register, unregister

NEAR = "int8_fp16"
"""The recipe that errs least, and is emulated fastest."""

FLUX, SD3, WAN = (
    next(case for case in tiny_models.CASES if case.name.startswith(name)) for name in ("FluxT", "SD3", "WanT")
)


def relative(a, b):
    return float((a - b).abs().sum() / b.abs().sum())


def qkv(batch=2, tokens=8, keys=12, heads=2, kv_heads=2, dim=16):
    torch.manual_seed(0)
    return (
        torch.randn(batch, tokens, heads, dim),
        torch.randn(batch, keys, kv_heads, dim),
        torch.randn(batch, keys, kv_heads, dim),
    )


def native(q, k, v, mask=None, **options):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(1, 2)


# ---- names


def test_there_is_a_name_for_each_recipe():
    register()
    assert {"lowbit", *(f"lowbit_{recipe}" for recipe in RECIPES)} < {name.value for name in AttentionBackendName}
    q, k, v = qkv()
    with attention_backend("lowbit_sage2_8b"):
        out = dispatch_attention_fn(q, k, v)
    assert torch.equal(out, attention(q, k, v, layout="NHD", recipe="sage2_8b"))


def test_auto_runs_torch_where_no_kernel_is_and_says_so():
    report = register()
    q, k, v = qkv()
    with attention_backend("lowbit"):
        assert torch.equal(dispatch_attention_fn(q, k, v), native(q, k, v))
    assert report.by_implementation() == {"torch": 1}
    assert next(iter(report.fallbacks)).startswith("recipe auto:")


def test_a_name_is_replaced_and_removed():
    first = register(NEAR, "mine")
    second = register("sage2_8b", "mine")
    other = register(NEAR, "theirs")
    q, k, v = qkv()
    for name in ("mine", "theirs", "theirs_sage1"):
        with attention_backend(name):
            dispatch_attention_fn(q, k, v)
    assert (first.calls, second.calls, other.calls) == (0, 1, 2)
    unregister("mine")
    with pytest.raises(ValueError, match="not registered"), attention_backend("mine"):
        pass
    with attention_backend("theirs"):
        dispatch_attention_fn(q, k, v)
    with pytest.raises(InvalidArgumentError, match="'mine' is not registered; there are theirs"):
        unregister("mine")


@pytest.mark.parametrize("name", ["native", "Lowbit", "low-bit", "", 7])
def test_names_that_cannot_be(name):
    with pytest.raises(InvalidArgumentError, match="name="):
        register(NEAR, name)


def test_an_unknown_recipe_registers_nothing():
    with pytest.raises(InvalidArgumentError):
        register("no_such_recipe")
    assert "lowbit" not in AttentionBackendName._value2member_map_


def test_no_diffusers_and_one_without_backends(monkeypatch):
    monkeypatch.delattr(library, "_AttentionBackendRegistry")
    with pytest.raises(
        UnsupportedError, match=r"has no diffusers\.models\.attention_dispatch\._AttentionBackendRegistry\.register"
    ):
        register()
    monkeypatch.setattr(ours, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name=name)))
    with pytest.raises(MissingExtraError, match=r"lowbit-attention\[diffusers\]"):
        register()


# ---- arguments


@pytest.mark.parametrize(
    "shape", [(12,), (1, 12), (2, 12), (8, 12), (2, 1, 8, 12), (1, 2, 1, 12), (2, 2, 8, 12), (2, 8, 12)]
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(shape, kind):
    report = register(NEAR)
    q, k, v = qkv()
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.where(mask, torch.randn(shape), -torch.inf)
    as_torch_takes_it = mask[:, None, None] if shape == (2, 12) else mask.view(-1, 12) if len(shape) == 1 else mask
    with attention_backend("lowbit"):
        out = dispatch_attention_fn(q, k, v, attn_mask=mask)
    wanted = native(q, k, v, as_torch_takes_it)
    assert relative(out, wanted) < 1e-2
    assert relative(native(q, k, v), wanted) > 0.1
    assert report.ran == report.calls == 1


def test_a_mask_that_does_not_fit_is_torchs_error():
    register(NEAR)
    q, k, v = qkv()
    with pytest.raises(RuntimeError), attention_backend("lowbit"):
        dispatch_attention_fn(q, k, v, attn_mask=torch.ones(2, 7, dtype=torch.bool))


def test_a_mask_that_is_no_tensor_is_refused():
    from torch.nn.attention.flex_attention import create_block_mask

    register(NEAR)
    q, k, v = qkv()
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 8, 12, device="cpu", BLOCK_SIZE=8)
    with pytest.raises(UnsupportedError, match="attn_mask is a BlockMask"), attention_backend("lowbit"):
        dispatch_attention_fn(q, k, v, attn_mask=mask)


def test_gqa_causal_scale_and_lse():
    report = register(NEAR)
    q, k, v = qkv(tokens=12, heads=4)
    with attention_backend("lowbit"):
        out = dispatch_attention_fn(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        both = dispatch_attention_fn(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=True, attention_kwargs={"return_lse": True}
        )
    assert relative(out, native(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)) < 1e-2
    assert torch.equal(both[0], out)
    _, lse = attention(q, k, v, layout="NHD", is_causal=True, sm_scale=0.3, recipe="exact", return_lse=True)
    assert both[1].shape == (2, 12, 4)
    assert (both[1] - lse.transpose(1, 2)).abs().max() < 5e-2
    assert report.ran == 2


def test_an_lse_where_torch_would_run_is_exact():
    report = register("auto")
    q, k, v = qkv()
    with attention_backend("lowbit"):
        out, lse = dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True})
    wanted, wanted_lse = attention(q, k, v, layout="NHD", recipe="exact", return_lse=True)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse.transpose(1, 2))
    assert report.by_implementation() == {"torch": 1}


def test_dropout_and_undeclared_arguments_are_refused_by_name():
    register(NEAR)
    q, k, v = qkv()
    with attention_backend("lowbit"):
        with pytest.raises(UnsupportedError, match=r"dropout_p=0\.1: the backend 'lowbit' has no dropout"):
            dispatch_attention_fn(q, k, v, dropout_p=0.1)
        with pytest.raises(UnsupportedError, match=r"window_size=\(4, 4\) \(of attention_kwargs\) means nothing"):
            dispatch_attention_fn(q, k, v, attention_kwargs={"window_size": (4, 4)})
        out = dispatch_attention_fn(q, k, v, attention_kwargs={"window_size": None})
    assert relative(out, native(q, k, v)) < 1e-2


def test_diffusers_own_checks(monkeypatch):
    monkeypatch.setattr(library._AttentionBackendRegistry, "_checks_enabled", True)
    register(NEAR)
    q, k, v = qkv()
    with attention_backend("lowbit"):
        assert relative(dispatch_attention_fn(q, k, v), native(q, k, v)) < 1e-2


def test_gradients_are_torchs_and_counted():
    report = register(NEAR)
    q, k, v = (t.requires_grad_() for t in qkv())
    with attention_backend("lowbit"):
        out = dispatch_attention_fn(q, k, v)
    out.sum().backward()
    assert torch.equal(out, native(q, k, v))
    assert q.grad is not None
    assert report.fallbacks == {"gradients are asked for": 1}
    register(NEAR, training="refuse")
    with attention_backend("lowbit"), pytest.raises(UnsupportedError, match="a gradient is asked"):
        dispatch_attention_fn(q, k, v)


def test_strict():
    register(NEAR, strict=True)
    q, k, v = qkv(dim=300)
    with attention_backend("lowbit"), pytest.raises(UnsupportedError, match="256"):
        dispatch_attention_fn(q, k, v)


# ---- which calls are whose


@pytest.mark.parametrize("case", [FLUX, SD3], ids=lambda case: case.name)
def test_the_model_that_was_given_the_backend_has_it_and_others_have_theirs(case):
    report = register(NEAR)
    a, b = case.build(), case.build()
    exact = case.run(a)
    a.set_attention_backend("lowbit")
    b.set_attention_backend("native")
    assert torch.equal(case.run(b), exact)
    assert report.calls == 0
    assert 0 < relative(case.run(a), exact) < 2e-3
    calls = report.calls
    with attention_backend("lowbit"):
        assert torch.equal(case.run(b), exact)
    assert report.calls == calls == report.ran > 0
    a.reset_attention_backend()
    assert torch.equal(case.run(a), exact)  # (the default is b's)
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@pytest.mark.parametrize("case", [FLUX, SD3], ids=lambda case: case.name)
def test_the_default_is_every_models_as_diffusers_has_it(case):
    report = register(NEAR)
    model = case.build()
    exact = case.run(model)
    with attention_backend("lowbit"):
        near = case.run(model)
    assert 0 < relative(near, exact) < 2e-3
    calls = report.calls
    assert torch.equal(case.run(model), exact)
    model.set_attention_backend("lowbit")
    model.reset_attention_backend()
    assert torch.equal(case.run(model), near)  # (what was set stays the default: diffusers' own rule)
    model.set_attention_backend("native")
    assert torch.equal(case.run(model), exact)
    assert report.calls == 2 * calls


@pytest.mark.parametrize("case", [FLUX, SD3], ids=lambda case: case.name)
def test_one_layer_may_be_left_out(case):
    report = register(NEAR)
    model = case.build()
    model.set_attention_backend("lowbit")
    case.run(model)
    calls = report.calls
    report.clear()
    layer = model.transformer_blocks[0].attn
    if case is SD3:
        layer.processor._attention_backend = AttentionBackendName.NATIVE
    else:
        layer.set_attention_backend("native")
    case.run(model)
    assert report.calls == calls - 1


def test_what_is_no_model_of_diffusers_is_not_touched():
    report = register(NEAR)
    with attention_backend("lowbit"):
        q = k = v = torch.randn(1, 2, 8, 16)
        F.scaled_dot_product_attention(q, k, v)
        layer = torch.nn.TransformerEncoderLayer(32, 2, 32, batch_first=True).eval()
        with torch.no_grad():
            layer(torch.randn(1, 8, 32))
    assert report.calls == 0


def test_autoencoders_are_exact_unless_they_are_given_a_backend():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=8
    ).eval()
    image = torch.randn(1, 3, 8, 8)
    report = register(NEAR)
    with torch.no_grad():
        with attention_backend("lowbit"):
            vae.encode(image)
        assert report.calls == 0
        vae.set_attention_backend("lowbit")
        vae.encode(image)
    assert report.ran == 1


def test_a_block_within_comes_first():
    """`sdpa_enabled` around a model that has a backend: the one entered last runs the calls."""
    report = register(NEAR)
    for case in (FLUX, SD3):
        model = case.build()
        model.set_attention_backend("lowbit")
        report.clear()
        with sdpa_enabled(model, recipe="sage2_8b") as inner:
            case.run(model)
        assert inner.ran > 0
        assert report.calls == 0
        case.run(model)
        assert report.ran == inner.ran
    with sdpa_enabled(model, recipe="sage2_8b") as outer, attention_backend("lowbit_int8_u8"):
        model.set_attention_backend("lowbit_int8_u8")
        case.run(model)
    assert outer.calls == 0


def test_a_copy_of_a_model_keeps_the_backend():
    report = register(NEAR)
    for case in (FLUX, SD3):
        model = case.build()
        model.set_attention_backend("lowbit")
        twin = copy.deepcopy(model)
        report.clear()
        case.run(twin)
        assert report.ran > 0


def test_unregister_while_models_have_it():
    for case in (FLUX, SD3):
        register(NEAR)
        model = case.build()
        exact = case.run(model)
        model.set_attention_backend("lowbit")
        twin = copy.deepcopy(model)
        case.run(model)
        unregister()
        assert torch.equal(case.run(model), exact)
        assert torch.equal(case.run(twin), exact)
        with pytest.raises(ValueError, match="must be one of"):
            model.set_attention_backend("lowbit")
    unregister()  # (nothing is there, nothing happens)


def test_no_model_is_kept_alive():
    register(NEAR)
    for case in (FLUX, SD3):
        model = case.build()
        model.set_attention_backend("lowbit")
        case.run(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
