"""Real models whose steps are timed: which class, how large, called with what. Random weights, real sizes.

A step is one forward of the transformer, as a pipeline makes it: latents (or tokens), text, a mask where the pipeline
gives one. The classes are those of ``diffusers`` and ``transformers``, which are imported when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .base import Unsupported, import_problem, load, package_version

Sizes = Mapping[str, int]
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class StepInputs:
    """What a step is called with.

    Attributes:
        given: keyword arguments, padding and mask among them if the pipeline gives any.
        cut: the same without its padded tokens; ``None`` where there are none, or where inputs alone cannot do it.
        rows: bool ``[B, N]``, the output's tokens that are no padding; ``None``: all.
    """

    given: dict[str, Any]
    cut: dict[str, Any] | None = None
    rows: Tensor | None = None


class Maker:
    """Makes inputs on a device: the same for every run on a kind of device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers, as latents and embedded text roughly are."""
        return torch.randn(size, generator=self._generator, device=self.device, dtype=_DTYPE)

    def tokens(self, *size: int) -> Tensor:
        """Random token ids that every vocabulary has."""
        return torch.randint(1, 1000, size, generator=self._generator, device=self.device, dtype=torch.int64)

    def full(self, size: int, value: float, dtype: torch.dtype = _DTYPE) -> Tensor:
        """``size`` times the same number: a timestep, say."""
        return torch.full((size,), value, device=self.device, dtype=dtype)

    def mask(self, lengths: Sequence[int], padded: int) -> Tensor:
        """Bool ``[B, padded]``, true for each row's first tokens."""
        key = torch.arange(padded, device=self.device, dtype=torch.int64)
        return key < torch.tensor(lengths, device=self.device, dtype=torch.int64)[:, None]


Build = Callable[[Maker, Any, Sizes], StepInputs]
"""Inputs for a model with this configuration (``module.config``) at these sizes."""


@dataclass(frozen=True)
class StepModel:
    """One model: a class of a package, its configuration, and its inputs.

    Attributes:
        gib: what weights and one step take, roughly.
        config, sizes: of the real one; ``tiny_config`` and ``tiny_sizes`` replace some of them for a trial.
        config_class: of ``transformers``, whose models are made from such an object.
    """

    name: str
    title: str
    package: str
    class_name: str
    gib: float
    inputs: Build
    sizes: Sizes
    tiny_sizes: Sizes
    config: Mapping[str, Any] = field(default_factory=dict)
    tiny_config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""

    def not_available_reason(self) -> str | None:
        """Why it cannot be built here, with the command that helps; ``None`` if it can."""
        if problem := import_problem(self.package, f"pip install {self.package}"):
            return problem
        missing = [name for name in (self.class_name, self.config_class) if name and not self._find(name)]
        if missing:
            return f"{self.version()} has no {missing[0]}: pip install --upgrade {self.package}"
        return None

    def version(self) -> str:
        """The package that the class is from, and its version."""
        return f"{self.package} {package_version(self.package)}"

    def build(self, device: torch.device, tiny: bool = False) -> tuple[nn.Module, StepInputs]:
        """The module in bf16 with random weights, the same ones every time, and its inputs."""
        config = {**self.config, **(self.tiny_config if tiny else {})}
        cls = self._find(self.class_name)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), _making(device):
            torch.manual_seed(0)
            module: nn.Module = cls(self._find(self.config_class)(**config)) if self.config_class else cls(**config)
        kept: Sequence[str] = getattr(cls, "_keep_in_fp32_modules", None) or ()
        for name, parameter in module.named_parameters():  # as `from_pretrained` does
            if not set(kept).isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()
        module.to(device).eval().requires_grad_(False)  # (tables that were made by numpy are on the host)
        sizes = {**self.sizes, **(self.tiny_sizes if tiny else {})}
        return module, self.inputs(Maker(device), module.config, sizes)

    def _find(self, name: str) -> Any:
        try:
            return getattr(load(self.package), name, None)
        except Exception as error:  # both packages load a class's module late, which may fail in many ways
            raise Unsupported(f"{self.version()} cannot load {name}: {error}") from error


@contextmanager
def _making(device: torch.device) -> Iterator[None]:
    """New tensors are bf16 and on the device: a model of 40 GB is not made twice, nor first on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPE)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _flux(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    side, text = sizes["side"], sizes["text"]
    at = torch.arange(side, device=make.device, dtype=torch.int64).to(_DTYPE)
    rows, columns = at.repeat_interleave(side), at.repeat(side)
    return StepInputs(
        {
            "hidden_states": make.normal(1, side * side, config.in_channels),
            "encoder_hidden_states": make.normal(1, text, config.joint_attention_dim),
            "pooled_projections": make.normal(1, config.pooled_projection_dim),
            "timestep": make.full(1, 0.5),
            "guidance": make.full(1, 3.5),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1),
            "txt_ids": at.new_zeros(text, 3),
        }
    )


def _sd3(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    return StepInputs(
        {
            "hidden_states": make.normal(2, config.in_channels, sizes["side"], sizes["side"]),
            "encoder_hidden_states": make.normal(2, sizes["text"], config.joint_attention_dim),
            "pooled_projections": make.normal(2, config.pooled_projection_dim),
            "timestep": make.full(2, 500.0),
        }
    )


def _qwen_image(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    side, padded, length = sizes["side"], sizes["text"], sizes["text_used"]
    text = make.normal(1, padded, config.joint_attention_dim)
    given = {
        "hidden_states": make.normal(1, side * side, config.in_channels),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": make.mask([length], padded),
        "timestep": make.full(1, 0.5),
        "img_shapes": [[(1, side, side)]],
    }
    return StepInputs(given, {**given, "encoder_hidden_states": text[:, :length], "encoder_hidden_states_mask": None})


def _wan(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    return StepInputs(
        {
            "hidden_states": make.normal(1, config.in_channels, sizes["frames"], sizes["height"], sizes["width"]),
            "encoder_hidden_states": make.normal(1, sizes["text"], config.text_dim),
            "timestep": make.full(1, 500, torch.int64),
        }
    )


def _hunyuan_video(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    padded, length = sizes["text"], sizes["text_used"]
    text, mask = make.normal(1, padded, config.text_embed_dim), make.mask([length], padded)
    given = {
        "hidden_states": make.normal(1, config.in_channels, sizes["frames"], sizes["height"], sizes["width"]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "pooled_projections": make.normal(1, config.pooled_projection_dim),
        "guidance": make.full(1, 6000.0),
        "timestep": make.full(1, 500, torch.int64),
    }
    # (it makes a mask of its own from the one it is given, so that cutting leaves one which hides nothing)
    cut = {"encoder_hidden_states": text[:, :length], "encoder_attention_mask": mask[:, :length]}
    return StepInputs(given, {**given, **cut})


def _cogvideox(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    frames, height, width = sizes["frames"], sizes["height"], sizes["width"]
    tokens = frames * (height // config.patch_size) * (width // config.patch_size)
    angles = make.normal(tokens, config.attention_head_dim).float()  # any do: only the time counts
    return StepInputs(
        {
            "hidden_states": make.normal(2, frames, config.in_channels, height, width),
            "encoder_hidden_states": make.normal(2, sizes["text"], config.text_embed_dim),
            "timestep": make.full(2, 500, torch.int64),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }
    )


def _ltx_video(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    frames, height, width = sizes["frames"], sizes["height"], sizes["width"]
    padded, length = sizes["text"], sizes["text_used"]
    text = make.normal(2, padded, config.caption_channels)
    given = {
        "hidden_states": make.normal(2, frames * height * width, config.in_channels),
        "encoder_hidden_states": text,
        "encoder_attention_mask": make.mask([length, length], padded),
        "timestep": make.full(2, 500.0),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # 8 frames a latent of 25 a second, 32 x 32 pixels
    }
    return StepInputs(given, {**given, "encoder_hidden_states": text[:, :length], "encoder_attention_mask": None})


def _llama(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    del config
    return StepInputs({"input_ids": make.tokens(1, sizes["tokens"]), "use_cache": False, "logits_to_keep": 1})


def _bert(make: Maker, config: Any, sizes: Sizes) -> StepInputs:
    del config
    batch, padded = sizes["batch"], sizes["tokens"]
    lengths = [padded // 4 + (padded - padded // 4) * row // (batch - 1) for row in range(batch)]
    mask = make.mask(lengths, padded)
    return StepInputs({"input_ids": make.tokens(batch, padded), "attention_mask": mask.long()}, rows=mask)


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 32}
_SMALL_AXES = (8, 12, 12)
_VIDEO = {"frames": 2, "height": 4, "width": 8, "text": 16}

_BERT_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 30522, "attn_implementation": "sdpa",
}  # fmt: skip
_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "attn_implementation": "sdpa",
}  # fmt: skip
_TINY_LANGUAGE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1000,
}  # fmt: skip


def _prefill(tokens: int, gib: float) -> StepModel:
    return StepModel(
        f"llama-8b-{tokens // 1024}k", f"Llama 3.1 8B, prefill of {tokens} tokens", "transformers", "LlamaForCausalLM",
        gib, _llama, {"tokens": tokens}, {"tokens": 32 * tokens // 8192}, _LLAMA_8B,
        {**_TINY_LANGUAGE, "num_key_value_heads": 1}, config_class="LlamaConfig",
    )  # fmt: skip


_FOUND = (
    StepModel(
        "bert-large", "BERT-large, 32 x 512 tokens, a quarter to all of them used", "transformers", "BertModel",
        4, _bert, {"batch": 32, "tokens": 512}, {"batch": 2, "tokens": 24}, _BERT_LARGE, _TINY_LANGUAGE,
        config_class="BertConfig",
    ),
    StepModel(
        "ltx-video", "LTX-Video 2B, 704 x 512, 161 frames, batch 2", "diffusers", "LTXVideoTransformer3DModel",
        9, _ltx_video, {"frames": 21, "height": 16, "width": 22, "text": 128, "text_used": 40},
        {**_VIDEO, "text_used": 6},
        tiny_config={"num_layers": 2, **_SMALL, "cross_attention_dim": 64, "caption_channels": 32, "in_channels": 8},
    ),
    StepModel(
        "flux", "Flux.1 dev 12B, 1024 x 1024", "diffusers", "FluxTransformer2DModel",
        28, _flux, {"side": 64, "text": 512}, {"side": 4, "text": 16}, {"guidance_embeds": True},
        {"num_layers": 1, "num_single_layers": 1, **_SMALL, "joint_attention_dim": 32, "pooled_projection_dim": 32,
         "axes_dims_rope": _SMALL_AXES, "in_channels": 8},
    ),
    StepModel(
        "sd3.5-large", "SD 3.5 large 8B, 1024 x 1024, batch 2", "diffusers", "SD3Transformer2DModel",
        22, _sd3, {"side": 128, "text": 333}, {"side": 8, "text": 16},
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
         "qk_norm": "rms_norm"},
        {"num_layers": 2, **_SMALL, "caption_projection_dim": 64, "pooled_projection_dim": 32,
         "joint_attention_dim": 32},
    ),
    _prefill(8192, 20),
    _prefill(32768, 26),
    StepModel(
        "qwen-image", "Qwen-Image 20B, 1328 x 1328, 200 of 256 text tokens used", "diffusers",
        "QwenImageTransformer2DModel",
        46, _qwen_image, {"side": 83, "text": 256, "text_used": 200}, {"side": 4, "text": 16, "text_used": 10}, {},
        {"num_layers": 2, **_SMALL, "joint_attention_dim": 32, "axes_dims_rope": _SMALL_AXES, "in_channels": 8,
         "out_channels": 2},
    ),
    StepModel(
        "cogvideox-5b", "CogVideoX 5B, 720 x 480, 49 frames, batch 2", "diffusers", "CogVideoXTransformer3DModel",
        20, _cogvideox, {"frames": 13, "height": 60, "width": 90, "text": 226}, {**_VIDEO, "text": 226},
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        {"num_attention_heads": 2, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 32},
    ),
    StepModel(
        "wan-1.3b", "Wan 2.1 1.3B, 480p, 81 frames", "diffusers", "WanTransformer3DModel",
        9, _wan, {"frames": 21, "height": 60, "width": 104, "text": 512}, _VIDEO,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"num_layers": 2, **_SMALL, "ffn_dim": 128, "text_dim": 32},
    ),
    StepModel(
        "hunyuan-video", "HunyuanVideo 13B, 720p, 61 frames, 60 of 256 text tokens used", "diffusers",
        "HunyuanVideoTransformer3DModel",
        42, _hunyuan_video, {"frames": 16, "height": 90, "width": 160, "text": 256, "text_used": 60},
        {**_VIDEO, "text_used": 6}, {},
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, **_SMALL, "text_embed_dim": 32,
         "pooled_projection_dim": 32, "rope_axes_dim": _SMALL_AXES, "in_channels": 4, "out_channels": 4},
    ),
    StepModel(
        "wan-14b", "Wan 2.1 14B, 720p, 81 frames", "diffusers", "WanTransformer3DModel",
        48, _wan, {"frames": 21, "height": 90, "width": 160, "text": 512}, _VIDEO, {},
        {"num_layers": 2, **_SMALL, "ffn_dim": 128, "text_dim": 32},
    ),
)  # fmt: skip

STEP_MODELS: dict[str, StepModel] = {model.name: model for model in _FOUND}
"""The models by name, those with the shorter steps first."""


def find_step_models(names: Sequence[str]) -> list[StepModel]:
    """The models of these names, each once.

    Raises:
        InvalidArgumentError: no such model.
    """
    for name in names:
        if name not in STEP_MODELS:
            raise InvalidArgumentError(f"unknown model {name!r}; known: {', '.join(STEP_MODELS)}")
    return [STEP_MODELS[name] for name in dict.fromkeys(names)]
