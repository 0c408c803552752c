"""Models of videos."""

from __future__ import annotations

from typing import Any

import torch
from tiny import AXES, DIM, HEADS, TEXT, TOKENS, WIDTH, Config, Tiny, heads, r, ragged, seen, t, ti

CASES: list[Tiny] = []


def case(*arguments: Any, **more: Any) -> None:
    CASES.append(Tiny(*arguments, **more))


_WAN: Config = heads(
    in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=32, num_layers=1, rope_max_seq_len=32
)


def _wan() -> Config:
    return {"hidden_states": r(1, 4, 2, 8, 8), "timestep": ti(), "encoder_hidden_states": r(1, TEXT, 16)}


case("WanTransformer3DModel", "wan", _WAN, _wan)
case(
    "WanTransformer3DModel", "wan",
    {**_WAN, "image_dim": 16, "added_kv_proj_dim": WIDTH, "pos_embed_seq_len": TEXT * 2},
    lambda: {**_wan(), "encoder_hidden_states": r(1, 512, 16),
             "encoder_hidden_states_image": r(2, TEXT, 16)}, also="i2v",
)  # fmt: skip
case(
    "WanVACETransformer3DModel", "wan", {**_WAN, "vace_layers": [0], "vace_in_channels": 8},
    lambda: {**_wan(), "control_hidden_states": r(1, 8, 2, 8, 8), "control_hidden_states_scale": torch.ones(1)},
)  # fmt: skip
case("ChronoEditTransformer3DModel", "wan", {**_WAN, "rope_temporal_skip_len": 2}, _wan)
case("SkyReelsV2Transformer3DModel", "skyreels", _WAN, _wan)
case(
    "AnyFlowTransformer3DModel",
    "anyflow",
    _WAN,
    lambda: {
        **_wan(),
        "hidden_states": r(1, 2, 4, 8, 8),
        "timestep": torch.full((1, 2), 10),
        "r_timestep": torch.full((1, 2), 5),
    },
)
case(
    "AnyFlowFARTransformer3DModel", "anyflow_far", {**_WAN, "chunk_partition": (1, 1), "full_chunk_limit": 2},
    lambda: {**_wan(), "timestep": torch.full((1, 2), 10), "hidden_states": r(1, 2, 4, 8, 8),
             "r_timestep": torch.full((1, 2), 5), "chunk_partition": (1, 1)},
    refuses="requires the 'flex' attention backend",
)  # fmt: skip
case(
    "HeliosTransformer3DModel", "helios",
    {**{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 6, 6)},
    lambda: {**_wan(), "indices_hidden_states": torch.arange(2)[None],
             "indices_latents_history_short": torch.arange(1)[None],
             "indices_latents_history_mid": torch.arange(2)[None],
             "indices_latents_history_long": torch.arange(4)[None],
             "latents_history_short": r(1, 4, 1, 8, 8), "latents_history_mid": r(1, 4, 2, 8, 8),
             "latents_history_long": r(1, 4, 4, 8, 8)},
)  # fmt: skip
case(
    "WanAnimateTransformer3DModel", "wan_animate",
    {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_channel_sizes":
     {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
     "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
     "inject_face_latents_blocks": 1},
    lambda: {**_wan(), "hidden_states": r(1, 12, 3, 8, 8), "encoder_hidden_states": r(1, 512, 16),
             "encoder_hidden_states_image": r(1, TEXT, 16), "pose_hidden_states": r(1, 4, 2, 8, 8),
             "face_pixel_values": r(1, 3, 5, 16, 16)},
)  # fmt: skip
case(
    "HunyuanVideoTransformer3DModel", "hunyuan_video",
    heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           pooled_projection_dim=8, rope_axes_dim=AXES),
    lambda: {"hidden_states": r(1, 4, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "pooled_projections": r(1, 8), "guidance": t(1000.0)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanVideoFramepackTransformer3DModel", "hunyuan_video",
    heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           pooled_projection_dim=8, rope_axes_dim=AXES, has_image_proj=True, image_proj_dim=16,
           has_clean_x_embedder=True),
    lambda: {"hidden_states": r(1, 4, 1, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "pooled_projections": r(1, 8), "guidance": t(1000.0),
             "image_embeds": r(1, 3, 16), "indices_latents": torch.arange(1), "latents_clean": r(1, 4, 1, 8, 8),
             "indices_latents_clean": torch.arange(1), "latents_history_2x": r(1, 4, 2, 8, 8),
             "indices_latents_history_2x": torch.arange(2), "latents_history_4x": r(1, 4, 4, 8, 8),
             "indices_latents_history_4x": torch.arange(4)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanVideo15Transformer3DModel", "hunyuan_video15",
    heads(in_channels=4, out_channels=4, num_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16,
           image_embed_dim=16, rope_axes_dim=AXES, target_size=16, task_type="t2v"),
    lambda: {"hidden_states": r(1, 4, 1, 4, 4), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT), "encoder_hidden_states_2": r(1, TEXT, 16),
             "encoder_attention_mask_2": seen(1, TEXT), "image_embeds": torch.zeros(1, 3, 16)},
    masked=True,
)  # fmt: skip
case(
    "HunyuanImageTransformer2DModel", "hunyuan_image",
    heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
           rope_axes_dim=(8, 8)),
    lambda: {"hidden_states": r(1, 4, 4, 4), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "CogVideoXTransformer3DModel", "cogvideox",
    heads(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=1, sample_width=8,
           sample_height=8, sample_frames=5, max_text_seq_length=TEXT),
    lambda: {"hidden_states": r(1, 2, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti()},
)  # fmt: skip
case(
    "ConsisIDTransformer3DModel", "cogvideox",
    heads(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=1, sample_width=8,
           sample_height=8, sample_frames=5, max_text_seq_length=TEXT),
    lambda: {"hidden_states": r(1, 2, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti()},
)  # fmt: skip
case(
    "AllegroTransformer3DModel", "allegro",
    heads(in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=WIDTH, sample_height=8, sample_width=8,
           sample_frames=2, caption_channels=16),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(),
             "attention_mask": torch.ones(1, 2, 8, 8), "encoder_attention_mask": seen(1, TEXT, dtype=torch.float32)},
    masked=True,
)  # fmt: skip
case(
    "MochiTransformer3DModel", "mochi",
    heads(in_channels=4, num_layers=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8,
           max_sequence_length=TEXT),
    lambda: {"hidden_states": r(2, 4, 2, 8, 8), "encoder_hidden_states": r(2, TEXT, 16), "timestep": ti(10, 2),
             "encoder_attention_mask": ragged()},
    masked=True,
)  # fmt: skip
case(
    "LTXVideoTransformer3DModel", "ltx",
    heads(in_channels=4, out_channels=4, cross_attention_dim=WIDTH, num_layers=1, caption_channels=16),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(),
             "encoder_attention_mask": seen(1, TEXT), "num_frames": 1, "height": 4, "width": 4},
    masked=True,
)  # fmt: skip
_LTX2: Config = heads(
    in_channels=4, out_channels=4, cross_attention_dim=WIDTH, audio_in_channels=4, audio_out_channels=4,
    audio_num_attention_heads=HEADS, audio_attention_head_dim=DIM, audio_cross_attention_dim=WIDTH, num_layers=1,
    caption_channels=16,
)  # fmt: skip
case(
    "LTX2VideoTransformer3DModel", "ltx2", _LTX2,
    lambda: {"hidden_states": r(1, TOKENS, 4), "audio_hidden_states": r(1, 4, 4),
             "encoder_hidden_states": r(1, TEXT, 16),
             "audio_encoder_hidden_states": r(1, TEXT, 16), "timestep": ti(), "encoder_attention_mask": seen(1, TEXT),
             "audio_encoder_attention_mask": seen(1, TEXT), "num_frames": 1, "height": 4, "width": 4,
             "audio_num_frames": 4},
    masked=True,
)  # fmt: skip
case(
    "SanaWMLTX2RefinerTransformer3DModel", "ltx2_refiner",
    _LTX2,
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, 16),
             "timestep": torch.full((1, TOKENS), 10), "video_rotary_emb": (r(1, TOKENS, WIDTH), r(1, TOKENS, WIDTH)),
             "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "CosmosTransformer3DModel", "cosmos",
    heads(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 8, 8),
           concat_padding_mask=False),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip
case(
    "EasyAnimateTransformer3DModel", "easyanimate",
    heads(in_channels=4, out_channels=4, patch_size=2, num_layers=1, mmdit_layers=1, sample_width=8, sample_height=8,
           time_embed_dim=4, text_embed_dim=16),
    lambda: {"hidden_states": r(1, 4, 2, 8, 8), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16)},
)  # fmt: skip
case(
    "MotifVideoTransformer3DModel", "motif_video",
    heads(in_channels=9, out_channels=4, num_layers=1, num_single_layers=1, text_embed_dim=16, rope_axes_dim=AXES),
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
