"""Models of Hugging Face's transformers: ``register()``, then ``model.set_attn_implementation("lowbit")``."""

from .registration import register, unregister

__all__ = ["register", "unregister"]
