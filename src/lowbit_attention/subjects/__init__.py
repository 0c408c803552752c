"""Small trained models whose attention is worth quantising: a language model, a diffusion transformer, an encoder."""
