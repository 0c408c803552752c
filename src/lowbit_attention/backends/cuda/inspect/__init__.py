"""Kernels looked at without a GPU: registers, spills, instructions."""
