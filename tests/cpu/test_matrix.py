"""`make matrix`: what it asks pip for, how it finds interpreters, and that its page is of one run.

That the versions work (T27, T28, T29, T30) is what its rows say (docs/versions.md); CI makes two of them anew.
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
    """The table is of the file beside it; its rows are of one wheel, and passed; its floor is the declared one."""
    results = [matrix.Result(**r) for r in json.loads(matrix.JSON.read_text(encoding="utf-8"))]
    assert [r.row for r in results] == [row.name for row in matrix.ROWS]
    assert len({r.wheel for r in results if not r.skipped}) == 1
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert "\n".join(matrix.table(results)) + "\n" in page
    assert all(r.passed or r.skipped for r in results)
    declared = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared is not None
    assert next(r for r in results if r.row == "lowest").versions["torch"].split("+")[0] == declared[1]


def test_a_failed_step_is_shown():
    step = {"step": "imports", "passed": False, "seconds": 1.0, "note": ""}
    result = matrix.Result("lowest", steps=[step, {**step, "passed": True}])
    assert not result.passed
    assert "| 1 of 2 | **failed** |" in list(matrix.table([result]))[-1]
    assert not matrix.Result("lowest").passed  # nothing was run


def test_a_row_that_did_not_run_says_why():
    line = list(matrix.table([matrix.Result("newest-3.13", skipped="no Python 3.13 here")]))[-1]
    assert line == "| newest-3.13 | | | | | | | | not run: no Python 3.13 here |"


def test_the_digest_is_of_what_is_in_the_wheel(tmp_path):
    def wheel(name, record):
        with ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("lowbit_attention-0.1.0.dist-info/RECORD", record)
        return matrix.digest(tmp_path / name)

    assert wheel("a.whl", "x,1") == wheel("b.whl", "x,1") != wheel("c.whl", "x,2")


def test_what_a_machine_sets_for_pip_is_left_aside(monkeypatch):
    """`--pypi`: no mirror, no cap, no wheel of this machine; certificates and proxies stay."""
    monkeypatch.setattr(os, "environ", {"PIP_FIND_LINKS": "/wheels", "PIP_CERT": "/certificates"})
    matrix._only_pypi()
    assert os.environ == {"PIP_CERT": "/certificates", "PIP_CONFIG_FILE": os.devnull}


def test_an_environment_inherits_nothing_that_changes_it(monkeypatch):
    for name in matrix.OURS:
        monkeypatch.setenv(name, "1")
    code = f"import os; print([name for name in {matrix.OURS} if name in os.environ])"
    assert matrix._run([sys.executable, "-c", code], 60).strip() == "[]"
