"""Flux and what is built like it, and the newer models of images."""

from __future__ import annotations

from typing import Any

import torch
from tiny import AXES, HEADS, TEXT, TOKENS, WIDTH, Tiny, heads, r, ragged, seen, t

CASES: list[Tiny] = []


def case(*arguments: Any, **more: Any) -> None:
    CASES.append(Tiny(*arguments, **more))


case(
    "FluxTransformer2DModel", "flux",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=8,
           axes_dims_rope=AXES, guidance_embeds=True),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "pooled_projections": r(1, 8), "guidance": t(3.0), "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "Flux2Transformer2DModel", "flux2",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, timestep_guidance_channels=8,
           axes_dims_rope=(4, 4, 4, 4)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "guidance": t(3.0), "img_ids": r(1, TOKENS, 4), "txt_ids": r(1, TEXT, 4)},
)  # fmt: skip
case(
    "Flux3Transformer2DModel", "flux3",
    heads(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
           timestep_channels=8, axes_dims_rope=(4, 4, 4, 4)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 4), "txt_ids": r(TEXT, 4)},
)  # fmt: skip
case(
    "ChromaTransformer2DModel", "flux",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=AXES,
           approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3), "attention_mask": seen(1, TEXT + TOKENS)},
    masked=True,
)  # fmt: skip
case(
    "BriaTransformer2DModel", "bria",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=list(AXES)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "BriaFiboTransformer2DModel", "bria_fibo",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=list(AXES),
           text_encoder_dim=16),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "text_encoder_layers": [r(1, TEXT, 16), r(1, TEXT, 16)], "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "BriaFibo2Transformer2DModel", "bria_fibo2",
    {"in_channels": 4, "dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": HEADS, "cap_feat_dim": 16,
     "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
     "gist_step": 2, "gist_min_text_len": 2, "gist_max_text_len": 16, "axes_dims": AXES, "axes_lens": (64, 64, 64)},
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, 2, TEXT, 16), "timestep": t(0.5)},
)  # fmt: skip
case(
    "LongCatImageTransformer2DModel", "flux",
    heads(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=8,
           axes_dims_rope=list(AXES)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "OvisImageTransformer2DModel", "flux",
    heads(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
           axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5),
             "img_ids": r(TOKENS, 3), "txt_ids": r(TEXT, 3)},
)  # fmt: skip
case(
    "AuraFlowTransformer2DModel", "aura_flow",
    heads(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=WIDTH,
           caption_projection_dim=WIDTH, pos_embed_max_size=64),
    lambda: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, WIDTH), "timestep": t(0.5)},
)  # fmt: skip
case(
    "QwenImageTransformer2DModel", "qwen",
    heads(patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=16, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 16), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "encoder_hidden_states_mask": seen(1, TEXT), "img_shapes": [[(1, 4, 4)]]},
    masked=True,
)  # fmt: skip
case(
    "QwenImage21Transformer2DModel", "qwen21",
    heads(in_channels=16, out_channels=16, num_layers=1, context_in_dim=16, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 16), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(0.5),
             "img_shapes": [[(1, 4, 4)]],
             "img_mask": torch.tensor([[False] * TEXT + [True] * 4])},
)  # fmt: skip
case(
    "NucleusMoEImageTransformer2DModel", "nucleus",
    heads(patch_size=2, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=16, axes_dims_rope=AXES,
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
             "text_lens": ragged().sum(1)},
    masked=True,
)  # fmt: skip
case(
    "Ideogram4Transformer2DModel", "ideogram",
    heads(in_channels=4, num_layers=1, intermediate_size=32, adaln_dim=8, llm_features_dim=16, mrope_section=(4, 2,
           2)),
    lambda: {"hidden_states": r(1, TOKENS, 4), "timestep": t(0.5), "encoder_hidden_states": r(1, TOKENS, 16),
             "position_ids": torch.zeros(1, TOKENS, 3, dtype=torch.int64),
             "segment_ids": torch.zeros(1, TOKENS, dtype=torch.int64),
             "indicator": torch.tensor([[3] * TEXT + [2] * (TOKENS - TEXT)])},
)  # fmt: skip
case(
    "Krea2Transformer2DModel", "krea2",
    heads(in_channels=4, num_layers=1, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
           text_hidden_dim=WIDTH, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
           text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=AXES),
    lambda: {"hidden_states": r(1, TOKENS, 4), "encoder_hidden_states": r(1, TEXT, 2, WIDTH), "timestep": t(0.5),
             "position_ids": torch.zeros(TEXT + TOKENS, 3), "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip

case(
    "JoyImageEditPlusTransformer3DModel", "joyimage_plus",
    {"in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": 16, "num_layers": 1,
     "rope_dim_list": list(AXES)},
    lambda: {"hidden_states": r(1, 20, 4, 1, 2, 2), "timestep": t(), "encoder_hidden_states": r(1, TEXT, 16),
             "encoder_hidden_states_mask": seen(1, TEXT, dtype=torch.float32), "shape_list": [[(1, 4, 4)]]},
    masked=True,
)  # fmt: skip
case(
    "Kandinsky6Transformer3DModel", "kandinsky6",
    {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
     "model_dim": WIDTH, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": AXES,
     "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
    lambda: {"hidden_states": r(1, 1, 8, 8, 4), "encoder_hidden_states": r(1, TEXT, 16), "timestep": t(),
             "pooled_projections": r(1, 8), "audio_hidden_states": r(1, 4, 4), "encoder_attention_mask": seen(1, TEXT)},
    masked=True,
)  # fmt: skip
case(
    "MiniMaxH3Transformer3DModel", "minimax_h3",
    heads(hidden_size=WIDTH, num_layers=1, num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=4,
           text_dim=16, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=2),
    lambda: {"hidden_states": r(1, 8, 16), "audio_hidden_states": r(1, 4, 4), "encoder_hidden_states": r(1, TEXT, 16),
             "timestep": torch.tensor([0.5]), "timestep_indices": torch.zeros(8 + 4 + TEXT, dtype=torch.int64),
             "token_tags": torch.tensor([1] * TEXT + [0] * 8 + [2] * 4), "position_ids": torch.ones(8 + 4 + TEXT, 3),
             "text_indices": torch.arange(TEXT), "video_indices": torch.arange(TEXT, TEXT + 8),
             "audio_indices": torch.arange(TEXT + 8, TEXT + 12)},
)  # fmt: skip
