"""The node folder, loaded as ComfyUI loads one: what it offers, what it does, what it refuses."""

import asyncio
import importlib.util
import inspect
import logging
import re
import sys
from pathlib import Path

import comfy_stub as comfy
import pytest
import torch

from lowbit_attention import RECIPES, InvalidArgumentError
from lowbit_attention.adaptive import Policy

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "comfyui" / "lowbit_attention_nodes"


def load(monkeypatch):
    """By its path, under a name of ComfyUI's own."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nodes(monkeypatch, tmp_path, caplog):
    comfy.install(monkeypatch, tmp_path)
    caplog.set_level(logging.INFO, "lowbit_attention.comfyui")
    return load(monkeypatch)


def offered(nodes):
    return asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())


def defaults(node, **given):
    """A node's inputs as ComfyUI hands them over: every one, by its name."""
    inputs = node.define_schema().inputs
    return {i.id: given.get(i.id, i.options.get("default")) for i in inputs}


def test_what_is_offered(nodes):
    found = offered(nodes)
    assert [n.define_schema().display_name for n in found] == ["Low-bit attention", "Low-bit attention: calibrate"]
    for node in found:
        schema = node.define_schema()
        assert [i.id for i in schema.inputs] == list(inspect.signature(node.execute).parameters)
        assert [o.kind for o in schema.outputs] == ["Model"]
        for i in schema.inputs:
            assert i.kind == "Model" or "default" in i.options, i.id
            assert i.kind != "Combo" or i.options["default"] in i.options["options"]
    recipes = found[0].define_schema().inputs[1].options["options"]
    assert recipes == ["auto", *(name for name in RECIPES if name != "exact")]


def test_calibrate_then_choose_the_policy(nodes, tmp_path, caplog):
    attention, calibrate = offered(nodes)
    model = comfy.ModelPatcher(comfy.DiffusionModel())
    want = comfy.sample(model)
    (watched,) = calibrate.execute(**defaults(calibrate, model=model, name="tiny 1.0")).values
    assert torch.equal(comfy.sample(watched), want)
    file = tmp_path / "lowbit" / "tiny 1.0" / "policy.json"
    assert Policy.load(file).routes
    choice = "policy: tiny 1.0"
    assert choice in attention.define_schema().inputs[1].options["options"]
    (patched,) = attention.execute(**defaults(attention, model=model, recipe=choice, emulate=True)).values
    got = comfy.sample(patched)
    assert not torch.equal(got, want)
    assert "lowbit-attention (a policy): 12 of 12" in caplog.records[-1].getMessage()
    before = attention.fingerprint_inputs(**defaults(attention, recipe=choice))
    assert before == attention.fingerprint_inputs(**defaults(attention, recipe=choice))
    comfy.sample(watched)
    assert before != attention.fingerprint_inputs(**defaults(attention, recipe=choice))
    assert attention.fingerprint_inputs(**defaults(attention)) == ""


def test_by_default_every_call_is_judged_by_auto(nodes, caplog):
    attention, _ = offered(nodes)
    model = comfy.ModelPatcher(comfy.DiffusionModel())
    (patched,) = attention.execute(**defaults(attention, model=model)).values
    assert patched is not model
    assert torch.equal(comfy.sample(patched), comfy.sample(model))
    assert "lowbit-attention (auto): 0 of 12" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", r"a\b", r"\\server\share", "c:x", "", ".", "x.", "x "])
def test_a_workflow_reads_and_writes_no_paths(nodes, name):
    attention, calibrate = offered(nodes)
    model = comfy.ModelPatcher(comfy.DiffusionModel())
    with pytest.raises(InvalidArgumentError, match="no path"):
        calibrate.execute(**defaults(calibrate, model=model, name=name))
    with pytest.raises(InvalidArgumentError, match="no path"):
        attention.execute(**defaults(attention, model=model, recipe=f"policy: {name}"))


def test_a_policy_that_is_gone(nodes):
    attention, _ = offered(nodes)
    model = comfy.ModelPatcher(comfy.DiffusionModel())
    with pytest.raises(InvalidArgumentError, match="gone"):
        attention.execute(**defaults(attention, model=model, recipe="policy: gone"))
    assert attention.fingerprint_inputs(recipe="policy: gone") == "missing"


def test_without_the_package_it_says_what_to_do(monkeypatch, tmp_path):
    comfy.install(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "lowbit_attention", None)
    with pytest.raises(ImportError, match=r"-m pip install .*lowbit-attention"):
        load(monkeypatch)


def test_the_guide_runs(nodes):
    """docs/comfyui.md: its Python, and its names of inputs, recipes and nodes."""
    page = (ROOT / "docs/comfyui.md").read_text(encoding="utf-8")
    model = comfy.ModelPatcher(comfy.DiffusionModel())
    namespace = {"model": model}
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 2
    try:
        for block in blocks:
            exec(compile(block, "docs/comfyui.md", "exec"), namespace)
        comfy.sample(namespace["patched"])
        assert importlib.util.find_spec("sageattention") is not None
    finally:
        namespace["alias"].remove()
    for node in offered(nodes):
        schema = node.define_schema()
        assert schema.display_name.removeprefix("Low-bit attention: ") in page
        for i in schema.inputs[1:]:
            assert f"`{i.id}`" in page or i.id == "name", i.id
    assert "low_precision_attention=False" in page
