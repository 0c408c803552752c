"""`make matrix`: what it asks pip for, and how it finds interpreters.

That the versions work (T27, T28, T29, T30) is what its rows say: see docs/versions.md.
"""

import json
import os
import re
import sys
from pathlib import Path
from zipfile import ZipFile

import matrix
import pytest

METADATA = """Metadata-Version: 2.4
Name: lowbit-attention
Version: 0.1.0
Requires-Dist: torch>=2.5.1
Requires-Dist: typer<1,>=0.16
Requires-Dist: colour>=9; platform_system == "Nowhere"
Provides-Extra: cuda13
Requires-Dist: cuda-core[cu13]>=0.7; (platform_system != "Darwin") and extra == "cuda13"
Provides-Extra: demo
Requires-Dist: model==0.1; extra == "demo"
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "lowbit_attention-0.1.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("lowbit_attention-0.1.0.dist-info/METADATA", METADATA)
    return path


def test_floors(wheel):
    assert matrix.floors(wheel, []) == {"torch": "2.5.1", "typer": "0.16"}
    assert matrix.floors(wheel, ["cuda13"]) == {"torch": "2.5.1", "typer": "0.16", "cuda-core": "0.7"}


def test_what_pip_is_asked_for(wheel):
    asked = matrix.requirements(matrix.Row("a", torch="lowest", lowest=True, extras=("cuda13",)), wheel)
    assert asked == [f"{wheel}[cuda13]", "typer==0.16", "cuda-core==0.7", "torch==2.5.1"]
    assert matrix.requirements(matrix.Row("b", torch="2.8.0", also=("numpy",)), wheel) == [
        str(wheel), "torch==2.8.0", "numpy"
    ]  # fmt: skip
    assert matrix.requirements(matrix.Row("c"), wheel) == [str(wheel)]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="shell scripts stand for interpreters")
def test_interpreters(tmp_path, monkeypatch):
    """A shim that does not run, and one that runs another version, are passed over."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert matrix.find_python("") == sys.executable
    assert matrix.find_python("3.99") is None
    script(tmp_path / "python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127")
    assert matrix.find_python("3.99") is None
    kept = script(tmp_path / "pyenv/versions/3.99.1/bin/python3.99", "echo 3.99")
    assert matrix.find_python("3.99") == kept
    assert matrix.find_python("3.98") is None
    script(tmp_path / "python3.98", "echo 3.99")
    assert matrix.find_python("3.98") is None


def test_the_page_shows_what_the_last_run_found():
    """The table is made from the file beside it, every row of it passed, and its floor is the declared one."""
    results = [matrix.Result(**r) for r in json.loads(matrix.JSON.read_text(encoding="utf-8"))]
    assert {r.row for r in results} >= {"lowest", "newest"}
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert "\n".join(matrix.table(results)) + "\n" in page
    assert all(r.passed for r in results)
    declared = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared is not None
    assert next(r for r in results if r.row == "lowest").versions["torch"].split("+")[0] == declared[1]


def test_a_failed_step_is_shown():
    step = {"step": "imports", "passed": False, "seconds": 1.0, "note": ""}
    result = matrix.Result("lowest", steps=[step, {**step, "passed": True}])
    assert not result.passed
    assert "| 1 of 2 | **failed** |" in list(matrix.table([result]))[-1]
    assert not matrix.Result("lowest").passed  # nothing was run
