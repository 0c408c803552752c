"""One torch thread per test process when several run side by side: they would only fight for the cores."""

import os

import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
