"""Other packages' names for what this library does."""

from .alias import SageAttentionAlias, install_as_sageattention

__all__ = ["SageAttentionAlias", "install_as_sageattention"]
