"""Real pipelines with tiny transformers, without text encoders and decoders; offloading, LoRA, IP-Adapter."""

import inspect

import diffusers
import pytest
import reach
import torch
from diffusers import attention_backend
from tiny import TEXT, WIDTH, r
from tiny_models import BY_NAME

from lowbit_attention.adaptive import Fingerprint, Policy, observe
from lowbit_attention.integrations.diffusers import register
from lowbit_attention.recipes.named import RECIPES

NEAR = "int8_fp16"


def transformer(name, **more):
    case = BY_NAME[name]
    torch.manual_seed(0)
    return getattr(diffusers, name)(**{**case.config, **more}).eval()


def flow(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def embeddings(width, *, masks=False, negative=True):
    names = ("", "negative_") if negative else ("",)
    found = {f"{name}prompt_embeds": r(1, TEXT, width) for name in names}
    if masks:
        found |= {f"{name}prompt_attention_mask": torch.ones(1, TEXT) for name in names}
        found["negative_prompt"] = None
    return found


def parts(pipeline, **some):
    """A pipeline of these parts and of none else."""
    every = {name: None for name in inspect.signature(pipeline.__init__).parameters if name != "self"}
    defaults = {
        name: p.default
        for name, p in inspect.signature(pipeline.__init__).parameters.items()
        if p.default is not p.empty
    }
    return pipeline(**{**every, **defaults, **some})


def cases():
    pooled, negative = {"pooled_prompt_embeds": r(1, 8)}, {"negative_pooled_prompt_embeds": r(1, 8)}
    square = {"height": 64, "width": 64}
    wan = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    qwen = {"prompt_embeds_mask": torch.ones(1, TEXT), "negative_prompt_embeds_mask": torch.ones(1, TEXT)}
    hunyuan = {"prompt_attention_mask": torch.ones(1, TEXT), **pooled}
    return {
        "FluxPipeline": ("FluxTransformer2DModel", flow(), {**embeddings(WIDTH, negative=False), **pooled, **square}),
        "StableDiffusion3Pipeline": ("SD3Transformer2DModel", flow(),
                                     {**embeddings(WIDTH), **pooled, **negative, **square}),
        "QwenImagePipeline": ("QwenImageTransformer2DModel", flow(), {**embeddings(16), **qwen, **square}),
        "PixArtSigmaPipeline": ("PixArtTransformer2DModel", diffusers.DDIMScheduler(),
                                {**embeddings(16, masks=True), **square, "use_resolution_binning": False}),
        "SanaPipeline": ("SanaTransformer2DModel", flow(),
                         {**embeddings(16, masks=True), **square, "use_resolution_binning": False}),
        "WanPipeline": ("WanTransformer3DModel", wan, {**embeddings(16), **square, "num_frames": 5}),
        "HunyuanVideoPipeline": ("HunyuanVideoTransformer3DModel", flow(),
                                 {**embeddings(16, negative=False), **hunyuan, **square, "num_frames": 5}),
        "CogVideoXPipeline": ("CogVideoXTransformer3DModel", diffusers.CogVideoXDDIMScheduler(),
                              {**embeddings(16), **square, "num_frames": 5}),
        "LTXPipeline": ("LTXVideoTransformer3DModel", flow(),
                        {**embeddings(16, masks=True), **square, "num_frames": 9}),
        "MochiPipeline": ("MochiTransformer3DModel", flow(), {**embeddings(16, masks=True), **square, "num_frames": 7}),
    }  # fmt: skip


NAMES = list(cases())


def run(pipe, options, steps=2):
    return pipe(**options, num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0))[
        0
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline(name):
    torch.manual_seed(0)
    model, scheduler, options = cases()[name]
    report = register(NEAR)
    pipe = parts(getattr(diffusers, name), transformer=transformer(model), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    with reach.counting() as counted:
        exact = run(pipe, options)
    pipe.transformer.set_attention_backend("lowbit")
    near = run(pipe, options)
    assert report.ran == report.calls == counted.calls > 0
    assert 0 < reach.relative(near, exact) < 1e-2
    pipe.transformer.set_attention_backend("native")
    report.clear()
    with attention_backend("lowbit"):
        run(pipe, options)
    assert report.calls == 0  # (the transformer was given its own)
    pipe.transformer.reset_attention_backend()
    with attention_backend("lowbit"):
        assert torch.equal(run(pipe, options), near)


@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtSigmaPipeline", "WanPipeline", "CogVideoXPipeline"])
def test_a_policy_by_the_pipelines_scheduler(name):
    """The scheduler that is followed does what it did (noise, its own sigmas), and each step has its recipe."""
    torch.manual_seed(0)
    model, scheduler, options = cases()[name]
    if name == "PixArtSigmaPipeline":
        options = {**options, "eta": 1.0}  # (noise at every step, from the generator that is given)
    pipe = parts(getattr(diffusers, name), transformer=transformer(model), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    exact = run(pipe, options, steps=3)
    with observe(pipe.transformer, candidates=[NEAR], timesteps=pipe.scheduler) as watch:
        assert torch.equal(run(pipe, options, steps=3), exact)
    keys = list(watch.observations.records)
    steps = sorted({key.timestep for key in keys})
    assert len(steps) == 3
    recipes = dict(zip(steps, ("sage2_8b", "sage2_4b", "exact"), strict=True))
    routes = {key: recipes[key.timestep] for key in keys}
    policy = Policy(routes, {n: RECIPES[n] for n in recipes.values()}, model=Fingerprint.of(pipe.transformer))
    report = register(policy, timesteps=pipe.scheduler)
    pipe.transformer.set_attention_backend("lowbit")
    for _ in range(2):
        report.clear()
        run(pipe, options, steps=3)
        ran = {kind.recipe: n for kind, n in report.counts.items()}
        assert ran == {recipe: len(keys) // 3 for recipe in recipes.values()}


def test_step_caching_and_a_policy():
    """cache-dit leaves blocks out; those that run have the recipe of their step, whatever was left out before."""
    cache_dit = pytest.importorskip("cache_dit")
    torch.manual_seed(0)
    _, scheduler, options = cases()["FluxPipeline"]
    pipe = parts(
        diffusers.FluxPipeline,
        transformer=transformer("FluxTransformer2DModel", num_layers=2, num_single_layers=2),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    with observe(pipe.transformer, candidates=[NEAR], timesteps="forwards") as watch:
        run(pipe, options, steps=6)
    routes = {key: "sage2_8b" if key.timestep % 2 else "sage2_4b" for key in watch.observations.records}
    policy = Policy(
        routes, {n: RECIPES[n] for n in ("exact", *set(routes.values()))}, model=Fingerprint.of(pipe.transformer)
    )
    report = register(policy, timesteps="forwards")
    pipe.transformer.set_attention_backend("lowbit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=10.0, max_warmup_steps=2
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        run(pipe, options, steps=6)
    finally:
        cache_dit.disable_cache(pipe)
    # (two whole steps of four calls, then the first block of each: 3 of either parity)
    assert {kind.recipe: n for kind, n in report.counts.items()} == {"sage2_4b": 6, "sage2_8b": 6}


CASES = ["FluxTransformer2DModel", "SD3Transformer2DModel"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["accelerate", "block_level", "leaf_level"])
def test_offloading(name, kind):
    """Weights that come for each layer's forward, and go after it."""
    case = BY_NAME[name]
    report = register("sage2_8b")
    model = case.build()
    model.set_attention_backend("lowbit")
    wanted = case.run(model)
    calls = report.calls
    report.clear()
    if kind == "accelerate":
        from accelerate import cpu_offload

        cpu_offload(model, torch.device("cpu"))
    else:
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind,
            **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
        )  # fmt: skip
    assert torch.equal(case.run(model), wanted)
    assert report.ran == report.calls == calls
    model.set_attention_backend("lowbit_int8_fp16")
    assert not torch.equal(case.run(model), wanted)
    assert report.ran == report.calls == 2 * calls


@pytest.mark.parametrize("name", CASES)
def test_lora(name):
    """An adapter in the projections: loaded before the backend is set or after it."""
    from peft import LoraConfig

    case = BY_NAME[name]
    report = register(NEAR)
    model, late = case.build(), case.build()
    plain = case.run(model)
    late.set_attention_backend("lowbit")
    for each in (model, late):
        torch.manual_seed(2)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    with attention_backend("native"), reach.counting() as counted:
        exact = case.run(model)
    assert reach.relative(exact, plain) > 1e-3
    model.set_attention_backend("lowbit")
    report.clear()
    near = case.run(model)
    assert report.ran == report.calls == counted.calls
    assert 0 < reach.relative(near, exact) < 5e-3
    assert torch.equal(case.run(late), near)


def test_ip_adapter():
    """Image tokens attended to beside the text: calls of the adapter's own processors."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    case = BY_NAME["FluxTransformer2DModel"]
    report = register(NEAR)
    model = case.build()
    torch.manual_seed(2)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(WIDTH, WIDTH, num_tokens=(3,), scale=[1.0]))
    image = torch.randn(1, 3, WIDTH)

    def adapted():
        torch.manual_seed(1)
        with torch.no_grad():
            return model(**case.inputs(), joint_attention_kwargs={"ip_hidden_states": [image]}).sample

    with reach.counting() as counted:
        exact = adapted()
    assert counted.calls == 3
    model.set_attention_backend("lowbit")
    near = adapted()
    assert report.ran == report.calls == 3
    assert 0 < reach.relative(near, exact) < 5e-3


def test_ip_adapter_of_a_unet():
    """The first processors, which call torch's function themselves, have an IP-Adapter of their own."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    processors = {
        name: IPAdapterAttnProcessor2_0(32, 16, num_tokens=(3,)) if name.endswith("attn2.processor") else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    model.config.encoder_hid_dim_type = None
    report = register(NEAR)

    def adapted():
        torch.manual_seed(1)
        with torch.no_grad():
            return model(r(1, 4, 8, 8), 5, (r(1, TEXT, 16), [r(1, 1, 3, 16)])).sample

    with reach.counting() as counted:
        exact = adapted()
    model.set_attention_backend("lowbit")
    near = adapted()
    assert report.ran == report.calls == counted.calls > 4
    assert 0 < reach.relative(near, exact) < 5e-3
