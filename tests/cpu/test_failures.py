"""A kernel that cannot run takes no call down (T32): `auto` and lenient blocks go round it, named recipes say why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_attention import Recipe, attention, attention_varlen, explain, recipe, sdpa, sdpa_enabled
from lowbit_attention.backends import budget, failures
from lowbit_attention.backends.base import Implementation, Output
from lowbit_attention.backends.cuda.jit.cache import CaptureError
from lowbit_attention.backends.cuda.jit.compiled import CompileError
from lowbit_attention.backends.registry import IMPLEMENTATIONS
from lowbit_attention.call.request import Request
from lowbit_attention.errors import FallbackWarning, KernelUnavailableError


class Broken(Implementation):
    """Says that it can, wins, and fails."""

    name = "broken_kernel"
    is_kernel = True
    auto_recipes = (recipe("sage2_8b"),)

    def __init__(self, error: Exception) -> None:
        self.error, self.tried = error, 0

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        return ("it quantises",) if recipe.is_exact else ()

    def expected_speedup(self, request: Request, recipe: Recipe) -> float | None:
        return 2.0

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        self.tried += 1
        raise self.error


ERRORS = {
    "compile": CompileError("x.cu does not compile for sm_90a"),
    "unavailable": KernelUnavailableError("NVRTC is broken", "reinstall it"),
    "launch": RuntimeError("CUDA_ERROR_INVALID_VALUE"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    table = {"sm_90a": {"sage2_8b": {"normal": {4096: 0.04}}}}
    monkeypatch.setattr(budget, "measured", lambda: table)
    failures.forget()
    yield
    failures.forget()


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[Broken]:
    kernel = Broken(ERRORS[request.param])
    IMPLEMENTATIONS.insert(0, kernel)
    yield kernel
    IMPLEMENTATIONS.remove(kernel)


all_errors = pytest.mark.parametrize("broken", ERRORS, indirect=True)


def tokens() -> Tensor:
    return torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))


@all_errors
@pytest.mark.parametrize("door", ["attention", "varlen", "sdpa"])
def test_auto_goes_round_it_with_one_warning(broken: Broken, door: str) -> None:
    x = tokens()
    packed = x[0].transpose(0, 1).contiguous()
    cu = torch.tensor([0, 64], dtype=torch.int32)
    calls = {
        "attention": lambda: attention(x, x, x),
        "varlen": lambda: attention_varlen(packed, packed, packed, cu, cu).transpose(0, 1)[None],
        "sdpa": lambda: sdpa(x, x, x),
    }
    with pytest.warns(FallbackWarning, match="broken_kernel with recipe sage2_8b failed") as told:
        first = calls[door]()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = calls[door]()
    for out in (first, second):
        torch.testing.assert_close(out, F.scaled_dot_product_attention(x, x, x))
    lasting = not isinstance(broken.error, torch.OutOfMemoryError)
    assert broken.tried == (1 if lasting else 2)
    (failure,) = failures.all_failures().values()
    assert str(broken.error).splitlines()[0] in failure.reason
    if lasting:
        assert "failed before in this process" in str(explain(x, x, x))


@all_errors
def test_a_named_recipe_says_what_is_missing(broken: Broken) -> None:
    x = tokens()
    with pytest.raises(type(broken.error)):
        attention(x, x, x, recipe="sage2_8b")
    with sdpa_enabled(recipe="sage2_8b", strict=True), pytest.raises(type(broken.error)):
        F.scaled_dot_product_attention(x, x, x)


@all_errors
@pytest.mark.parametrize("asked", ["auto", "sage2_8b"])
def test_a_lenient_block_falls_back_and_counts(broken: Broken, asked: str) -> None:
    x = tokens()
    with sdpa_enabled(recipe=asked) as report, pytest.warns(FallbackWarning, match="broken_kernel") as told:
        outs = [F.scaled_dot_product_attention(x, x, x) for _ in range(3)]
    assert all(torch.equal(out, sdpa_of_torch(x)) for out in outs)
    assert len(told) == 1
    assert report.calls == 3
    assert report.ran == 0
    lasting = not isinstance(broken.error, torch.OutOfMemoryError)
    assert broken.tried == (1 if lasting else 3)
    assert sum(str(broken.error).splitlines()[0] in reason for reason in report.fallbacks) >= 1


def sdpa_of_torch(x: Tensor) -> Tensor:
    out: Tensor = torch._C._nn.scaled_dot_product_attention(x, x, x)
    return out


def test_a_graph_capture_is_told() -> None:
    """Else the graph would hold the slow way for ever."""
    kernel = Broken(CaptureError("run the call once before the capture"))
    IMPLEMENTATIONS.insert(0, kernel)
    x = tokens()
    try:
        with pytest.raises(CaptureError):
            attention(x, x, x)
        with torch.no_grad(), sdpa_enabled(recipe="auto"), pytest.raises(CaptureError):
            F.scaled_dot_product_attention(x, x, x)
    finally:
        IMPLEMENTATIONS.remove(kernel)
    assert failures.all_failures() == {}
