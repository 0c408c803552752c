"""A real language model as witness: SmolLM2-135M under every recipe, at 2K and 8K tokens, on five kinds of text."""
