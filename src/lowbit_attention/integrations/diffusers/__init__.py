"""Recipes as attention backends of diffusers: `register`, then ``pipe.transformer.set_attention_backend("lowbit")``.

Imported before diffusers, it makes ``DIFFUSERS_ATTN_BACKEND=lowbit`` work, which diffusers reads while it is imported.
"""

from .at_import import obey_environment
from .registration import register, unregister

__all__ = ["register", "unregister"]

obey_environment()
