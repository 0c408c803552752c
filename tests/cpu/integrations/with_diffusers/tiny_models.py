"""Tiny random configurations of diffusers' transformer classes, and inputs for each.

Every class that can be built is here; docs/diffusers.md has the matrix that comes of them (tools/diffusers_matrix.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

HEADS, DIM = 2, 16
WIDTH = HEADS * DIM
TEXT, TOKENS = 6, 16

Config = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers, small.

    family: models whose attention runs the same code. config: for its constructor. inputs: for its forward, made anew.
    masked: whether some of the inputs are hidden by a mask. compiles: ``aot_eager`` with ``fullgraph``.
    """

    name: str
    family: str
    config: Config
    inputs: Callable[[], Config]
    masked: bool = False
    also: str = ""
    """What tells it from another configuration of the same class."""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.also}" if self.also else self.name

    def build(self) -> nn.Module:
        """With weights that are the same every time, and large enough for attention to matter."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).eval()
        for name, p in model.named_parameters():
            if not p.any() and p.dim() > 1:  # (gates and last layers begin at zero)
                nn.init.normal_(p, std=0.1)
            if name.endswith(("gate", "scale_shift_table")):
                nn.init.normal_(p, std=0.5)
        return model

    def run(self, model: nn.Module) -> Tensor:
        """All that its forward gives, as one vector."""
        torch.manual_seed(1)
        with torch.no_grad():
            return flat(model(**self.inputs()))


def flat(out: Any) -> Tensor:
    """Every tensor in an output of diffusers, one behind another."""
    if isinstance(out, Tensor):
        return out.float().flatten()
    values = out.values() if isinstance(out, dict) else out
    return torch.cat([flat(value) for value in values if value is not None])


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def seen(batch: int, tokens: int, hidden: int = 2, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask ``[batch, tokens]`` whose last are hidden."""
    mask = torch.ones(batch, tokens, dtype=dtype)
    mask[:, tokens - hidden :] = 0
    return mask


def t(value: float = 10.0, batch: int = 1) -> Tensor:
    return torch.full((batch,), value)


def ti(value: int = 10, batch: int = 1) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int64)


AXES = (4, 4, 8)

CASES: list[Tiny] = []


def case(name: str, family: str, config: Config, inputs: Callable[[], Config], **more: Any) -> None:
    CASES.append(Tiny(name, family, config, inputs, **more))


def _heads(**more: Any) -> Config:
    return {"num_attention_heads": HEADS, "attention_head_dim": DIM, **more}


# ---- Flux and what is built like it

case(
    "FluxTransformer2DModel", "flux",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=8,
           axes_dims_rope=AXES, guidance_embeds=True),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "pooled_projections": r(1, 8), "guidance": t(3.0), "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "Flux2Transformer2DModel", "flux2",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, timestep_guidance_channels=8,
           axes_dims_rope=(4, 4, 4, 4)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "guidance": t(3.0), "img_ids": r(1, TOKENS, 4), "txt_ids": r(1, TEXT, 4)},
)  # fmt: skip
case(
    "Flux3Transformer2DModel", "flux3",
    _heads(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
           timestep_channels=8, axes_dims_rope=(4, 4, 4, 4)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(1, TOKENS, 4), "txt_ids": r(1, TEXT, 4)},
)  # fmt: skip
case(
    "ChromaTransformer2DModel", "flux",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=AXES,
           approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3), "attention_mask": seen(1, TEXT + TOKENS)},
    masked=True,
)  # fmt: skip
case(
    "BriaTransformer2DModel", "bria",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=list(AXES)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "BriaFiboTransformer2DModel", "bria_fibo",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=list(AXES),
           text_encoder_dim=16),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "text_encoder_layers": [r(1, TEXT, 16), r(1, TEXT, 16)], "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "BriaFibo2Transformer2DModel", "bria_fibo2",
    {"in_channels": 4, "dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": HEADS, "cap_feat_dim": 16,
     "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
     "gist_step": 2, "gist_min_text_len": 2, "gist_max_text_len": 16, "axes_dims": AXES, "axes_lens": (64, 64, 64)},
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5)},
)  # fmt: skip
case(
    "LongCatImageTransformer2DModel", "flux",
    _heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=8,
           axes_dims_rope=list(AXES)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "OvisImageTransformer2DModel", "flux",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
           axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "AuraFlowTransformer2DModel", "aura_flow",
    _heads(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pos_embed_max_size=64),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5)},
)  # fmt: skip

# ---- Stable Diffusion 3, PixArt, DiT and others of diffusers' first processors

case(
    "SD3Transformer2DModel", "sd3",
    _heads(sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pooled_projection_dim=8, pos_embed_max_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(),
             "pooled_projections": r(1, 8)},
)  # fmt: skip
case(
    "SD3Transformer2DModel", "sd3",
    _heads(sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=(0,),
           qk_norm="rms_norm"),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(),
             "pooled_projections": r(1, 8)},
    also="3.5",
)  # fmt: skip
case(
    "PixArtTransformer2DModel", "attn_processor",
    _heads(sample_size=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=WIDTH, caption_channels=16,
           use_additional_conditions=False),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "DiTTransformer2DModel", "attn_processor",
    _heads(sample_size=8, in_channels=4, out_channels=8, num_layers=1),
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": ti(), "class_labels": ti(3)},
)  # fmt: skip
case(
    "Transformer2DModel", "attn_processor",
    _heads(in_channels=WIDTH, norm_num_groups=4, cross_attention_dim=16),
    lambda: {"hidden_states": r(1, WIDTH, 4, 4), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "DreamLiteTransformer2DModel", "dreamlite",
    _heads(in_channels=WIDTH, norm_num_groups=4, cross_attention_dim=16),
    lambda: {"hidden_states": r(1, WIDTH, 4, 4), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip
case(
    "TransformerTemporalModel", "attn_processor",
    _heads(in_channels=WIDTH, norm_num_groups=4),
    lambda: {"hidden_states": r(4, WIDTH, 2, 2), "num_frames": 4},
)  # fmt: skip
case(
    "PriorTransformer", "attn_processor",
    _heads(num_layers=1, embedding_dim=16, num_embeddings=TEXT, additional_embeddings=4),
    lambda: {"hidden_states": r(1, 16), "timestep": ti(), "proj_embedding": r(1, 16),
             "encoder_hidden_states": r(1, TEXT, 16), "attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "LatteTransformer3DModel", "attn_processor",
    _heads(in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, cross_attention_dim=WIDTH,
           caption_channels=16, norm_type="ada_norm_single", video_length=2, norm_elementwise_affine=False,
           attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanDiT2DModel", "hunyuan_dit",
    _heads(in_channels=4, patch_size=2, sample_size=8, hidden_size=WIDTH, num_layers=2, cross_attention_dim=16,
           cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=4, text_len_t5=4),
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, 4, 16),
             "text_embedding_mask": seen(1, 4), "encoder_hidden_states_t5": r(1, 4, 16),
             "text_embedding_mask_t5": seen(1, 4), "image_meta_size": r(1, 6), "style": torch.zeros(1, dtype=torch.int64),
             "image_rotary_emb": [r(TOKENS, DIM), r(TOKENS, DIM)]},
)  # fmt: skip
case(
    "LuminaNextDiT2DModel", "lumina_next",
    {"sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 1, "num_attention_heads": HEADS,
     "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 16},
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": t(0.5), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_mask": seen(1, TEXT), "cross_attention_kwargs": {},
             "image_rotary_emb": torch.polar(torch.ones(384, 384, DIM // 2), r(384, 384, DIM // 2))},
    masked=True,
)  # fmt: skip
case(
    "Lumina2Transformer2DModel", "lumina2",
    {"sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 1, "num_refiner_layers": 1,
     "num_attention_heads": HEADS, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": AXES,
     "axes_lens": (64, 64, 64), "cap_feat_dim": 16},
    lambda: {"hidden_states": r(2, 4, 8, 8), "timestep": t(0.5, 2), "encoder_hidden_states": r(2, TEXT, 16),
             "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2], dtype=torch.bool)},
    masked=True,
)  # fmt: skip
case(
    "StableAudioDiTModel", "stable_audio",
    _heads(sample_size=8, in_channels=4, out_channels=4, num_layers=1, num_key_value_attention_heads=1,
           cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=16),
    lambda: {"hidden_states": r(1, 4, 8), "timestep": t(0.5), "encoder_hidden_states": r(1, TEXT, 16),
             "global_hidden_states": r(1, 1, 8), "rotary_embedding": (r(9, DIM // 2), r(9, DIM // 2))},
)  # fmt: skip
case(
    "StableAudio3DiTModel", "stable_audio3",
    {"io_channels": 4, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "cond_token_dim": 16, "global_cond_dim": 16,
     "local_add_cond_dim": 5, "timestep_features_dim": 8, "num_memory_tokens": 2},
    lambda: {"hidden_states": r(1, 4, 8), "timestep": t(0.5), "encoder_hidden_states": r(1, TEXT, 16),
             "global_hidden_states": r(1, 16), "local_add_cond": r(1, 5, 8)},
)  # fmt: skip
case(
    "SanaTransformer2DModel", "sana",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=HEADS, cross_attention_head_dim=DIM,
           cross_attention_dim=WIDTH, caption_channels=16, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "SanaVideoTransformer3DModel", "sana_video",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=HEADS, cross_attention_head_dim=DIM,
           cross_attention_dim=WIDTH, caption_channels=16, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "SanaWMTransformer3DModel", "sana_wm",
    {"in_channels": 4, "num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS, "softmax_every_n": 2,
     "linear_head_dim": DIM, "caption_channels": 16, "chunk_plucker_post_attn_blocks": 2, "image_size": 32},
    lambda: {"hidden_states": r(1, 4, 2, 4, 4), "encoder_hidden_states": r(1, 1, TEXT, 16), "timestep": t(0.5)},
)  # fmt: skip
case(
    "CogView3PlusTransformer2DModel", "cogvideox",
    _heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           pos_embed_max_size=8, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "original_size": torch.tensor([[64, 64]]), "target_size": torch.tensor([[64, 64]]),
             "crop_coords": torch.tensor([[0, 0]])},
)  # fmt: skip
case(
    "CogView4Transformer2DModel", "cogview4",
    _heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16)),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "original_size": torch.tensor([[64, 64]]), "target_size": torch.tensor([[64, 64]]),
             "crop_coords": torch.tensor([[0, 0]]), "attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "GlmImageTransformer2DModel", "glm_image",
    _heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           prior_vq_quantizer_codebook_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "prior_token_id": torch.zeros(1, TOKENS, dtype=torch.int64),
             "prior_token_drop": torch.zeros(1, TOKENS, dtype=torch.bool),
             "target_size": torch.tensor([[64, 64]]), "crop_coords": torch.tensor([[0, 0]])},
)  # fmt: skip
case(
    "HiDreamImageTransformer2DModel", "hidream",
    _heads(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, caption_channels=[16, 16],
           text_emb_dim=8, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(8, 4, 4),
           max_resolution=(8, 8), llama_layers=[0, 1], force_inference_output=True),
    lambda: {"hidden_states": r(1, 4, 8, 8), "timesteps": t(), "encoder_hidden_states_t5": r(1, TEXT, 16),
             "encoder_hidden_states_llama3": r(2, 1, TEXT, 16), "pooled_embeds": r(1, 8)},
)  # fmt: skip
case(
    "OmniGenTransformer2DModel", "omnigen",
    {"in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
     "intermediate_size": 32, "num_layers": 1, "pad_token_id": 0, "vocab_size": 16, "max_position_embeddings": 64,
     "original_max_position_embeddings": 64, "pos_embed_max_size": 8, "time_step_dim": 8,
     "rope_scaling": {"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))}},
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": t(0.5), "input_ids": torch.ones(1, TEXT, dtype=torch.int64),
             "input_img_latents": [], "input_image_sizes": {},
             "attention_mask": torch.ones(1, TEXT + 1 + TOKENS, TEXT + 1 + TOKENS),
             "position_ids": torch.arange(TEXT + 1 + TOKENS)[None]},
)  # fmt: skip
case(
    "PRXTransformer2DModel", "prx",
    {"in_channels": 4, "context_in_dim": 16, "hidden_size": WIDTH, "num_heads": HEADS, "depth": 1, "axes_dim": [8, 8]},
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip

# ---- video

_WAN: Config = _heads(
    in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=32, num_layers=1, rope_max_seq_len=32
)


def _wan() -> Config:
    return {"hidden_states": r(1, 4, 2, 8, 8), "timestep": ti(), "encoder_hidden_states": r(1, TEXT, 16)}


case("WanTransformer3DModel", "wan", _WAN, _wan)
case(
    "WanTransformer3DModel", "wan",
    {**_WAN, "image_dim": 16, "added_kv_proj_dim": WIDTH, "pos_embed_seq_len": TEXT * 2},
    lambda: {**_wan(), "encoder_hidden_states": r(1, 512, 16), "encoder_hidden_states_image": r(1, TEXT, 16)}, also="i2v",
)  # fmt: skip
case(
    "WanVACETransformer3DModel", "wan", {**_WAN, "vace_layers": [0], "vace_in_channels": 8},
    lambda: {**_wan(), "control_hidden_states": r(1, 8, 2, 8, 8), "control_hidden_states_scale": torch.ones(1)},
)  # fmt: skip
case("ChronoEditTransformer3DModel", "wan", {**_WAN, "rope_temporal_skip_len": 2}, _wan)
case("SkyReelsV2Transformer3DModel", "skyreels", _WAN, _wan)
case("AnyFlowTransformer3DModel", "anyflow", _WAN, lambda: {**_wan(), "r_timestep": ti(5)})
case(
    "AnyFlowFARTransformer3DModel", "anyflow_far", {**_WAN, "chunk_partition": (1, 1), "full_chunk_limit": 2},
    lambda: {**_wan(), "timestep": torch.full((1, 2), 10), "r_timestep": torch.full((1, 2), 5), "chunk_partition": (1, 1)},
)  # fmt: skip
case(
    "HeliosTransformer3DModel", "helios",
    {**{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 6, 6)},
    lambda: {**_wan(), "indices_hidden_states": torch.arange(2)[None], "indices_latents_history_short": torch.arange(1)[None],
             "indices_latents_history_mid": torch.arange(2)[None], "indices_latents_history_long": torch.arange(4)[None],
             "latents_history_short": r(1, 4, 1, 8, 8), "latents_history_mid": r(1, 4, 2, 8, 8),
             "latents_history_long": r(1, 4, 4, 8, 8)},
)  # fmt: skip
case(
    "WanAnimateTransformer3DModel", "wan_animate",
    {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_channel_sizes":
     {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
     "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
    lambda: {**_wan(), "hidden_states": r(1, 12, 3, 8, 8), "encoder_hidden_states": r(1, 512, 16),
             "encoder_hidden_states_image": r(1, TEXT, 16), "pose_hidden_states": r(1, 4, 2, 8, 8),
             "face_pixel_values": r(1, 3, 5, 16, 16)},
)  # fmt: skip
case(
    "HunyuanVideoTransformer3DModel", "hunyuan_video",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           pooled_projection_dim=8, rope_axes_dim=AXES),
    lambda: {"hidden_states": r(1, 4, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "pooled_projections": r(1, 8), "guidance": t(1000.0)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanVideoFramepackTransformer3DModel", "hunyuan_video",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           pooled_projection_dim=8, rope_axes_dim=AXES, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
    lambda: {"hidden_states": r(1, 4, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "pooled_projections": r(1, 8), "guidance": t(1000.0),
             "image_embeds": r(1, 3, 16), "indices_latents": torch.arange(1)[None], "latents_clean": r(1, 4, 1, 8, 8),
             "indices_latents_clean": torch.arange(1)[None], "latents_history_2x": r(1, 4, 2, 8, 8),
             "indices_latents_history_2x": torch.arange(2)[None], "latents_history_4x": r(1, 4, 4, 8, 8),
             "indices_latents_history_4x": torch.arange(4)[None]},
    masked=True,
)  # fmt: skip
case(
    "HunyuanVideo15Transformer3DModel", "hunyuan_video15",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16,
           image_embed_dim=16, rope_axes_dim=AXES, target_size=16, task_type="t2v"),
    lambda: {"hidden_states": r(1, 4, 1, 4, 4), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "encoder_hidden_states_2": r(1, TEXT, 16),
             "encoder_attention_mask_2": seen(1, TEXT), "image_embeds": torch.zeros(1, 3, 16)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanImageTransformer2DModel", "hunyuan_image",
    _heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           rope_axes_dim=(8, 8)),
    lambda: {"hidden_states": r(1, 4, 4, 4), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "CogVideoXTransformer3DModel", "cogvideox",
    _heads(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=1, sample_width=8,
           sample_height=8, sample_frames=5, max_text_seq_length=TEXT),
    lambda: {"hidden_states": r(1, 2, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti()},
)  # fmt: skip
case(
    "ConsisIDTransformer3DModel", "cogvideox",
    _heads(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=1, sample_width=8,
           sample_height=8, sample_frames=5, max_text_seq_length=TEXT),
    lambda: {"hidden_states": r(1, 2, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti()},
)  # fmt: skip
case(
    "AllegroTransformer3DModel", "allegro",
    _heads(in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=WIDTH, sample_height=8, sample_width=8,
           sample_frames=2, caption_channels=16),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(),
             "attention_mask": torch.ones(1, 2, 8, 8), "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32),
             "image_rotary_emb": ((tuple(r(2, 32, 4) for _ in range(3))), (tuple(r(2, 32, 4) for _ in range(3))))},
    masked=True,
)  # fmt: skip
case(
    "MochiTransformer3DModel", "mochi",
    _heads(in_channels=4, num_layers=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8,
           max_sequence_length=TEXT),
    lambda: {"hidden_states": r(2, 4, 2, 8, 8), "encoder_hidden_states": r(2, TEXT, 16), "timestep": ti(10, 2),
             "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2], dtype=torch.bool)},
)  # fmt: skip
case(
    "LTXVideoTransformer3DModel", "ltx",
    _heads(in_channels=4, out_channels=4, cross_attention_dim=WIDTH, num_layers=1, caption_channels=16),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(),
             "encoder_attention_mask": seen(1, TEXT), "num_frames": 1, "height": 4, "width": 4},
    masked=True,
)  # fmt: skip
_LTX2: Config = _heads(
    in_channels=4, out_channels=4, cross_attention_dim=WIDTH, audio_in_channels=4, audio_out_channels=4,
    audio_num_attention_heads=HEADS, audio_attention_head_dim=DIM, audio_cross_attention_dim=WIDTH, num_layers=1,
    caption_channels=16,
)  # fmt: skip
case(
    "LTX2VideoTransformer3DModel", "ltx2", _LTX2,
    lambda: {"hidden_states": r(1, TOKENS, 4), "audio_hidden_states": r(1, 4, 4), "encoder_hidden_states": r(1, TEXT, 16),
             "audio_encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(), "encoder_attention_mask": seen(1, TEXT),
             "audio_encoder_attention_mask": seen(1, TEXT), "num_frames": 1, "height": 4, "width": 4,
             "audio_num_frames": 4},
    masked=True,
)  # fmt: skip
case(
    "CosmosTransformer3DModel", "cosmos",
    _heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 8, 8)),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "attention_mask": None, "padding_mask": torch.zeros(1, 1, 8, 8)},
)  # fmt: skip
case(
    "EasyAnimateTransformer3DModel", "easyanimate",
    _heads(in_channels=4, out_channels=4, patch_size=2, num_layers=1, mmdit_layers=1, sample_width=8, sample_height=8,
           time_embed_dim=4, text_embed_dim=16),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip
case(
    "MotifVideoTransformer3DModel", "motif_video",
    _heads(in_channels=9, out_channels=4, num_layers=1, num_single_layers=1, text_embed_dim=16, rope_axes_dim=AXES),
    lambda: {"hidden_states": r(1, 9, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "Kandinsky5Transformer3DModel", "kandinsky",
    {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "model_dim": WIDTH,
     "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": AXES},
    lambda: {"hidden_states": r(1, 1, 8, 8, 4), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "pooled_projections": r(1, 8), "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
             "text_rope_pos": torch.arange(TEXT)},
)  # fmt: skip
case(
    "JoyImageEditTransformer3DModel", "joyimage",
    {"in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": 16, "num_layers": 1,
     "rope_dim_list": list(AXES)},
    lambda: {"hidden_states": r(1, 1, 4, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip

# ---- images, newer

case(
    "QwenImageTransformer2DModel", "qwen",
    _heads(patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=16, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 16), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_hidden_states_mask": seen(1, TEXT), "img_shapes": [[(1, 4, 4)]]},
    masked=True,
)  # fmt: skip
case(
    "QwenImage21Transformer2DModel", "qwen21",
    _heads(in_channels=16, out_channels=16, num_layers=1, context_in_dim=16, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 16), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "img_shapes": [[(1, 4, 4)]], "img_mask": torch.ones(1, TOKENS, dtype=torch.bool)},
)  # fmt: skip
case(
    "NucleusMoEImageTransformer2DModel", "nucleus",
    _heads(patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=16, axes_dims_rope=AXES,
           moe_enabled=False),
    lambda: {"hidden_states": r(1, TOKENS, 16), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_hidden_states_mask": seen(1, TEXT), "img_shapes": [(1, 4, 4)]},
    masked=True,
)  # fmt: skip
case(
    "ZImageTransformer2DModel", "z_image",
    {"in_channels": 4, "dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS,
     "cap_feat_dim": 16, "axes_dims": list(AXES), "axes_lens": [256, 64, 64]},
    lambda: {"x": [r(4, 1, 8, 8)], "t": t(0.5), "cap_feats": [r(TEXT, 16)]},
)  # fmt: skip
case(
    "ErnieImageTransformer2DModel", "ernie",
    {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 1, "ffn_hidden_size": 32, "in_channels": 4,
     "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": AXES},
    lambda: {"hidden_states": r(2, 4, 4, 4), "timestep": t(0.5, 2), "text_bth": r(2, TEXT, 16),
             "text_lens": torch.tensor([TEXT, TEXT - 2])},
    masked=True,
)  # fmt: skip
case(
    "Ideogram4Transformer2DModel", "ideogram",
    _heads(in_channels=4, num_layers=1, intermediate_size=32, adaln_dim=8, llm_features_dim=16, mrope_section=(4, 2, 2)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "timestep": t(0.5), "encoder_hidden_states": r(1, TOKENS, 16),
             "position_ids": torch.zeros(1, TOKENS, 3, dtype=torch.int64),
             "segment_ids": torch.zeros(1, TOKENS, dtype=torch.int64),
             "indicator": torch.tensor([[3] * TEXT + [2] * (TOKENS - TEXT)])},
)  # fmt: skip
case(
    "Krea2Transformer2DModel", "krea2",
    _heads(in_channels=4, num_layers=1, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
           text_hidden_dim=WIDTH, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
           text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, 2, WIDTH), "timestep": t(0.5),
             "position_ids": torch.zeros(TEXT + TOKENS, 3), "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip

# ---- sound

case(
    "AceStepTransformer1DModel", "ace_step",
    {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS,
     "num_key_value_heads": 1, "head_dim": DIM, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 4},
    lambda: {"hidden_states": r(1, 16, 4), "timestep": t(0.5), "timestep_r": t(0.5),
             "encoder_hidden_states": r(1, TEXT, WIDTH), "context_latents": r(1, 16, 8)},
)  # fmt: skip
case(
    "LongCatAudioDiTTransformer", "longcat_audio",
    {"dit_dim": WIDTH, "dit_depth": 2, "dit_heads": HEADS, "dit_text_dim": 16, "latent_dim": 4, "ff_mult": 2.0},
    lambda: {"hidden_states": r(1, 8, 4), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_attention_mask": seen(1, TEXT), "attention_mask": seen(1, 8), "latent_cond": r(1, 8, 4)},
    masked=True,
)  # fmt: skip
case(
    "MiniMaxMusic3Transformer1DModel", "minimax_music",
    {"in_channels": 4, "condition_dim": 16, "num_layers": 1, "num_attention_heads": HEADS, "attention_head_dim": DIM,
     "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 8},
    lambda: {"hidden_states": r(1, 4, 8), "timestep": t(0.5), "encoder_hidden_states": r(1, 16, 8)},
)  # fmt: skip
