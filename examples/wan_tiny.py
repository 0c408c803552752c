"""Wan's pipeline with a transformer of a few thousand random weights: which attention calls this library ran.

    pip install "lowbit-attention[cuda13,diffusers]"
    python examples/wan_tiny.py

Nothing is downloaded; embeddings stand for the prompt, and latents for the video. With real weights it is the same two
lines: `register()` and `pipe.transformer.set_attention_backend("lowbit")`.
"""

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from lowbit_attention.integrations.diffusers import register

torch.manual_seed(0)
on_gpu = torch.cuda.is_available()
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
    ffn_dim=128, num_layers=2, rope_max_seq_len=64,
).eval()  # fmt: skip
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
pipe.set_progress_bar_config(disable=True)
if on_gpu:
    pipe.to("cuda", torch.bfloat16)

report = register()
# "lowbit" runs what is faster than torch, which is nothing on a CPU; a recipe by name is emulated there
pipe.transformer.set_attention_backend("lowbit_sage2_8b")

prompt = torch.randn(1, 16, 32, device=pipe.device, dtype=transformer.dtype)
latents = pipe(
    prompt_embeds=prompt,
    negative_prompt_embeds=torch.zeros_like(prompt),
    height=64,
    width=64,
    num_frames=9,
    num_inference_steps=2,
    output_type="latent",
).frames
assert latents.isfinite().all()
print(report)
