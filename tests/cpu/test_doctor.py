"""The diagnosis of the run-time compiler against the driver."""

import pytest
import torch

from lowbit_attention.cli import diagnosis as doctor
from lowbit_attention.cli.diagnosis import nvrtc_problems


@pytest.mark.parametrize(
    ("nvrtc", "driver_cuda", "words"),
    [
        ({}, None, None),  # no NVIDIA driver: nothing to complain about
        ({"nvidia-cuda-nvrtc": "13.0.48"}, "13.0", None),
        ({"nvidia-cuda-nvrtc-cu12": "12.8.93"}, "12.8", None),
        ({"nvidia-cuda-nvrtc-cu12": "12.9.86"}, "13.0", None),  # an older major runs on a newer driver
        ({}, "13.0", "lowbit-attention[cuda13]"),
        ({}, "12.6", "lowbit-attention[cuda12]"),
        ({}, "11.8", "update the driver"),
        ({"nvidia-cuda-nvrtc": "13.0.48"}, "12.8", "newer than the driver's CUDA 12.8"),
        ({"nvidia-cuda-nvrtc-cu12": "12.4.127"}, "12.8", "older than 12.8"),
        ({"nvidia-cuda-nvrtc-cu12": "unknown"}, "12.8", "older than 12.8"),
    ],
)
def test_nvrtc_problems_name_the_mismatch_and_the_way_out(nvrtc, driver_cuda, words):
    problems = nvrtc_problems(nvrtc, driver_cuda)
    if words is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert words in problems[0]


@pytest.mark.parametrize(
    ("prints", "found"),
    [
        ("| NVIDIA-SMI 580.1   Driver Version: 580.65.06   CUDA Version: 13.0 |", ("580.65.06", "13.0")),
        ("Driver Version: 580.65   CUDA Version: N/A", ("580.65", None)),
        ("Driver Version: .   CUDA Version: ...", (None, None)),
        ("\\377\\376 nonsense [/red] \\033[2J", (None, None)),
        ("CUDA Version: 99999999999999999999.1", (None, None)),
        ("", (None, None)),
    ],
)
def test_whatever_nvidia_smi_prints_is_read_or_not(tmp_path, monkeypatch, prints, found):
    """T37."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(program))
    assert doctor._driver() == found


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    gpus, (problem,) = doctor._gpus()
    assert gpus == ()
    assert "PyTorch cannot use GPU 0 (RuntimeError: CUDA error: unknown error)" in problem
