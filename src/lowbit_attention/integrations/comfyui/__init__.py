"""ComfyUI: a model whose attention runs by a recipe or a policy, as its nodes do it (docs/comfyui.md).

The nodes themselves are a folder of the repository, ``comfyui/lowbit_attention_nodes``; they need nothing but this.
"""

from .patching import apply, calibrate

__all__ = ["apply", "calibrate"]
