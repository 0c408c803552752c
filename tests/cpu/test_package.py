"""The package's root: lazy, complete, and the same whatever was imported before it."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit_attention

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(lowbit_attention.__file__).parents[1]


def fresh(code, *, path=(), options=()):
    """What a new interpreter prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(SOURCE)])}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=env, timeout=300, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code):
    """The modules that are there after this code."""
    return set(json.loads(fresh(f"{code}\nimport sys, json\nprint(json.dumps(list(sys.modules)))")))


def belong(names, package):
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_the_root_brings_nothing():
    modules = loaded("import lowbit_attention; lowbit_attention.__version__; dir(lowbit_attention)")
    assert belong(modules, "lowbit_attention") == {"lowbit_attention", "lowbit_attention._version"}
    for heavy in (
        "torch",
        "numpy",
        "rich",
        "typer",
        "click",
        "filelock",
        "platformdirs",
        "safetensors",
        "packaging",
        "cuda",
    ):
        assert not belong(modules, heavy), heavy


def test_the_errors_bring_no_torch():
    assert "torch" not in loaded("from lowbit_attention import LowbitError, InvalidArgumentError")


def test_attention_brings_no_more_than_it_needs():
    torchs = loaded("import torch")
    modules = loaded("import torch; from lowbit_attention import attention, recipe") - torchs
    for heavy in ("rich", "typer", "click", "safetensors", "cuda", "numpy", "torch._inductor", "torch._dynamo"):
        assert not belong(modules, heavy), heavy
    for room in ("cli", "bench", "demo", "adaptive", "report", "integrations", "compat"):
        assert not belong(modules, f"lowbit_attention.{room}"), room


def test_the_alias_is_installed_before_torch():
    code = """
import sys
from lowbit_attention.compat.alias import install_as_sageattention
import lowbit_attention.compat
alias = install_as_sageattention("sage2_8b")
from importlib import metadata, util
assert util.find_spec("sageattention") and metadata.version("sageattention").startswith("2.")
assert "torch" not in sys.modules
from sageattention.core import sageattn
import sageattention, torch
assert sageattention.sageattn is sageattn
import lowbit_attention
q = torch.randn(1, 2, 9, 16)
assert torch.equal(sageattn(q, q, q), lowbit_attention.attention(q, q, q, recipe="sage2_8b"))
alias.remove()
assert util.find_spec("sageattention") is None
print("done")
"""
    assert fresh(code) == "done\n"


def test_an_unknown_recipe_is_refused_when_the_alias_is_used_at_the_latest():
    code = """
import sys
from lowbit_attention import InvalidRecipeError
from lowbit_attention.compat import install_as_sageattention
with install_as_sageattention("sage9"):
    assert "torch" not in sys.modules
    for _ in range(2):
        try:
            import sageattention
        except InvalidRecipeError as error:
            print(error)
        assert "sageattention" not in sys.modules
"""
    assert fresh(code).count("sage9") >= 2


def test_a_public_name_is_a_function_or_a_module():
    package = SOURCE / "lowbit_attention"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not modules & set(lowbit_attention.__all__)


def test_the_names_are_written_down_twice_alike():
    """What type checkers see, what is looked up, and what is promised."""
    tree = ast.parse(Path(lowbit_attention.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == lowbit_attention._WHERE
    assert sorted([*seen, "__version__"]) == sorted(lowbit_attention.__all__)
    assert len(set(lowbit_attention.__all__)) == len(lowbit_attention.__all__)


def test_every_name_is_where_it_says():
    for name, module in lowbit_attention._WHERE.items():
        assert getattr(lowbit_attention, name) is getattr(importlib.import_module(f"lowbit_attention.{module}"), name)
    assert set(lowbit_attention.__all__) <= set(dir(lowbit_attention))
    namespace = {}
    exec("from lowbit_attention import *", namespace)
    assert set(lowbit_attention.__all__) <= set(namespace)


def test_submodules_are_attributes():
    code = "import lowbit_attention as l; print(l.api.attention is l.attention, l.ops.__name__)"
    assert fresh(code) == "True lowbit_attention.ops\n"


@pytest.mark.parametrize("name", ["atention", "_private", "__wrapped__", "nothing_of_this_name"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=rf"module 'lowbit_attention' has no attribute '{name}'"):
        getattr(lowbit_attention, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from lowbit_attention import {name}")


def test_a_submodule_that_fails_says_why(tmp_path, monkeypatch):
    """An import that fails inside a submodule is not taken for a name that there is not."""
    (tmp_path / "failing_part.py").write_text("import package_that_is_not_there\n")
    monkeypatch.setattr(lowbit_attention, "__path__", [*lowbit_attention.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_there"):
        lowbit_attention.failing_part  # noqa: B018


def test_threads_that_take_a_first_name_together():
    code = f"""
import threading, lowbit_attention
found, barrier = [], threading.Barrier(8)
def take(name):
    barrier.wait()
    found.append((name, getattr(lowbit_attention, name)))
names = {["recipe", "attention", "sdpa", "sdpa_enabled"] * 2}
threads = [threading.Thread(target=take, args=(name,)) for name in names]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 8
assert all(value is getattr(lowbit_attention, name) and callable(value) for name, value in found)
"""
    fresh(code)


@pytest.mark.parametrize("version", ["2.4.1", "2.4.1+cu121", "2.0", "2.5.0a0+git123"])
@pytest.mark.parametrize("imported", [False, True])
def test_a_torch_that_is_too_old_is_one_line(version, imported, tmp_path):
    """T27. Nothing of torch is imported for it."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    info = tmp_path / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    code = f"""
import sys
{"import torch" if imported else ""}
try:
    import lowbit_attention.api
except ImportError as error:
    print(type(error).__name__, error)
assert ("torch" in sys.modules) == {imported}
"""
    said = fresh(code, path=[tmp_path])
    assert said.startswith("ImportError lowbit-attention")
    assert f"needs torch>=2.5.1, and this is torch {version}: " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "version", ["2.5.1", "2.5.1+cu124", "2.10.0", "2.13.0+cpu", "3.0", "2.6.0a0+df5bbc09d1.nv24.12", "odd"]
)
def test_a_torch_that_is_new_enough_is_taken(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    lowbit_attention._check_torch()


def test_the_floor_is_the_declared_one():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={".".join(map(str, lowbit_attention._MIN_TORCH))}"' in text


def test_names_taken_inside_torch_compile():
    torch._dynamo.reset()

    def call(q):
        return lowbit_attention.attention(q, q, q, recipe=lowbit_attention.recipe("sage2_8b"))

    q = torch.randn(1, 2, 16, 16)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q))


def test_the_package_is_a_command():
    """``python -m lowbit_attention``: where scripts are on no path, as in ComfyUI's portable build."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "lowbit_attention", "recipes"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=300, cwd=ROOT / "tests", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sage2_8b" in done.stdout
