"""The diagnosis of the run-time compiler against the driver."""

import pytest

from lowbit_attention.doctor import nvrtc_problems


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
    ],
)
def test_nvrtc_problems_name_the_mismatch_and_the_way_out(nvrtc, driver_cuda, words):
    problems = nvrtc_problems(nvrtc, driver_cuda)
    if words is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert words in problems[0]
