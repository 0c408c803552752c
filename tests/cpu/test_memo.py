"""What is remembered between calls is bounded, and forgotten together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import lowbit_attention
from lowbit_attention import attention, explain, make_sdpa, sdpa_enabled
from lowbit_attention.call.memo import IdentityMemo, Memo, forget_all


def test_a_full_memory_forgets_everything_and_goes_on():
    memo = Memo[int](most=2)
    for key in "abc":
        memo.put(key, ord(key))
    assert (memo.get("a"), memo.get("b"), memo.get("c"), len(memo)) == (None, None, ord("c"), 1)
    by_identity = IdentityMemo[int](most=2)
    objects = [object() for _ in range(3)]
    for number, one in enumerate(objects):
        by_identity.put(number, one)
    assert [by_identity.get(one) for one in objects] == [None, None, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_objects_are_different_ones(count):
    memo = IdentityMemo[str]()
    asked, equal = [[[1]] * count for _ in range(2)]
    memo.put("known", *asked)
    assert (memo.get(*asked), memo.get(*equal)) == ("known", None)


def test_an_object_of_another_life_is_not_taken_for_the_first():
    memo = IdentityMemo[int]()
    for number in range(100):
        one = [number]
        assert memo.get(one) is None
        memo.put(number, one)
    assert len(memo) == 100


def test_forgetting_changes_no_answer():
    q = torch.randn(1, 2, 40, 16)

    def answers():
        with torch.no_grad(), sdpa_enabled() as report:
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return out, attention(q, q, q, recipe="sage2_8b"), make_sdpa("sage2_4b")(q, q, q), report.fallbacks

    first = answers()
    forget_all()
    for mine, again, cold in zip(first, answers(), answers(), strict=True):
        assert torch.equal(mine, again) and torch.equal(mine, cold) if isinstance(mine, torch.Tensor) else mine == again
    assert explain(q, q, q).implementation == "torch_sdpa"


BY_HAND = {"_configs"}
"""A launch's attributes, which belong to one kernel of one thread: `launch.Kernel` drops them with it."""


def test_no_module_has_a_memory_of_its_own_making():
    """Nothing but call/memo.py empties a dictionary because it is full."""
    package = Path(lowbit_attention.__file__).parent
    found = {
        node.func.value.attr if isinstance(node.func.value, ast.Attribute) else getattr(node.func.value, "id", "?")
        for path in package.rglob("*.py")
        if path.name != "memo.py"
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(test, ast.If) and "len(" in ast.unparse(test.test)
        for node in ast.walk(test)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clear"
    }
    assert found <= BY_HAND
