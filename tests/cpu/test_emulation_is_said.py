"""A named recipe that no kernel can run says so: `on_emulation`, by every door, on played GPUs and on the CPU."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import attention as torch_attention

from lowbit_attention import (
    RECIPES,
    EmulationRefusedError,
    EmulationWarning,
    InvalidArgumentError,
    UnsupportedError,
    attention,
    attention_varlen,
    disable_sdpa,
    enable_sdpa,
    explain,
    make_sdpa,
    sdpa_enabled,
)
from lowbit_attention.adaptive import Policy
from lowbit_attention.backends import dispatch
from lowbit_attention.backends.base import Implementation
from lowbit_attention.backends.cuda import hopper, mma
from lowbit_attention.backends.dispatch import choose, explain_request
from lowbit_attention.backends.registry import IMPLEMENTATIONS
from lowbit_attention.call import request as requests
from lowbit_attention.call.memo import forget_all
from lowbit_attention.call.request import Request, device_name
from lowbit_attention.compat import sageattention
from lowbit_attention.integrations.flash_impl import register_flash_impl
from lowbit_attention.recipes.machine import MACHINES, resolve_machine

CACHED = (mma._arch, mma._device_reasons, mma._recipe_reasons, hopper._device_reasons, device_name)


@pytest.fixture(autouse=True)
def nothing_was_said() -> Iterator[None]:
    forget_all()
    yield
    forget_all()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a GPU (whose kernels can run nothing)."""
    monkeypatch.setattr(requests, "is_gpu", lambda device: True)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests on ``cuda:0`` are on a Hopper card, which there is not."""
    for cached in CACHED:
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    yield
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def request(**changes: Any) -> Request:
    plain = Request(
        recipe=RECIPES["sage2_8b"], machine=None, batch=1, q_heads=8, kv_heads=2, q_len=5000, kv_len=5000,
        head_dim=128, v_head_dim=128, dtype=torch.bfloat16, device=torch.device("cuda", 0),
    )  # fmt: skip
    return replace(plain, **changes)


def tokens(heads: int = 2, length: int = 24, dim: int = 16) -> Tensor:
    return torch.randn(1, heads, length, dim, generator=torch.Generator().manual_seed(0))


def told(call: Callable[[], Any]) -> list[str]:
    """What `EmulationWarning` says of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is EmulationWarning]


# ---- the choice


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"mask": "float", "mask_dtype": torch.float64},
            "it takes float masks of float16, bfloat16 and float32, not torch.float64",
        ),
        ({"head_dim": 256, "v_head_dim": 256}, "head_dim 256 is above 128"),
    ],
)
def test_a_gpu_is_told_once_why_every_kernel_cannot(changes: dict[str, Any], reason: str) -> None:
    (text,) = told(lambda: choose(request(**changes)))
    assert text.startswith(
        "recipe sage2_8b is emulated, far slower than a kernel, as no kernel can run the call (1 × 8"
    )
    for kernel in IMPLEMENTATIONS:
        assert (f"  {kernel.name}: " in text) == kernel.is_kernel
        assert not kernel.is_kernel or f"  {kernel.name}: {reason}" in text
    assert "recipe='auto' runs such calls by exact attention" in text
    assert not told(lambda: choose(request(**changes)))  # an equal request, decided anew
    assert not told(lambda: choose(request(**changes, q_len=700)))  # another, for the same reasons
    assert len(told(lambda: choose(request(**changes, recipe=RECIPES["sage2_4b"])))) == 1
    assert len(told(lambda: choose(request(**changes, q_len=0)))) == 1  # another reason besides


@pytest.mark.usefixtures("h200")
def test_auto_takes_what_the_warning_says() -> None:
    masked = request(recipe=None, mask="float", mask_dtype=torch.float64)
    assert not told(lambda: choose(masked))
    assert choose(masked).recipe.is_exact


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("on_emulation", ["warn", "error", "allow"])
def test_who_asks_for_an_emulation_gets_it(on_emulation: Any) -> None:
    asked = request(machine=MACHINES["sm_90a"], on_emulation=on_emulation)
    assert not told(lambda: choose(asked))
    assert choose(asked).implementation.name == "emulation"
    assert "warning" not in str(explain_request(asked))


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("on_emulation", ["warn", "error", "allow"])
def test_what_a_kernel_runs_is_the_same(on_emulation: Any) -> None:
    class Kernel(Implementation):
        name, is_kernel = "kernel", True

        def not_supported_reasons(self, *_: Any) -> tuple[str, ...]:
            return ()

        run: Any = None

    kernel = Kernel()
    IMPLEMENTATIONS.insert(0, kernel)
    try:
        assert not told(lambda: choose(request(on_emulation=on_emulation)))
        assert choose(request(on_emulation=on_emulation)).implementation is kernel
        assert explain_request(request(on_emulation=on_emulation)).verdicts[-1].reasons == ("kernel comes first",)
    finally:
        IMPLEMENTATIONS.remove(kernel)


@pytest.mark.usefixtures("h200")
def test_error_and_allow() -> None:
    masked = request(mask="float", mask_dtype=torch.float64)
    with pytest.raises(EmulationRefusedError) as error:
        choose(replace(masked, on_emulation="error"))
    assert isinstance(error.value, UnsupportedError)
    assert error.value.reasons["attention_wgmma"] == (
        "it takes float masks of float16, bfloat16 and float32, not torch.float64",
    )
    assert error.value.reasons["emulation"] == ("on_emulation='error' refuses it (like= asks for an emulation)",)
    again = pickle.loads(pickle.dumps(error.value))
    assert (type(again), str(again), again.reasons) == (type(error.value), str(error.value), error.value.reasons)
    assert not told(lambda: choose(replace(masked, on_emulation="allow")))
    with pytest.raises(UnsupportedError) as other:  # (nothing can run that, whatever is allowed)
        choose(replace(masked, on_emulation="error", dropout_p=0.1))
    assert type(other.value) is UnsupportedError


@pytest.mark.usefixtures("h200")
def test_explain_says_it() -> None:
    masked = request(mask="float", mask_dtype=torch.float64)
    assert not told(lambda: explain_request(masked))
    found = {how: explain_request(replace(masked, on_emulation=how)) for how in ("warn", "error", "allow")}
    assert "step fidelity), far slower than a kernel, with one warning" in str(found["warn"])
    assert (found["error"].implementation, found["error"].recipe) == (None, None)
    assert "- emulation [sage2_8b]: on_emulation='error' refuses it" in " ".join(str(found["error"]).split())
    assert found["allow"].implementation == "emulation"
    assert "warning" not in str(found["allow"])


@pytest.mark.usefixtures("h200")
def test_a_remembered_choice_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = request(mask="float", mask_dtype=torch.float64)
    told(lambda: choose(masked))
    monkeypatch.setattr(dispatch, "_decide", None)
    monkeypatch.setattr(Request, "warns_of_emulation", None)
    assert choose(masked).implementation.name == "emulation"


@pytest.mark.usefixtures("h200")
def test_a_filter_that_makes_it_an_error_makes_every_call_one() -> None:
    masked = request(mask="float", mask_dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmulationWarning)
        for _ in range(2):
            with pytest.raises(EmulationWarning):
                choose(masked)
    assert len(told(lambda: choose(masked))) == 1


@pytest.mark.usefixtures("h200")
def test_threads_are_told_once_together() -> None:
    requested = [request(mask="float", mask_dtype=torch.float64) for _ in range(8)]
    threads = [threading.Thread(target=choose, args=(one,)) for one in requested]

    def all_of_them() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(told(all_of_them)) == 1


# ---- the doors


class Model(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)


def by_block(on_emulation: Any, like: str | None = None) -> None:
    with sdpa_enabled(recipe="sage2_8b", like=like, on_emulation=on_emulation) as report:
        F.scaled_dot_product_attention(tokens(), tokens(), tokens())
    assert report.by_implementation() == {"emulation": 1}


def by_enable(on_emulation: Any, like: str | None = None) -> None:
    model = Model()
    report = enable_sdpa(model, "sage2_8b", like=like, on_emulation=on_emulation)
    try:
        model(tokens())
    finally:
        disable_sdpa(model)
    assert report.by_implementation() == {"emulation": 1}


def by_policy(on_emulation: Any, like: str | None = None) -> None:
    policy = Policy(routes={}, recipes={"sage2_8b": RECIPES["sage2_8b"]}, default="sage2_8b")
    with policy.applied(on_emulation=on_emulation, like=like):
        Model()(tokens())
    route = policy.apply(on_emulation=on_emulation, like=like)
    try:
        Model()(tokens())
    finally:
        route.remove()


def by_flash(on_emulation: Any, like: str | None = None) -> None:
    if not hasattr(torch_attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    report = register_flash_impl("sage2_8b", like=like, name="emulated", on_emulation=on_emulation)
    torch_attention.activate_flash_attention_impl("emulated")
    try:
        F.scaled_dot_product_attention(tokens(), tokens(), tokens())
    finally:
        torch_attention.restore_flash_attention_impl()
    assert report.by_implementation() == {"emulation": 1}


def by_varlen(on_emulation: Any, like: str | None = None) -> None:
    q, cu = torch.randn(10, 2, 16), torch.tensor([0, 3, 10])
    attention_varlen(q, q, q, cu, cu, recipe="sage2_8b", like=like, on_emulation=on_emulation)


def by_compiled(on_emulation: Any, like: str | None = None) -> None:
    call = partial(attention, recipe="sage2_8b", like=like, on_emulation=on_emulation)
    torch.compile(lambda q: call(q, q, q) + 1, fullgraph=True, backend="eager")(tokens())


def by_compiled_sdpa(on_emulation: Any, like: str | None = None) -> None:
    call = make_sdpa("sage2_8b", like=like, on_emulation=on_emulation)
    torch.compile(lambda q: call(q, q, q) + 1, fullgraph=True, backend="aot_eager")(tokens())


def by_compiled_block(on_emulation: Any, like: str | None = None) -> None:
    model = torch.compile(Model(), fullgraph=True, backend="eager")
    with sdpa_enabled(model, "sage2_8b", like=like, on_emulation=on_emulation) as report:
        model(tokens())
    assert report.by_implementation() == {"emulation": 1}


def by_export(on_emulation: Any, like: str | None = None) -> None:
    with sdpa_enabled(recipe="sage2_8b", like=like, on_emulation=on_emulation):
        program = torch.export.export(Model(), (tokens(),))
    program.module()(tokens())


DOORS: dict[str, Callable[..., Any]] = {
    "attention": lambda how, like=None: attention(
        tokens(), tokens(), tokens(), recipe="sage2_8b", like=like, on_emulation=how
    ),
    "varlen": by_varlen,
    "make_sdpa": lambda how, like=None: make_sdpa("sage2_8b", like=like, on_emulation=how)(
        tokens(), tokens(), tokens()
    ),
    "sdpa_enabled": by_block,
    "enable_sdpa": by_enable,
    "policy": by_policy,
    "flash": by_flash,
    "compiled": by_compiled,
    "compiled make_sdpa": by_compiled_sdpa,
    "compiled model": by_compiled_block,
    "exported": by_export,
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield DOORS[request.param]


@pytest.mark.usefixtures("gpu")
def test_every_door_warns_once(door: Callable[..., Any]) -> None:
    (text,) = told(lambda: door("warn"))
    assert "recipe sage2_8b is emulated" in text
    assert "attention_wgmma: it runs on Hopper GPUs, not on cpu" in text
    assert not told(lambda: door("warn"))


@pytest.mark.usefixtures("gpu")
def test_every_door_is_silent_where_it_is_allowed_or_asked_for(door: Callable[..., Any]) -> None:
    assert not told(lambda: door("allow"))
    for how in ("warn", "error"):
        assert not told(lambda how=how: door(how, like="sm_90a"))


def test_every_door_is_silent_on_a_cpu(door: Callable[..., Any]) -> None:
    assert not told(lambda: door("warn"))


def test_every_door_refuses_on_any_device(door: Callable[..., Any]) -> None:
    for _ in range(2):
        with pytest.raises(EmulationRefusedError, match="on_emulation='error' refuses it"):
            door("error")


def test_every_door_refuses_another_word(door: Callable[..., Any]) -> None:
    if door is by_compiled:
        pytest.skip("with fullgraph=True torch.compile raises an error of its own that holds ours")
    with pytest.raises(
        InvalidArgumentError, match=r"on_emulation='loud' is not one of 'warn', 'error', 'allow'"
    ) as error:
        door("loud")
    assert type(error.value) is InvalidArgumentError


@pytest.mark.parametrize("wrong", [None, True, ["warn"], b"warn", ""])
def test_nothing_else_is_taken_for_a_word(wrong: Any) -> None:
    q = tokens()
    attention(q, q, q, recipe="sage2_8b")
    with pytest.raises(InvalidArgumentError, match="on_emulation="):
        attention(q, q, q, recipe="sage2_8b", on_emulation=wrong)
    with pytest.raises(InvalidArgumentError, match="on_emulation="):
        explain(q, q, q, on_emulation=wrong)


SAGE: list[Any] = [getattr(sageattention, name) for name in sageattention.__all__ if name != "sageattn_varlen"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("function", SAGE, ids=lambda f: f.__name__)
def test_the_names_of_sageattention(function: Any) -> None:
    q = tokens()
    if function is sageattention.sageattn:  # (auto)
        assert not told(lambda: function(q, q, q))
        function(q, q, q, on_emulation="error")
        function = sageattention.make_sageattn("sage2_8b")
    asks = function is sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90  # (off CUDA, for a Hopper kernel's numbers)
    assert len(told(lambda: function(q, q, q))) == (0 if asks else 1)
    assert not told(lambda: function(q, q, q, on_emulation="allow"))
    with pytest.raises(EmulationRefusedError):
        function(q, q, q, on_emulation="error")
    with pytest.raises(InvalidArgumentError, match="on_emulation='loud'"):
        function(q, q, q, on_emulation="loud")


@pytest.mark.usefixtures("gpu")
def test_the_varlen_name_of_sageattention() -> None:
    q, cu = torch.randn(10, 2, 16), torch.tensor([0, 3, 10])
    call = partial(sageattention.sageattn_varlen, q, q, q, cu, cu, 7, 7)
    assert len(told(call)) == 1
    with pytest.raises(EmulationRefusedError):
        call(on_emulation="error")


@pytest.mark.usefixtures("gpu")
def test_auto_and_exact_never_warn_and_are_never_refused() -> None:
    q = tokens()
    for recipe in ("auto", "exact"):
        for how in ("warn", "error"):
            assert not told(lambda r=recipe, h=how: attention(q, q, q, recipe=r, on_emulation=h))
            assert not told(lambda r=recipe, h=how: make_sdpa(r, on_emulation=h)(q, q, q))


@pytest.mark.usefixtures("gpu")
def test_the_warning_is_about_the_callers_line() -> None:
    q = tokens()
    for recipe, call in {
        "sage2_8b": lambda: attention(q, q, q, recipe="sage2_8b"),
        "sage1": lambda: Model()(q),
    }.items():
        with warnings.catch_warnings(record=True) as caught, sdpa_enabled(recipe=recipe):
            warnings.simplefilter("always")
            call()
        assert [w.filename for w in caught] == [__file__]


# ---- blocks


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_a_lenient_block_refuses_an_emulation_and_leaves_the_rest_to_torch(strict: bool) -> None:
    q, wide = tokens(), tokens(dim=260)
    with sdpa_enabled(recipe="sage2_8b", strict=strict, on_emulation="error") as report:
        with pytest.raises(EmulationRefusedError):
            F.scaled_dot_product_attention(q, q, q)
        assert report.calls == 0
        if not strict:
            F.scaled_dot_product_attention(wide, wide, wide)
            assert report.fallbacks == {"head_dim 260 is above 256": 1}


def test_the_block_as_a_decorator_keeps_it() -> None:
    @sdpa_enabled(recipe="sage2_8b", on_emulation="error")
    def run() -> Tensor:
        return F.scaled_dot_product_attention(tokens(), tokens(), tokens())

    for _ in range(2):
        with pytest.raises(EmulationRefusedError):
            run()


def test_what_make_sdpa_makes_keeps_it() -> None:
    made = make_sdpa("sage2_8b", on_emulation="error")
    assert repr(made) == "make_sdpa('sage2_8b', on_emulation='error')"
    assert made != make_sdpa("sage2_8b")
    for again in (copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        with pytest.raises(EmulationRefusedError):
            again(tokens(), tokens(), tokens())


# ---- remembered, compiled, saved


def test_remembered_calls_are_not_confused() -> None:
    q = tokens()
    attend = partial(attention, q, q, q, recipe="sage2_8b")
    for call in (attend, lambda **o: make_sdpa("sage2_8b", **o)(q, q, q)):
        for _ in range(2):
            call()
            call(on_emulation="allow")
            with pytest.raises(EmulationRefusedError):
                call(on_emulation="error")


@torch.no_grad()
@pytest.mark.usefixtures("gpu")
def test_compiled_code_warns_when_it_runs_and_not_again() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda q: attention(q, q, q, recipe="sage2_8b") + 1, fullgraph=True, backend=counter)
    assert len(told(lambda: [call(tokens()) for _ in range(3)])) == 1
    assert counter.frame_count == 1
    assert not told(lambda: attention(tokens(), tokens(), tokens(), recipe="sage2_8b"))


@pytest.mark.usefixtures("gpu")
def test_compiled_varlen_warns_once() -> None:
    torch._dynamo.reset()
    cu = torch.tensor([0, 3, 10])
    call = torch.compile(lambda q: attention_varlen(q, q, q, cu, cu, recipe="sage2_8b") + 1, backend="eager")
    q = torch.randn(10, 2, 16)
    with torch.no_grad():
        assert len(told(lambda: [call(q) for _ in range(2)])) == 1


def test_the_operators_take_calls_that_were_saved_before() -> None:
    q = tokens()
    before: tuple[Any, ...] = (q, q, q, [], "none", "sage2_8b", False, None, None, "HND", False, None)
    operator = torch.ops.lowbit_attention.attention
    out, _ = operator(*before)
    assert torch.equal(out, attention(q, q, q, recipe="sage2_8b"))
    torch.library.opcheck(operator.default, (*before, "allow"))
    rerouted = torch.ops.lowbit_attention.rerouted_sdpa
    given: tuple[Any, ...] = (q, q, q, None, False, None, False, "sage2_8b", None, False)
    assert torch.equal(rerouted(*given), out)
    assert torch.equal(rerouted(*given, -1, "allow"), out)
    for call in (lambda: operator(*before, "error"), lambda: rerouted(*given, -1, "error")):
        with pytest.raises(EmulationRefusedError):
            call()


def test_a_machine_of_ones_own_asks_too() -> None:
    q = tokens()
    machine = resolve_machine("sm_90a")
    assert attention(q, q, q, recipe="sage2_8b", like=machine, on_emulation="error").shape == q.shape
