"""The Python side of the CUDA kernels: which instances exist, their arguments, their launches."""
