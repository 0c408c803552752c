"""Who runs a call, and why: every reason is told, `auto` never trades speed or accuracy for nothing.

Kernels are played by a fake `Implementation` put in front of the list, where real ones stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_attention import (
    InvalidRecipeError,
    LowbitError,
    Recipe,
    UnsupportedError,
    attention,
    attention_varlen,
    explain,
    recipe,
    sdpa,
)
from lowbit_attention.backends import budget
from lowbit_attention.backends.base import Implementation, Output
from lowbit_attention.backends.dispatch import AUTO_MIN_LENGTH
from lowbit_attention.backends.registry import IMPLEMENTATIONS
from lowbit_attention.call.request import Request

REAL = ["attention_wgmma", "attention_mma", "torch_sdpa", "tiled_exact", "emulation"]
FAST, ACCURATE = recipe("fast_8b"), recipe("sage2_8b")


@dataclass
class FakeKernel(Implementation):
    """Fills the output with ``value``, so that who ran is seen."""

    name: str = "fake_kernel"  # type: ignore[misc]
    value: float = 42.0
    auto_recipes: tuple[Recipe, ...] = (FAST,)  # type: ignore[misc]
    speedups: dict[str, float] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    is_kernel = True
    decides_by_request = False
    calls: list[str] = field(default_factory=list)

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        gradient = ("fake_kernel has no gradient",) if request.needs_grad else ()
        exact = ("fake_kernel does nothing exactly",) if recipe.is_exact else ()
        return (*self.against, *gradient, *exact)

    def expected_speedup(self, request: Request, recipe: Recipe) -> float | None:
        return self.speedups.get(recipe.name)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        self.calls.append(recipe.name)
        out = q.new_full((*q.shape[:3], v.shape[3]), self.value)
        return out, torch.zeros(q.shape[:3]) if request.return_lse else None


def _l1(**by_family: float) -> dict[str, dict[int, float]]:
    """Errors that were measured at one length, which so stands for all."""
    return {family: {4096: l1} for family, l1 in by_family.items()}


@pytest.fixture(autouse=True)
def errors(monkeypatch: pytest.MonkeyPatch) -> budget.Errors:
    """In place of the measured errors, from which ``auto`` learns who is in its budget: here both recipes are."""
    table = {"sm_89": {name: _l1(normal=0.04, sink=0.02) for name in ("fast_8b", "sage2_8b", "int8_u8")}}
    monkeypatch.setattr(budget, "measured", lambda: table)
    return table


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    fake = FakeKernel()
    IMPLEMENTATIONS.insert(0, fake)
    yield fake
    IMPLEMENTATIONS.remove(fake)


@pytest.fixture
def second() -> Iterator[FakeKernel]:
    fake = FakeKernel(name="second_kernel", value=7.0)
    IMPLEMENTATIONS.insert(0, fake)
    yield fake
    IMPLEMENTATIONS.remove(fake)


def tokens(q_len: int, kv_len: int | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Long inputs that cost no memory."""
    q = torch.ones(1, 1, 1, 8, **options).expand(1, 1, q_len, 8)
    k = torch.ones(1, 1, 1, 8, **options).expand(1, 1, kv_len or q_len, 8)
    return q, k, k


def why(explanation: Any, implementation: str) -> str:
    return "; ".join(reason for v in explanation.verdicts if v.implementation == implementation for reason in v.reasons)


def test_auto_on_cpu_is_torchs_attention() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=g) for _ in range(3))
    told = explain(q, k, v)
    assert (told.implementation, told.recipe, told.asked) == ("torch_sdpa", "exact", "auto")
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0)
    torch.testing.assert_close(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"return_lse": True}, "log-sum-exp"),
        ({"is_causal": True}, "Nq=40, Nk=50"),
        ({"is_causal": True, "causal_alignment": "top_left", "attn_mask": torch.ones(40, 50).bool()}, "not both"),
        ({"attn_mask": torch.ones(40, 50).half()}, "float16"),
    ],
)
def test_what_torch_cannot_do_is_still_exact(options: dict[str, Any], reason: str) -> None:
    told = explain(*tokens(40, 50), **options)
    assert (told.implementation, told.recipe) == ("tiled_exact", "exact")
    assert reason in why(told, "torch_sdpa")


def test_causality_of_equal_lengths_is_torchs() -> None:
    assert explain(*tokens(40), is_causal=True).implementation == "torch_sdpa"


@pytest.mark.parametrize("asked", ["auto", "exact", "sage2_8b", "rotated_4b", "sage2_4b:smooth_q=false"])
def test_every_implementation_has_a_verdict(asked: str, kernel: FakeKernel) -> None:
    told = explain(*tokens(40), recipe=asked)
    assert told.asked == asked
    assert sorted({v.implementation for v in told.verdicts}) == sorted([*REAL, "fake_kernel"])
    assert all(v.reasons and all(v.reasons) for v in told.verdicts)
    chosen = [v for v in told.verdicts if v.chosen]
    assert [(v.implementation, v.recipe) for v in chosen] == [(told.implementation, told.recipe)]
    text = str(told)
    assert told.request in text
    for verdict in told.verdicts:
        assert f"{'+' if verdict.chosen else '-'} {verdict.implementation} [{verdict.recipe}]" in text
        assert all(reason in text for reason in verdict.reasons)


def test_the_request_is_told() -> None:
    q, k = torch.ones(2, 6, 5, 8), torch.ones(2, 3, 7, 8)
    told = explain(q, k, k[..., :4], is_causal=True, attn_mask=torch.ones(5, 7).bool(), return_lse=True)
    for part in ("2 × 6/3 heads", "5(q), 7(kv)", "8/4", "float32", "cpu", "bottom-right", "bool mask", "with lse"):
        assert part in told.request
    top_left = explain(*tokens(4), is_causal=True, causal_alignment="top_left", attn_mask=torch.ones(4, 4))
    assert "top-left" in top_left.request
    assert "float mask" in top_left.request


def test_named_recipe_goes_to_the_kernel(kernel: FakeKernel) -> None:
    """Whatever the length: a named recipe is not a question of speed."""
    kernel.speedups = {"sage2_8b": 0.1}
    q, k, v = tokens(4)
    out, lse = attention(q, k, v, recipe="sage2_8b", return_lse=True)
    assert (out == 42).all()
    assert lse.shape == (1, 1, 4)
    assert kernel.calls == ["sage2_8b"]
    told = explain(q, k, v, recipe="sage2_8b")
    assert (told.implementation, told.recipe) == ("fake_kernel", "sage2_8b")
    assert "comes first" in why(told, "emulation")


def test_named_recipe_is_emulated_where_the_kernel_cannot(kernel: FakeKernel) -> None:
    kernel.against = ("no such card", "no such head_dim")
    told = explain(*tokens(4), recipe="sage2_8b")
    assert told.implementation == "emulation"
    assert why(told, "fake_kernel") == "no such card; no such head_dim"
    assert "sm_89" in why(told, "emulation")
    assert "sm_90a" in why(explain(*tokens(4), recipe="sage2_8b", like="sm_90a"), "emulation")
    attention(*tokens(4), recipe="sage2_8b")
    assert kernel.calls == []


def test_varlen_goes_to_the_kernel(kernel: FakeKernel) -> None:
    q, cu = torch.ones(7, 2, 8), torch.tensor([0, 3, 7])
    assert (attention_varlen(q, q, q, cu, cu, recipe="sage2_8b") == 42).all()


@pytest.mark.parametrize(("speedup", "runs"), [(0.99, "torch_sdpa"), (1.0, "fake_kernel"), (1.01, "fake_kernel")])
@pytest.mark.parametrize("length", [4, AUTO_MIN_LENGTH])
def test_auto_trusts_measurements(kernel: FakeKernel, speedup: float, runs: str, length: int) -> None:
    """At every length; a tie goes to the kernel ("not slower than torch")."""
    kernel.speedups = {"fast_8b": speedup}
    told = explain(*tokens(length))
    assert told.implementation == runs
    assert told.recipe == ("fast_8b" if runs == "fake_kernel" else "exact")
    assert f"expected on cpu: {speedup:.2f}" in why(told, "fake_kernel")


@pytest.mark.parametrize(
    ("q_len", "kv_len", "runs"),
    [
        (AUTO_MIN_LENGTH, AUTO_MIN_LENGTH, "fake_kernel"),
        (AUTO_MIN_LENGTH - 1, AUTO_MIN_LENGTH, "torch_sdpa"),
        (AUTO_MIN_LENGTH, AUTO_MIN_LENGTH - 1, "torch_sdpa"),
        (1, 100_000, "torch_sdpa"),
    ],
)
def test_auto_on_a_card_nobody_timed(kernel: FakeKernel, q_len: int, kv_len: int, runs: str) -> None:
    told = explain(*tokens(q_len, kv_len))
    assert told.implementation == runs
    assert "not timed on this card (cpu)" in why(told, "fake_kernel")
    assert str(AUTO_MIN_LENGTH) in why(told, "fake_kernel")
    if runs == "torch_sdpa":
        assert f"{min(q_len, kv_len)} tokens" in why(told, "fake_kernel")


def test_auto_runs_what_it_says(kernel: FakeKernel) -> None:
    kernel.speedups = {"fast_8b": 2.0}
    assert (attention(*tokens(4)) == 42).all()
    assert (sdpa(*tokens(4)) == 42).all()
    assert kernel.calls == ["fast_8b", "fast_8b"]


def test_auto_takes_the_fastest(kernel: FakeKernel, second: FakeKernel) -> None:
    kernel.auto_recipes = (FAST, ACCURATE)
    kernel.speedups = {"fast_8b": 1.2, "sage2_8b": 1.5}
    second.speedups = {"fast_8b": 1.4}
    told = explain(*tokens(4))
    assert (told.implementation, told.recipe) == ("fake_kernel", "sage2_8b")
    assert "another is faster" in why(told, "second_kernel")
    kernel.speedups["sage2_8b"] = 1.4  # a tie: the first in the list
    assert explain(*tokens(4)).implementation == "second_kernel"


def test_auto_prefers_a_measured_gain_to_a_hope(kernel: FakeKernel, second: FakeKernel) -> None:
    kernel.speedups = {"fast_8b": 1.1}
    assert explain(*tokens(AUTO_MIN_LENGTH)).implementation == "fake_kernel"


def test_auto_leaves_a_kernel_that_cannot(kernel: FakeKernel) -> None:
    kernel.speedups = {"fast_8b": 9.0}
    kernel.against = ("not on Tuesdays",)
    told = explain(*tokens(4))
    assert told.implementation == "torch_sdpa"
    assert why(told, "fake_kernel") == "not on Tuesdays"


def test_auto_keeps_the_error_budget(kernel: FakeKernel, errors: budget.Errors) -> None:
    """L1 at most 1.1 times sage2_8b's, on every family and machine; every excess is told. .022 / .02 is within."""
    kernel.speedups = {"fast_8b": 9.0}
    errors["sm_89"] = {"sage2_8b": _l1(normal=0.04, local=0.02), "fast_8b": _l1(normal=0.01, local=0.0219)}
    assert explain(*tokens(4)).implementation == "fake_kernel"
    errors["sm_90a"] = {"sage2_8b": _l1(normal=0.04, local=0.02), "fast_8b": _l1(normal=0.06, local=0.033)}
    told = explain(*tokens(4))
    assert told.implementation == "torch_sdpa"
    for part in ("normal", "local", "1.36", "1.50", "sm_90a"):
        assert part in why(told, "fake_kernel")
    assert "sm_89" not in why(told, "fake_kernel")
    assert explain(*tokens(4), recipe="fast_8b").implementation == "fake_kernel"  # asked for by name


def test_the_budget_is_that_of_the_length(kernel: FakeKernel, errors: budget.Errors) -> None:
    """Of the keys: a recipe that errs too much on long sequences still runs the short ones."""
    kernel.speedups = {"fast_8b": 9.0}
    errors["sm_89"] = {name: {"drift": {64: 0.01, 128: l1}} for name, l1 in (("sage2_8b", 0.01), ("fast_8b", 0.02))}
    assert explain(*tokens(64)).implementation == "fake_kernel"
    told = explain(*tokens(65))
    assert told.implementation == "torch_sdpa"
    assert "drift (1.82 × what is allowed at 128 tokens)" in why(told, "fake_kernel")


@pytest.mark.parametrize("name", ["sage2_4b", "rotated_4b", "sage2_8b:smooth_v=true"])
def test_auto_never_picks_4_bits_or_the_unmeasured(kernel: FakeKernel, name: str) -> None:
    kernel.auto_recipes = (recipe(name),)
    kernel.speedups = {name: 9.0}
    told = explain(*tokens(4))
    assert told.implementation == "torch_sdpa"
    assert ("4 bits" if "4b" in name else "not measured") in why(told, "fake_kernel")


def test_exact_never_goes_to_a_quantizing_kernel(kernel: FakeKernel) -> None:
    kernel.speedups = {"exact": 9.0, "fast_8b": 9.0}
    assert explain(*tokens(4), recipe="exact").implementation == "torch_sdpa"


def test_gradients(kernel: FakeKernel) -> None:
    """`auto` and `exact` give them, a quantised recipe refuses with every reason; never are they silently cut."""
    kernel.speedups = {"fast_8b": 9.0}
    q = torch.ones(1, 1, 4, 8, requires_grad=True)
    for asked in ("auto", "exact"):
        assert attention(q, q, q, recipe=asked).requires_grad
    assert "needs gradients" in explain(q, q, q).request
    with pytest.raises(UnsupportedError) as caught:
        attention(q, q, q, recipe="sage2_8b")
    assert "no gradient" in str(caught.value)
    assert any("no gradient" in reason for reason in caught.value.reasons["fake_kernel"])
    assert any("torch.no_grad()" in reason for reason in caught.value.reasons["emulation"])
    with torch.no_grad():
        assert (attention(q, q, q, recipe="sage2_8b") == 42).all()
    assert (attention(q.detach(), q.detach(), q.detach(), recipe="sage2_8b") == 42).all()


def test_gradient_of_a_mask_counts() -> None:
    q, k, v = tokens(4)
    bias = torch.zeros(4, 4, requires_grad=True)
    assert attention(q, k, v, attn_mask=bias).requires_grad
    with pytest.raises(UnsupportedError, match="no gradient"):
        attention(q, k, v, attn_mask=bias, recipe="sage2_8b")


def test_gradients_with_lse_are_refused_not_cut() -> None:
    q = torch.ones(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradient") as caught:
        attention(q, q, q, return_lse=True)
    assert set(caught.value.reasons) == set(REAL)


def test_float64() -> None:
    q, k, v = tokens(4, dtype=torch.float64)
    assert attention(q, k, v).dtype == torch.float64
    with pytest.raises(UnsupportedError, match="float64"):
        attention(q, k, v, recipe="sage2_8b")


def test_errors_list_every_reason() -> None:
    q = torch.ones(1, 1, 4, 300, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError) as caught:
        attention(q, q, q, recipe="sage2_8b")
    error = caught.value
    assert isinstance(error, LowbitError)
    assert isinstance(error, NotImplementedError)
    assert list(error.reasons) == REAL
    emulation = "\n".join(error.reasons["emulation"])
    for part in ("float64", "300", "256", "gradient"):
        assert part in emulation
    for name, reasons in error.reasons.items():
        assert reasons
        for reason in reasons:
            assert f"{name}: {reason}" in str(error)
    assert "sage2_8b" in str(error)
    told = explain(q, q, q, recipe="sage2_8b")  # explained, not refused
    assert told.implementation is None
    assert told.recipe is None
    assert not any(v.chosen for v in told.verdicts)
    assert "nothing" in str(told)


@pytest.mark.parametrize("dim", [256, 257])
@pytest.mark.parametrize("which", ["q", "v"])
def test_head_dim_limit(dim: int, which: str) -> None:
    q = torch.ones(1, 1, 4, dim if which == "q" else 8)
    v = torch.ones(1, 1, 4, dim if which == "v" else 8)
    if dim == 256:
        assert attention(q, q, v, recipe="sage2_8b").shape == (1, 1, 4, v.shape[3])
    else:
        with pytest.raises(UnsupportedError, match="257"):
            attention(q, q, v, recipe="sage2_8b")
    assert attention(q, q, v, recipe="exact").shape == (1, 1, 4, v.shape[3])


def test_recipe_and_tiles_must_fit() -> None:
    """Promotion every 96 keys fits no tile of 64 or 128 keys: said before anything runs, and by explain, too."""
    q, k, v = tokens(4)
    odd = "sage2_8b:keys_per_promotion=96"
    for function in (attention, explain):
        with pytest.raises(InvalidRecipeError, match=r"96.*64"):
            function(q, k, v, recipe=odd)
        with pytest.raises(InvalidRecipeError, match=r"96.*128"):
            function(q, k, v, recipe=odd, like="sm_90a")
