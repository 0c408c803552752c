"""The run-time compiler: CUDA source to machine code by NVRTC, cached on disk. It knows nothing of attention.

No nvcc, no C++ toolchain, no torch headers and no GPU are needed: NVRTC comes as a pip package (the extras ``cuda12``
and ``cuda13``).
"""
