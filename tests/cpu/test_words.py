"""One meaning a name: what a class is called says which class it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import lowbit_attention

PACKAGE = Path(lowbit_attention.__file__).parent


def test_no_class_name_is_defined_twice():
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


SIGNATURE = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
SPELLED_IN = {
    "call/torch_call.py: of",
    "functional.py: __call__",
    "integrations/diffusers/calls.py: attention",
    "integrations/diffusers/calls.py: forward_op",
}
"""The one that everything else uses, the public function with its documentation, and two that diffusers calls: it reads
the first one's signature, and calls the second by position."""


def test_torchs_signature_is_spelled_once():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
                if names >= SIGNATURE:
                    found.add(f"{path.relative_to(PACKAGE).as_posix()}: {node.name}")
    assert found == SPELLED_IN
