"""The definition of the numerics, in plain PyTorch, on any device.

``exact`` is attention in float64 or float32 on the original inputs: it judges the *method*.
``attention`` is the emulation of a recipe, tile by tile in the kernels' order: it proves a *kernel*.
"""
