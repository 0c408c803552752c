"""Stable Diffusion 3, PixArt, DiT and others of diffusers' first processors, and sound."""

from __future__ import annotations

from typing import Any

import torch
from tiny import AXES, DIM, HEADS, TEXT, TOKENS, WIDTH, Tiny, heads, r, ragged, seen, t, ti

CASES: list[Tiny] = []


def case(*arguments: Any, **more: Any) -> None:
    CASES.append(Tiny(*arguments, **more))


case(
    "SD3Transformer2DModel", "sd3",
    heads(sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pooled_projection_dim=8, pos_embed_max_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(),
             "pooled_projections": r(1, 8)},
)  # fmt: skip
case(
    "SD3Transformer2DModel", "sd3",
    heads(sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=(0,),
           qk_norm="rms_norm"),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(),
             "pooled_projections": r(1, 8)},
    also="3.5",
)  # fmt: skip
case(
    "PixArtTransformer2DModel", "attn_processor",
    heads(sample_size=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=WIDTH, caption_channels=16,
           use_additional_conditions=False),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "DiTTransformer2DModel", "attn_processor",
    heads(sample_size=8, in_channels=4, out_channels=8, num_layers=1),
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": ti(), "class_labels": ti(3)},
)  # fmt: skip
case(
    "Transformer2DModel", "attn_processor",
    heads(in_channels=WIDTH, norm_num_groups=4, cross_attention_dim=16),
    lambda: {"hidden_states": r(1, WIDTH, 4, 4), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "DreamLiteTransformer2DModel", "dreamlite",
    heads(in_channels=WIDTH, norm_num_groups=4, cross_attention_dim=16),
    lambda: {"hidden_states": r(1, WIDTH, 4, 4), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip
case(
    "TransformerTemporalModel", "attn_processor",
    heads(in_channels=WIDTH, norm_num_groups=4),
    lambda: {"hidden_states": r(4, WIDTH, 2, 2), "num_frames": 4},
)  # fmt: skip
case(
    "PriorTransformer", "attn_processor",
    heads(num_layers=1, embedding_dim=16, num_embeddings=TEXT, additional_embeddings=4),
    lambda: {"hidden_states": r(1, 16), "timestep": ti(), "proj_embedding": r(1, 16),
             "encoder_hidden_states": r(1, TEXT, 16), "attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "LatteTransformer3DModel", "attn_processor",
    heads(in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, cross_attention_dim=WIDTH,
           caption_channels=16, norm_type="ada_norm_single", video_length=2, norm_elementwise_affine=False,
           attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t()},
)  # fmt: skip
case(
    "HunyuanDiT2DModel", "hunyuan_dit",
    heads(in_channels=4, patch_size=2, sample_size=8, hidden_size=WIDTH, num_layers=2, cross_attention_dim=16,
           cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=4, text_len_t5=4),
    lambda: {"hidden_states": r(1, 4, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, 4, 16),
             "text_embedding_mask": seen(1, 4), "encoder_hidden_states_t5": r(1, 4, 16),
             "text_embedding_mask_t5": seen(1, 4), "image_meta_size": r(1, 6),
             "style": torch.zeros(1, dtype=torch.int64),
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
             "encoder_attention_mask": ragged()},
    masked=True,
)  # fmt: skip
case(
    "StableAudioDiTModel", "stable_audio",
    heads(sample_size=8, in_channels=4, out_channels=4, num_layers=1, num_key_value_attention_heads=1,
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
    heads(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=HEADS, cross_attention_head_dim=DIM,
           cross_attention_dim=WIDTH, caption_channels=16, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "SanaVideoTransformer3DModel", "sana_video",
    heads(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=HEADS, cross_attention_head_dim=DIM,
           cross_attention_dim=WIDTH, caption_channels=16, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "SanaWMTransformer3DModel", "sana_wm",
    {"in_channels": 4, "num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS, "softmax_every_n": 2,
     "linear_head_dim": DIM, "caption_channels": 16, "chunk_plucker_post_attn_blocks": 2, "image_size": 32},
    lambda: {"hidden_states": r(1, 4, 2, 4, 4), "encoder_hidden_states": r(1, 1, TEXT, 16),
             "timestep": torch.full((1, 1, 2), 0.5), "mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "CogView3PlusTransformer2DModel", "cogvideox",
    heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           pos_embed_max_size=8, sample_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "original_size": torch.tensor([[64, 64]]), "target_size": torch.tensor([[64, 64]]),
             "crop_coords": torch.tensor([[0, 0]])},
)  # fmt: skip
case(
    "CogView4Transformer2DModel", "cogview4",
    heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16)),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "original_size": torch.tensor([[64, 64]]), "target_size": torch.tensor([[64, 64]]),
             "crop_coords": torch.tensor([[0, 0]]), "attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "GlmImageTransformer2DModel", "glm_image",
    heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
           prior_vq_quantizer_codebook_size=8),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "prior_token_id": torch.zeros(1, TOKENS, dtype=torch.int64),
             "prior_token_drop": torch.zeros(1, TOKENS, dtype=torch.bool),
             "target_size": torch.tensor([[64, 64]]), "crop_coords": torch.tensor([[0, 0]])},
)  # fmt: skip
case(
    "HiDreamImageTransformer2DModel", "hidream",
    heads(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, caption_channels=[16, 16],
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
    lambda: {"hidden_states": r(1, 4, 8), "timestep": t(0.5), "encoder_hidden_states": r(1, 8, 16)},
)  # fmt: skip
