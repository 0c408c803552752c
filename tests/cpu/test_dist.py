"""`make dist`: what it would refuse."""

import dist
import pytest

RIGHT = dict.fromkeys(dist.source_files(), 10) | {"lowbit_attention-1.dist-info/licenses/LICENSE": 1}
TEXT = b"""Metadata-Version: 2.4
Name: lowbit-attention
Version: 0.1.0
License-Expression: Apache-2.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.5.1
Description-Content-Type: text/markdown

# Words
"""


def test_a_right_wheel():
    assert list(dist.problems(RIGHT, dist.LARGEST)) == []


@pytest.mark.parametrize("name", [f"lowbit_attention/{name}" for name in dist.NEEDED] + ["lowbit_attention/api.py"])
def test_a_file_that_is_missing(name):
    found = list(dist.problems({n: size for n, size in RIGHT.items() if n != name}, 1))
    assert any(name in problem for problem in found)


def test_no_licence():
    assert "the licence is missing" in list(dist.problems({n: 1 for n in RIGHT if "LICENSE" not in n}, 1))


@pytest.mark.parametrize(
    "name",
    [
        "lowbit_attention/__pycache__/api.cpython-311.pyc",
        "tests/cpu/test_ops.py",
        "lowbit_attention/tests/a.py",
        "docs/a.md",
    ],
)
def test_a_file_too_many(name):
    assert any(name in problem for problem in dist.problems(RIGHT | {name: 1}, 1))


def test_a_wheel_that_grew():
    (problem,) = dist.problems(RIGHT | {"lowbit_attention/api.py": 10**9}, dist.LARGEST + 1)
    assert str(dist.LARGEST + 1) in problem
    assert "largest files: lowbit_attention/api.py" in problem


def test_metadata():
    assert list(dist.metadata_problems(TEXT)) == []


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (b"torch>=2.5.1", b"torch>>2", "torch"),
        (b"text/markdown", b"text/x-rst", "README"),
        (b"License-Expression: Apache-2.0\n", b"", "licence"),
        (b"Requires-Python: >=3.10\n", b"", "Requires-Python"),
        (b"Version: 0.1.0", b"Version: one", "one"),
    ],
)
def test_metadata_that_an_index_would_refuse(old, new, word):
    assert any(word in problem for problem in dist.metadata_problems(TEXT.replace(old, new)))
