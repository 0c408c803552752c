"""Ways into other people's code: PyTorch's own attention call, and what builds on it."""
