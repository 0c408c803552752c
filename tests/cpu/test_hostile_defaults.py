"""S1, S2, S15, T6 : each door as the first call of a process whose defaults are hostile; a fork each (see there)."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import hostile_defaults
import pytest

import lowbit_attention
from lowbit_attention import sdpa_enabled

SCRIPT = Path(hostile_defaults.__file__)


@pytest.fixture(scope="module")
def asked():
    """The process that forks, for all defaults: what it says is wrong under one."""
    source = str(Path(lowbit_attention.__file__).parent.parent)
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip

        def ask(default):
            late = threading.Timer(300, process.kill)
            late.start()
            try:
                print(default, file=process.stdin, flush=True)
                answer = process.stdout.readline()
            finally:
                late.cancel()
            errors.seek(0)
            assert answer, f"it ended: {errors.read()[-2000:]}"
            return json.loads(answer)

        yield ask
        process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("default", hostile_defaults.DEFAULTS)
def test_every_door_first(default, asked):
    problems = asked(default)
    assert not problems, "\n".join(problems)


def test_t6_a_block_made_under_a_meta_device_counts():
    """Also what compiled code gives to torch, where a tensor once counted."""
    import torch
    import torch.nn.functional as F

    x = torch.randn(1, 2, 33, 16, dtype=torch.float32, device="cpu").requires_grad_()
    with torch.device("meta"):
        block = sdpa_enabled(recipe="sage2_8b")
    torch._dynamo.reset()
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)
    with block as report:
        F.scaled_dot_product_attention(x, x, x)
        attend(x)
    assert report.fallbacks == {"gradients are asked for": 2}
