"""Models of transformers' own classes by `register`: outputs as eager's, every call counted, masks honoured."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra transformers")
import hf_cases
import transformers
from hf_cases import CASES, Witness, read
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowbit_attention import RECIPES, InvalidArgumentError, InvalidRecipeError, UnsupportedError, sdpa_enabled
from lowbit_attention.adaptive import CallKey, Policy
from lowbit_attention.adaptive.fingerprint import Fingerprint
from lowbit_attention.integrations.transformers import register, unregister

NEAR = "int8_fp16"
OLD = "older versions make a mask there, or do not compile"


@pytest.fixture(autouse=True)
def registered():
    yield
    unregister()
    assert not any("lowbit" in name for name in transformers.AttentionInterface._global_mapping)
    assert not any("lowbit" in name for name in transformers.masking_utils.AttentionMaskInterface._global_mapping)


def close(got, want):
    """Float32, and other orders of summation."""
    scale = want.abs().mean()
    assert (got - want).abs().max() <= 2e-4 * scale, (got - want).abs().max() / scale


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_exact_attention_is_eagers(name, padding, monkeypatch):
    """Masks, windows, sinks, biases and scales mean what they mean there: nothing is quantised, so nothing differs."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    keep = torch.ones(2, 40, dtype=torch.bool)
    if padding is not None:
        keep[1, : 40 // 3] = False
        keep = keep.flip(1) if padding == "right" else keep
        mask = "decoder_attention_mask" if case.ids.startswith("decoder") else "attention_mask"
        inputs[mask] = keep.long()
    if name == "t5" and padding is not None:
        inputs["decoder_attention_mask"], keep = keep.flip(1).long(), keep.flip(1)
    with monkeypatch.context() as patch:
        witness = Witness(model, patch)
        want = read(model(**inputs))
    report = register("exact")
    model.set_attn_implementation("lowbit")
    got = read(model(**inputs))
    close(got[keep], want[keep])
    assert witness.calls > 0
    assert report.ran == report.calls == witness.calls


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_near_lossless_calls_are_within_the_recipes_bound(name):
    """Each call against exact attention of the very same inputs, by transformers' own function in float64."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    inputs["attention_mask" if case.ids == "input_ids" else "decoder_attention_mask"] = left_padded()
    report = register(NEAR, strict=True)
    ours = transformers.AttentionInterface._global_mapping["lowbit"]
    calls = []

    def compared(module, query, key, value, attention_mask, **options):
        out, _ = ours(module, query, key, value, attention_mask, **options)
        calls.append((module, query, key, value, attention_mask, options, out))
        return out, None

    transformers.AttentionInterface.register("lowbit", compared)
    model.set_attn_implementation("lowbit")
    model(**inputs)
    transformers.AttentionInterface.register("lowbit", ours)
    assert len(calls) == report.ran
    assert not report.fallbacks
    differs = 0.0
    for module, query, key, value, mask, options, out in calls:
        exact = in_float64(module, query, key, value, mask, options)
        seen = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool) if mask is None else mask.any(-1)[:, 0]
        error = (out - exact).abs()[seen]
        allowed = bound(query, key, value, options)[seen.unsqueeze(-1).expand(out.shape[:3])].unflatten(
            0, (-1, out.shape[2])
        )
        assert (error <= allowed[..., None]).all(), (error / allowed[..., None]).max()
        differs = max(differs, float(error.max()))
    assert differs > 0  # (it was quantised at all)


def left_padded():
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    return mask


def in_float64(module, query, key, value, mask, options):
    sinks = options.get("s_aux")
    query, key, value = (t.double() for t in (query, key, value))
    if sinks is not None:  # one key more, whose value is nothing
        rows, keys = query.shape[2], key.shape[2]
        visible = torch.ones(rows, keys, dtype=torch.bool).tril() if mask is None else mask
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (key, value))
        bias = torch.zeros(query.shape[0], query.shape[1], rows, keys).masked_fill(~visible, -torch.inf)
        extra = sinks[None, :, None, None].expand(*bias.shape[:3], 1)
        mask = torch.cat([bias, extra], dim=-1).double()
    given = {n: v for n, v in options.items() if n in ("scaling", "is_causal", "position_bias")}
    if given.get("position_bias") is not None:
        given["position_bias"] = given["position_bias"].double()
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
    return out


def bound(query, key, value, options):
    """Of each row's error, ``[B, Nq, Hq]``.

    INT8 rounds each component of q and of k by at most half a step, the largest magnitude over 127 (of K less its mean:
    no more than its range): a logit is off by at most ``x = s · (Σ|q| δk + Σ|k − k̄| δq) / 2 + s · D δq δk / 4``, each
    weight by a factor between e^−2x and e^2x, and the output by ``(e^2x − 1)`` of V's range. FP16 rounds P and V by
    2⁻¹¹ each, and P falls below its normal numbers by 2⁻²⁵ a key.
    """
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    span = key.amax(2, keepdim=True) - key.amin(2, keepdim=True)
    dq = query.abs().amax((2, 3), keepdim=True) / 127
    dk = span.amax(3, keepdim=True) / 127
    off = query.abs().sum(-1, keepdim=True) * dk / 2 + span.sum(-1, keepdim=True) * dq / 2
    off = abs(scale) * (off + query.shape[-1] * dq * dk / 4)
    v_span = (value.amax(2) - value.amin(2)).amax(-1)[..., None]
    largest = value.abs().amax((2, 3))[..., None]
    rounding = (2.0**-10 + key.shape[2] * 2.0**-25) * largest
    return (torch.expm1(2 * off[..., 0]).clamp(max=1.0) * v_span + rounding).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_without_the_mask_function_padding_and_windows_would_be_lost(name, monkeypatch):
    """What the registration of masks is for: the test above would see it."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    inputs["attention_mask"] = left_padded()
    keep = inputs["attention_mask"].bool()
    want = read(model(**inputs))
    register("exact")
    transformers.masking_utils.AttentionMaskInterface._global_mapping.pop("lowbit")
    model.set_attn_implementation("lowbit")
    lost = read(model(**inputs))
    assert ((lost - want)[keep].abs().sum() / want[keep].abs().sum()) > 0.1


DECODERS = [name for name, case in CASES.items() if case.model.endswith("ForCausalLM")]


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, cache):
    """Greedy tokens of a padded batch are eager's with exact attention; a prefill and a call a token and layer."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(length=12)
    inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    inputs["attention_mask"][1, :5] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    want = model.generate(**inputs, **options)
    report = register("exact", strict=True)
    model.set_attn_implementation("lowbit")
    assert torch.equal(model.generate(**inputs, **options), want)
    assert report.ran == report.calls == 10 * model.config.num_hidden_layers
    report = register(NEAR, strict=True)  # (the name means something else now, for the same model)
    out = model.generate(**inputs, **options)
    assert out.shape == want.shape
    assert report.by_implementation() == {"emulation": 10 * model.config.num_hidden_layers}


@torch.no_grad()
def test_whisper_generates_by_it():
    case = CASES["whisper"]
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**case.options)).eval()
    model.generation_config.eos_token_id = None
    sound = case.inputs()["input_features"]
    options = {"input_features": sound, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    want = model.generate(**options)
    report = register("exact", strict=True)
    model.set_attn_implementation("lowbit")
    assert torch.equal(model.generate(**options), want)
    assert report.ran == 2 + 6 * 2 * 2  # the encoder once; each token's decoder layers attend to both


@torch.no_grad()
def test_a_sliding_window_shorter_than_the_prompt_and_a_dynamic_cache():
    """Chunks of a prompt, one after another: the window reaches back into the cache."""
    case = CASES["mistral"]
    model, ids = case.build(), case.inputs()["input_ids"]
    want = read(model(input_ids=ids))
    register("exact", strict=True)
    model.set_attn_implementation("lowbit")
    cache = transformers.DynamicCache(config=model.config)
    parts = [read(model(input_ids=ids[:, at : at + 10], past_key_values=cache)) for at in range(0, 40, 10)]
    close(torch.cat(parts, dim=1), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("positions", [True, False], ids=["with_positions", "without"])
def test_packed_sequences(name, positions):
    """Three sequences one behind another, by ``cu_seq_lens``: as each by itself."""
    case = CASES[name]
    model = case.build()
    lengths = [9, 14, 5]
    parts = [case.inputs(n, seed=n)["input_ids"][:1] for n in lengths]
    cu = torch.tensor([0, 9, 23, 28], dtype=torch.int32)
    where = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": torch.cat(parts, dim=1), "use_cache": False}
    packed |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    report = register("exact", strict=True)
    if positions:  # (from which transformers makes a mask, too)
        want = torch.cat([read(model(input_ids=p)) for p in parts], dim=1)
        packed["position_ids"] = where
    else:  # the positions go on, and so they do in what is compared
        starts = cu[:-1].tolist()
        spaced = [torch.arange(n)[None] + at for n, at in zip(lengths, starts, strict=True)]
        want = torch.cat([read(model(input_ids=p, position_ids=w)) for p, w in zip(parts, spaced, strict=True)], dim=1)
    model.set_attn_implementation("lowbit")
    close(read(model(**packed)), want)
    assert report.ran == report.calls == 2


@pytest.mark.skipif(not hf_cases.NEW, reason=OLD)
@torch.no_grad()
def test_packed_without_a_mask_runs_as_packed_sequences(monkeypatch):
    from lowbit_attention.integrations.transformers import runs

    seen = []
    monkeypatch.setattr(runs, "run_packed", lambda rerouter, call: seen.append(call) or torch.zeros(*call.query.shape))
    model, ids = CASES["llama"].build(), CASES["llama"].inputs(28)["input_ids"][:1]
    cu = torch.tensor([0, 9, 23, 28], dtype=torch.int32)
    register(NEAR)
    model.set_attn_implementation("lowbit")
    model(input_ids=ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=14, max_length_k=14, use_cache=False)
    assert [(tuple(c.query.shape), tuple(c.key.shape), c.is_causal) for c in seen] == [
        ((28, 4, 16), (28, 2, 16), True)
    ] * 2


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_model_that_drops_queries_after_its_mask_is_made(keep, cache):
    """Gemma 4 does, where the logits of few are asked for: what are left are the last, and see what they saw."""
    options = {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 64, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 16,
    }  # fmt: skip
    case = hf_cases.decoder("Gemma4", "Gemma4TextConfig", **options)
    model, inputs = case.build(), case.inputs()
    want = read(model(**inputs))[:, -keep:]
    register("exact", strict=True)
    model.set_attn_implementation("lowbit")
    if cache == "static":
        inputs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=60)
    close(read(model(**inputs, logits_to_keep=keep)), want)


@torch.no_grad()
def test_without_a_mask_the_last_queries_see_what_is_before_them():
    register("exact", strict=True)
    attend = transformers.AttentionInterface._global_mapping["lowbit"]
    module = torch.nn.Module()
    q, k, v = (torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for options in ({}, {"sliding_window": 5}, {"position_bias": torch.randn(1, 2, 12, 12)}):
        whole, _ = attend(module, q, k, v, None, **options)
        some = {n: o[:, :, -4:] if isinstance(o, torch.Tensor) else o for n, o in options.items()}
        last, _ = attend(module, q[:, :, -4:], k, v, None, **some)
        close(last, whole[:, -4:])
    with pytest.raises(InvalidArgumentError, match="whether it reaches to both sides"):
        attend(module, q, k, v, None, is_causal=False, sliding_window=5)


# ---- torch.compile, training, other ways in


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert", "t5"])
def test_compiled(name):
    if name == "gpt_oss" and not hf_cases.NEW:
        pytest.skip(OLD)
    torch._dynamo.reset()
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    report = register(NEAR, strict=True)
    model.set_attn_implementation("lowbit")
    want, calls = read(model(**inputs)), report.ran
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        # (where it is traced, transformers cannot know that nothing is padded, and passes a mask)
        got = read(compiled(**inputs))
        assert (got - want).abs().mean() <= 0.02 * want.abs().mean()
    assert report.ran == 3 * calls
    assert not report.fallbacks


@pytest.mark.skipif(not hf_cases.NEW, reason=OLD)
@torch.no_grad()
def test_packed_compiled():
    torch._dynamo.reset()
    model, ids = CASES["gpt_oss"].build(), CASES["gpt_oss"].inputs(28)["input_ids"][:1]
    model.config.layer_types[:] = ["full_attention"] * 2
    cu = torch.tensor([0, 9, 23, 28], dtype=torch.int32)
    options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "use_cache": False}
    report = register(NEAR, strict=True)
    model.set_attn_implementation("lowbit")
    want = read(model(input_ids=ids, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(read(compiled(input_ids=ids, **options)), want)
    assert report.ran == 4


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_training_without_dropout_is_exact(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    model.train()
    gradients = {}
    for implementation in ("eager", "lowbit"):
        report = register("sage2_8b")
        model.set_attn_implementation(implementation)
        model.zero_grad()
        read(model(**inputs)).square().mean().backward()
        gradients[implementation] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert report.fallbacks == {"gradients are asked for": 2}
    assert gradients["lowbit"].keys() == gradients["eager"].keys()
    for n, grad in gradients["eager"].items():
        torch.testing.assert_close(gradients["lowbit"][n], grad, rtol=1e-3, atol=1e-5 + 1e-4 * float(grad.abs().max()))


@torch.no_grad()
def test_in_half_precision_and_from_the_start():
    """``attn_implementation=`` of the constructor, bfloat16, and two names side by side."""
    config = transformers.LlamaConfig(**hf_cases.DECODER)
    reports = {name: register(recipe, f"lowbit_{name}") for name, recipe in (("a", "sage2_8b"), ("b", NEAR))}
    ids = CASES["llama"].inputs()["input_ids"]
    for name, report in reports.items():
        model = transformers.LlamaForCausalLM._from_config(
            config, attn_implementation=f"lowbit_{name}", dtype=torch.bfloat16
        ).eval()
        out = read(model(input_ids=ids))
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        assert report.by_implementation() == {"emulation": 2}
        assert f"lowbit_{name}" in str(report)
    assert [kind.recipe for report in reports.values() for kind in report.counts] == ["sage2_8b", NEAR]


@torch.no_grad()
def test_auto_on_a_cpu_is_torchs():
    model, inputs = CASES["llama"].build(), CASES["llama"].inputs()
    model.set_attn_implementation("sdpa")
    want = read(model(**inputs))
    report = register()
    model.set_attn_implementation("lowbit")
    torch.testing.assert_close(read(model(**inputs)), want)
    assert (report.calls, report.ran) == (2, 0)
    assert next(iter(report.fallbacks)).startswith("recipe auto: ")


@pytest.mark.skipif(not hf_cases.NEW, reason="this continuous batching is another")
@torch.no_grad()
def test_continuous_batching_is_sdpas_within_a_block():
    """It refuses other names itself, and runs in a thread of its own."""
    model, prompts = CASES["llama"].build(), CASES["llama"].inputs(12)["input_ids"].tolist()
    options = {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    }
    model.set_attn_implementation("sdpa")
    want = model.generate_batch(prompts, **options)
    with sdpa_enabled(model, "exact", strict=True) as report:
        got = model.generate_batch(prompts, **options)
    assert [a.generated_tokens for a in got.values()] == [a.generated_tokens for a in want.values()]
    assert report.ran >= 4 * 2
    register(NEAR)
    model.set_attn_implementation("lowbit")
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        model.generate_batch(prompts, **options)


# ---- policies


def policy_of(model, default="exact", **routes):
    names = {f"model.layers.{n}.self_attn": name for n, name in enumerate(routes.values())}
    recipes = {name: RECIPES[name] for name in {*names.values(), default}}
    return Policy(
        routes={CallKey(path, 0, 0.0): name for path, name in names.items()},
        recipes=recipes, default=default, model=Fingerprint.of(model),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_policy_runs_each_layers_recipe(name, compiled, monkeypatch):
    if compiled and name == "gpt_oss" and not hf_cases.NEW:
        pytest.skip(OLD)
    torch._dynamo.reset()
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    by_hand = []
    for each in ("sage2_8b", "sage2_4b"):
        report = register(each, f"lowbit_{each}")
        by_hand.append(transformers.AttentionInterface._global_mapping[f"lowbit_{each}"])
        assert report.calls == 0

    def each_by_its_own(module, *args, **kwargs):
        return by_hand[module.layer_idx](module, *args, **kwargs)

    for names, function in (
        (transformers.AttentionInterface, each_by_its_own),
        (transformers.masking_utils.AttentionMaskInterface, transformers.masking_utils.sdpa_mask),
    ):
        monkeypatch.setitem(names._global_mapping, "by_hand", function)
    model.set_attn_implementation("by_hand")
    called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    want = read(called(**inputs))
    torch._dynamo.reset()
    report = register(policy_of(model, a="sage2_8b", b="sage2_4b"), model=model, strict=True)
    model.set_attn_implementation("lowbit")
    for _ in range(2):
        torch.testing.assert_close(read(called(**inputs)), want, rtol=1e-5, atol=1e-5)
    assert {kind.recipe: n for kind, n in report.counts.items()} == {"sage2_8b": 2, "sage2_4b": 2}


@torch.no_grad()
def test_a_policy_knows_its_model():
    model, other, inputs = CASES["llama"].build(), CASES["llama"].build(), CASES["llama"].inputs()
    policy = policy_of(model, a="exact", b="sage2_8b")
    with pytest.raises(InvalidArgumentError, match=r"register\(policy, model=model\)"):
        register(policy)
    with pytest.raises(InvalidArgumentError, match="made for another model"):
        register(policy, model=CASES["mistral"].build())
    with pytest.raises(InvalidArgumentError, match="with a policy only"):
        register("sage2_8b", model=model)
    report = register(policy, model=model)
    model.set_attn_implementation("lowbit")
    other.set_attn_implementation("lowbit")
    model(**inputs)
    assert report.fallbacks == {"the policy's recipe is exact": 1}
    assert report.by_implementation() == {"torch": 1, "emulation": 1}
    want = read(CASES["llama"].build()(**inputs))
    report.clear()
    close(read(other(**inputs)), want)
    assert list(report.fallbacks.values()) == [2]
    assert "another model's" in next(iter(report.fallbacks))


def test_a_policys_gradients_are_torchs():
    case = CASES["gpt_oss"]
    model, inputs = case.build(), case.inputs()
    report = register(policy_of(model, a="sage2_8b", b="sage2_4b"), model=model)
    model.set_attn_implementation("lowbit")
    read(model(**inputs)).square().mean().backward()
    assert report.fallbacks == {"gradients are asked for": 2}
    assert all(layer.self_attn.sinks.grad.abs().sum() > 0 for layer in model.model.layers)


@torch.no_grad()
def test_a_policy_that_was_observed():
    """From `observe` to `register`: names are the same, and so is every call's recipe, also while it generates."""
    from lowbit_attention.adaptive import choose, observe

    case = CASES["llama"]
    model, inputs = case.build(), case.inputs()
    model.set_attn_implementation("sdpa")
    with observe(model, candidates=["sage2_8b", "sage2_4b"]) as watch:
        model(**inputs)
    policy = choose(watch.observations, threshold=0.0, recipes=("sage2_4b",)).policy(model)
    report = register(policy, model=model)
    model.set_attn_implementation("lowbit")
    model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert {kind.recipe: n for kind, n in report.counts.items()} == {"sage2_4b": 6}


# ---- what is refused


REFUSED = {
    "softcap": (
        hf_cases.decoder("Gemma2", attn_logit_softcapping=50.0),
        {},
        r"softcap=50\.0.*attn_implementation='eager'",
    ),
    "weights": (CASES["llama"], {"output_attentions": True}, "output_attentions=True.*'eager'"),
    "unknown": (CASES["llama"], {"colour": "red"}, "attention is given colour, which lowbit-attention does not know"),
}


@torch.no_grad()
@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    case, options, message = REFUSED[what]
    model, inputs = case.build(), case.inputs()
    register("sage2_8b")
    model.set_attn_implementation("lowbit")
    with pytest.raises(UnsupportedError, match=message):
        model(**inputs, **options)


def test_dropout_is_refused_by_name():
    model, inputs = CASES["bert"].build(), CASES["bert"].inputs()
    register("sage2_8b")
    model.train().set_attn_implementation("lowbit")
    with pytest.raises(UnsupportedError, match=r"dropout=0\.1: .*call model\.eval\(\)"):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("word", ["indices", "block_indices", "cache"])
def test_what_a_mask_of_others_would_say(word):
    register("sage2_8b")
    attend = transformers.AttentionInterface._global_mapping["lowbit"]
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(UnsupportedError, match=f"{word}: .*'sdpa'"):
        attend(torch.nn.Module(), q, q, q, None, **{word: torch.zeros(1)})
    out, weights = attend(torch.nn.Module(), q, q, q, None, **{word: None})
    assert out.shape == (1, 8, 2, 16)
    assert weights is None


@pytest.mark.skipif(not hf_cases.NEW, reason=OLD)
def test_a_model_that_adds_its_masks_itself_is_refused():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = transformers.BigBirdPegasusModel(
        transformers.BigBirdPegasusConfig(vocab_size=64, d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes)
    ).eval()
    register("exact")
    model.set_attn_implementation("lowbit")
    ids = CASES["llama"].inputs()["input_ids"]
    with pytest.raises(UnsupportedError, match="bigbird_pegasus models add masks to logits by themselves"):
        model(input_ids=ids, decoder_input_ids=ids)


def test_names_and_recipes():
    report = register("sage2_8b")
    assert register("sage2_8b") is not report
    for name in ("flash_lowbit", "my-sdpa", "flex_attention", "eager", "paged|x", "user/repo", "", None):
        with pytest.raises(InvalidArgumentError, match="name="):
            register("sage2_8b", name)
    with pytest.raises(InvalidRecipeError, match="sage9"):
        register("sage9")
    transformers.AttentionInterface.register("theirs", print)
    try:
        with pytest.raises(InvalidArgumentError, match="somebody else's"):
            register("sage2_8b", "theirs")
    finally:
        del transformers.AttentionInterface._global_mapping["theirs"]
    assert RECIPES[NEAR].name == NEAR


def test_after_unregister_transformers_says_so():
    model, inputs = CASES["llama"].build(), CASES["llama"].inputs()
    register("sage2_8b")
    register("sage2_8b", "lowbit_other")
    model.set_attn_implementation("lowbit")
    unregister("lowbit")
    assert "lowbit_other" in transformers.AttentionInterface._global_mapping
    with pytest.raises(KeyError, match="lowbit"):
        model(**inputs)
    unregister("never there")
    model.set_attn_implementation("sdpa")
    model(**inputs)


def test_an_old_transformers_is_told_what_it_lacks(monkeypatch):
    monkeypatch.delattr(transformers.masking_utils, "AttentionMaskInterface")
    with pytest.raises(UnsupportedError, match=r'no registries.*pip install --upgrade "transformers>=4\.56"'):
        register("sage2_8b")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lowbit-attention\[transformers\]"):
        register("sage2_8b")
