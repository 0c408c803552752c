"""Answers that should be refusals, or right: T7 to T10, T12, T13, S3, S8, S10."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from situation import Situation, gives, holds, refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_attention import (
    InvalidArgumentError,
    InvalidRecipeError,
    UnsupportedError,
    attention,
    attention_varlen,
    explain,
    make_sdpa,
    recipe,
    sdpa,
    sdpa_enabled,
)
from lowbit_attention.adaptive import observe
from lowbit_attention.recipes.machine import MACHINES

RECIPE = "sage2_8b"
Call = Callable[..., Tensor]


def qkv(*, length: int = 8, dim: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, dim, generator=g).to(dtype) for _ in range(3)]


def rerouted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with sdpa_enabled(recipe=RECIPE, training="refuse"):
        return F.scaled_dot_product_attention(q, k, v, **options)


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, q.shape[2]], device=q.device)
    return attention_varlen(*(t[0].transpose(0, 1) for t in (q, k, v)), cu, cu, recipe=RECIPE)


sdpa_8b = make_sdpa(RECIPE)
DOORS: dict[str, Call] = {
    "attention": lambda q, k, v, **o: attention(q, k, v, recipe=RECIPE, **o),
    "attention_varlen": varlen,
    "make_sdpa": sdpa_8b,
    "sdpa_enabled": rerouted,
}


def compiled(function: Call, **options: Any) -> Call:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", **options)


# ---- T7: forward-mode AD


def dual(call: Call) -> Any:
    q, k, v = qkv()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(q, torch.ones_like(q)), k, v)).tangent


def dual_value(call: Call) -> Any:
    q, k, v = qkv()
    with torch.no_grad(), forward_ad.dual_level():
        return call(q, k, forward_ad.make_dual(v, torch.ones_like(v)))


def dual_mask(call: Call) -> Any:
    mask = torch.zeros(8, 8)
    with forward_ad.dual_level():
        return call(*qkv(), attn_mask=forward_ad.make_dual(mask, mask))


def transformed(transform: Any, call: Call) -> Any:
    q, k, v = qkv(length=2, dim=4)
    return transform(lambda q: call(q, k, v).sum())(q)


def jvp(call: Call) -> Any:
    q, k, v = qkv()
    return torch.func.jvp(lambda q: call(q, k, v), (q,), (torch.ones_like(q),))[1]


def as_torch_does(act: Callable[[Call], Any], call: Call) -> bool:
    """Whether it answers as torch's own does, by a backend with forward-mode AD, and fails with one without."""
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        answers: list[Any] = []
        for one in (call, F.scaled_dot_product_attention):
            try:
                with torch.nn.attention.sdpa_kernel(backend):
                    answers.append(act(one))
            except NotImplementedError:
                answers.append(None)
        if not (answers == [None, None] or (None not in answers and torch.equal(*answers))):
            return False
    return True


def block_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_enabled(recipe=RECIPE, training="exact"):
        return F.scaled_dot_product_attention(q, k, v)


def jvp_in_the_graph(call: Call) -> Any:
    return compiled(lambda q, k, v: torch.func.jvp(lambda q: call(q, k, v), (q,), (q,))[1])(*qkv())


DERIVATIVE = (UnsupportedError, "forward-mode")
T7 = [
    *(Situation("T7", f"make_dual through {n}", lambda _, c=c: dual(c), refused(*DERIVATIVE, lines=None))
      for n, c in DOORS.items() if n != "sdpa_enabled"),
    Situation("T7", "make_dual in a block that refuses training", lambda _: dual(rerouted), refused(*DERIVATIVE)),
    *(Situation("T7+", f"a dual value under no_grad, {n}", lambda _, c=c: dual_value(c),
                refused(*DERIVATIVE, lines=None))
      for n, c in DOORS.items()),
    *(Situation("T7+", f"a dual mask, {n}", lambda _, n=n: dual_mask(DOORS[n]), refused(*DERIVATIVE, lines=None))
      for n in ("attention", "make_sdpa", "sdpa_enabled")),
    *(Situation("T7", f"{t.__name__} through {n}", lambda _, t=t, n=n: transformed(t, DOORS[n]),
                refused(InvalidArgumentError, "torch.func.vmap, grad or another transform"))
      for t in (torch.func.jacfwd, torch.func.hessian) for n in ("attention", "attention_varlen", "make_sdpa")),
    *(Situation("T7", f"jvp through {n}", lambda _, n=n: jvp(DOORS[n]),
                refused(InvalidArgumentError, "torch.func.vmap, grad or another transform"))
      for n in ("attention", "attention_varlen", "make_sdpa")),
    *(Situation("T7", f"make_dual into compiled {n}", lambda _, n=n: dual(compiled(DOORS[n])),
                refused(*DERIVATIVE, lines=None))
      for n in ("attention", "make_sdpa")),
    *(Situation("T7", f"jvp inside compiled {n}", lambda _, n=n: jvp_in_the_graph(DOORS[n]),
                refused(*DERIVATIVE, lines=None))
      for n in ("attention", "make_sdpa")),
    *(Situation("T7", f"{n}: as torch", lambda _, a=a, c=c: as_torch_does(a, c), gives(True))
      for n, a, c in [("make_dual, exact", dual, lambda *t: attention(*t, recipe="exact")),
                      ("make_dual, sdpa", dual, sdpa), ("make_dual, a block", dual, block_exact),
                      ("jvp, a block", jvp, block_exact),
                      ("make_dual, training='exact'", dual, make_sdpa(RECIPE, training="exact"))]),
]  # fmt: skip

# ---- T8, T9: the same checks on meta, fake and real tensors, eager and compiled


def on(kind: str, call: Call, *tensors: Tensor, **options: Any) -> Any:
    if kind == "compiled":
        return compiled(call)(*tensors, **options)
    if kind == "fake":
        mode = FakeTensorMode()
        given = [mode.from_tensor(t) for t in tensors]
        with mode:
            return call(*given, **options)
    return call(*(t.to("meta") if kind == "meta" else t for t in tensors), **options)


def wrong(what: str) -> tuple[list[Tensor], dict[str, Any], type[Exception], str]:
    q, k, v = qkv()
    if what == "unequal lengths":
        return [q, k, v[:, :, :4]], {}, InvalidArgumentError, "different lengths"
    if what == "heads":
        return [q[:, :1].expand(1, 3, 8, 16), k, v], {}, InvalidArgumentError, "query"
    if what == "head_dim 300":
        return qkv(dim=300), {}, UnsupportedError, "head_dim 300 is above 256"
    if what == "gradients":
        return [q.requires_grad_(), k, v], {}, UnsupportedError, "no_grad"
    if what == "float64":
        return [t.double() for t in (q, k, v)], {}, UnsupportedError, "float64"
    if what == "is_causal=1":
        return [q, k, v], {"is_causal": 1}, InvalidArgumentError, "is_causal must be True or False, got 1"
    return [q, k, v.half()], {}, InvalidArgumentError, "one dtype"


def unknown_recipe(kind: str) -> Any:
    return on(kind, lambda *t: attention(*t, recipe="sage9"), *qkv())


def refusal(what: str, door: str, kind: str) -> Situation:
    tensors, options, error, words = wrong(what)
    case = "T9" if what == "is_causal=1" and kind == "compiled" else "T8" if kind in ("meta", "real") else "T8+"
    return Situation(case, f"{what}, {door}, {kind}", lambda _: on(kind, DOORS[door], *tensors, **options),
                     refused(error, words, lines=None))  # fmt: skip


def mixed(door: str, kind: tuple[str, str, str]) -> Any:
    return DOORS[door](*(t.to(d) for t, d in zip(qkv(), kind, strict=True)))


def own_machine(function: Call) -> Any:
    return compiled(function, fullgraph=True)(*qkv())


def same_compiled(function: Call, *tensors: Tensor, **options: Any) -> bool:
    return torch.equal(compiled(function, **options)(*tensors), function(*tensors))


def in_a_block(kind: str, what: str, strict: bool) -> Any:
    tensors, options, *_ = wrong(what)

    def call(*tensors: Tensor, **options: Any) -> Tensor:
        with sdpa_enabled(recipe=RECIPE, strict=strict):
            return F.scaled_dot_product_attention(*tensors, **options)

    return on(kind, call, *tensors, **options)


HOPPER, MINE = MACHINES["sm_90a"], replace(MACHINES["sm_90a"], name="mine")
T8 = [
    *(refusal(what, door, kind)
      for what in ("unequal lengths", "heads", "head_dim 300", "gradients", "float64", "is_causal=1", "dtypes")
      for door in ("attention", "make_sdpa") for kind in ("real", "meta", "fake", "compiled")),
    *(Situation("T8", f"{what}, a strict block, {kind}", lambda _, w=what, k=kind: in_a_block(k, w, True),
                refused(wrong(what)[2], wrong(what)[3], lines=None))
      for what in ("unequal lengths", "heads", "head_dim 300", "is_causal=1") for kind in ("meta", "fake", "real")),
    *(Situation("T8", f"{what}, a block, {kind}: torch's error", lambda _, w=what, k=kind: in_a_block(k, w, False),
                refused(error, lines=None))
      for what, error in (("heads", RuntimeError), ("is_causal=1", TypeError)) for kind in ("meta", "fake", "real")),
    *(Situation("T8", f"unknown recipe, {kind}", lambda _, kind=kind: unknown_recipe(kind),
                refused(InvalidRecipeError, "unknown name"))
      for kind in ("real", "meta", "fake", "compiled")),
    *(Situation("T8", f"{door} on {' '.join(kind)}", lambda _, d=door, k=kind: mixed(d, k),
                refused(InvalidArgumentError, "on one device"))
      for door in ("attention", "make_sdpa", "attention_varlen")
      for kind in (("meta", "cpu", "cpu"), ("cpu", "meta", "cpu"))),
    Situation("T8+", "attention_varlen on meta", lambda _: varlen(*(t.to("meta") for t in qkv())),
              refused(InvalidArgumentError, "cu_seqlens_q holds no numbers")),
    Situation("T9", "a Machine in compiled attention",
              lambda _: same_compiled(lambda *t: attention(*t, recipe=RECIPE, like=HOPPER), *qkv(), fullgraph=True),
              gives(True)),
    Situation("T9", "a Machine in a compiled make_sdpa",
              lambda _: same_compiled(lambda *t: make_sdpa(RECIPE, like=HOPPER)(*t), *qkv(), fullgraph=True),
              gives(True)),
    Situation("T9+", "a machine of the caller's own, compiled",
              lambda _: compiled(lambda *t: attention(*t, recipe=RECIPE, like=MINE))(*qkv()),
              refused(InvalidArgumentError, "inside torch.compile give one of the names")),
    Situation("T9", "explain in compiled code", lambda _: compiled(lambda *t: explain(*t).implementation)(*qkv()),
              gives("torch_sdpa")),
    Situation("T9+", "explain, with the whole graph asked for",
              lambda _: compiled(lambda *t: explain(*t).implementation, fullgraph=True)(*qkv()),
              refused(Exception, "call it outside", lines=None)),
    Situation("S3", "make_sdpa in compiled code with dynamic shapes",
              lambda _: same_compiled(lambda *t: make_sdpa(RECIPE)(*t), *qkv(), dynamic=True, fullgraph=True),
              gives(True)),
    *(Situation("S3+", f"attention by {name}, dynamic",
                lambda _, name=name: same_compiled(lambda *t: attention(*t, recipe=name, sm_scale=0.2, is_causal=True),
                                                   *qkv(), dynamic=True, fullgraph=True), gives(True))
      for name in ("fast_8b", "int8_u8", "sage2_4b:smooth_q=false")),
]  # fmt: skip

# ---- T10: exact is finite wherever the answer is


def right(want: Tensor, got: Tensor) -> bool:
    return bool(got.isfinite().all()) and torch.allclose(
        got.double(), want, rtol=0, atol=0.02 * float(want.abs().max())
    )


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In float64, the logits by exact powers of two."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q * scale @ k.transpose(-1, -2), dim=-1) @ v


def extreme(call: Call, size: float, scale: float, dtype: torch.dtype = torch.bfloat16) -> bool:
    q, k, v = qkv(dtype=dtype)
    q = q.sign() * size
    k = k.sign() * size
    return right(plain(q, k, v, scale), call(q, k, v, scale))


BF16_MAX = torch.finfo(torch.bfloat16).max
EXACT_CALLS: dict[str, Call] = {
    "exact": lambda q, k, v, s: attention(q, k, v, recipe="exact", sm_scale=s),
    "exact with lse": lambda q, k, v, s: attention(q, k, v, recipe="exact", sm_scale=s, return_lse=True)[0],
    "auto": lambda q, k, v, s: attention(q, k, v, sm_scale=s),
    "sdpa": lambda q, k, v, s: sdpa(q, k, v, scale=s),
    "exact with a mask": lambda q, k, v, s: attention(
        q, k, v, recipe="exact", sm_scale=s, attn_mask=torch.zeros(8, 8, dtype=q.dtype)
    ),
}
T10 = [
    *(Situation("T10", f"{n}, bf16 at ±max, a tiny scale", lambda _, c=c: extreme(c, BF16_MAX, 1e-78), gives(True))
      for n, c in EXACT_CALLS.items()),
    *(Situation("T10", f"{n}, sm_scale 1e38", lambda _, c=c: extreme(c, 1e-19, 1e38), gives(True))
      for n, c in EXACT_CALLS.items()),
    *(Situation("T10", f"{n}, sm_scale 1e40", lambda _, c=c: extreme(c, 2e-20, 1e39), gives(True))
      for n, c in EXACT_CALLS.items()),
    *(Situation("T10+", f"{n}, zeros and sm_scale 1e60", lambda _, c=c: extreme(c, 0.0, 1e60, torch.half), gives(True))
      for n, c in EXACT_CALLS.items()),
    *(Situation("T10+", f"{n}, bf16 at ±max, the usual scale", lambda _, c=c: extreme(c, BF16_MAX, 0.25), gives(True))
      for n, c in EXACT_CALLS.items()),
    *(Situation("T10+", f"{n}, logits that float32 holds and Q·K not", lambda _, c=c: extreme(c, 2.0**63, 0.25),
                gives(True)) for n, c in EXACT_CALLS.items()),
    Situation("T10+", "gradients at an extreme scale", lambda _: gradient_at(1e38, 1e-19), holds(bool)),
    *(Situation("T10+", f"a quantising recipe beyond float32, {n}", lambda _, c=c: c(),
                refused(InvalidArgumentError, "1e+39", "recipe='exact' takes it"))
      for n, c in {"attention": lambda: attention(*qkv(), recipe=RECIPE, sm_scale=1e39),
                   "make_sdpa": lambda: sdpa_8b(*qkv(), scale=1e39)}.items()),
    Situation("T10+", "an integer that no float holds", lambda _: attention(*qkv(), sm_scale=10**400),
              refused(InvalidArgumentError, "1329 bits")),
]  # fmt: skip


def gradient_at(scale: float, size: float) -> bool:
    q, k, v = (t * size for t in qkv())
    q.requires_grad_()
    (got,) = torch.autograd.grad(attention(q, k, v / size, recipe="exact", sm_scale=scale).sum(), q)
    return bool(got.isfinite().all()) and bool(got.any())


# ---- T12, T13, S8, S10


def jagged() -> Tensor:
    rows = [torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


def jagged_in_a_block(name: str) -> bool:
    x = jagged()
    want = F.scaled_dot_product_attention(x, x, x).values()
    with sdpa_enabled(recipe=name) as report:
        got = F.scaled_dot_product_attention(x, x, x).values()
    return torch.equal(got, want) and report.ran == 0 and report.calls == 1


def observed(act: Callable[[], Tensor], scored: int = 0) -> bool:
    """Whether the answer is torch's, and how many calls were scored."""
    want = act()
    with observe(candidates=[RECIPE]) as watch:
        got = act()
    same = got.is_meta or torch.equal(got.values() if got.is_nested else got, want.values() if want.is_nested else want)
    return same and len(watch.observations.records) == scored


def under_jvp() -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return jvp(lambda *t: F.scaled_dot_product_attention(*t))


def refused_as_torch(**options: Any) -> bool:
    q, k, v = qkv()
    errors = []
    for function in (torch._C._nn.scaled_dot_product_attention, rerouted):
        try:
            function(q, k, v, **options)
        except Exception as error:
            errors.append(type(error))
    return len(errors) == 2 and errors[0] is errors[1]


def traced(call: Call) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(lambda *t: call(*t), tuple(qkv()), check_trace=False)


def traced_in_a_block() -> bool:
    q, k, v = qkv()
    with sdpa_enabled(recipe=RECIPE):
        function = traced(lambda *t: F.scaled_dot_product_attention(*t))
    return torch.equal(function(q, k, v), F.scaled_dot_product_attention(q, k, v))


def same_scale(scale: Any) -> bool:
    q, k, v = qkv()
    calls = [(lambda s: sdpa_8b(q, k, v, scale=s)), (lambda s: sdpa(q, k, v, scale=s)),
             (lambda s: attention(q, k, v, recipe=RECIPE, sm_scale=s)),
             (lambda s: rerouted(q, k, v, scale=s))]  # fmt: skip
    return all(torch.equal(call(scale), call(float(scale))) for call in calls)


def survives(function: Call) -> bool:
    copies = [pickle.loads(pickle.dumps(function)), copy.copy(function), copy.deepcopy(function)]
    return all(c == function and hash(c) == hash(function) and torch.equal(c(*qkv()), function(*qkv())) for c in copies)


T12 = [
    *(Situation("T12", f"a jagged tensor in a block of {n}", lambda _, n=n: jagged_in_a_block(n), gives(True))
      for n in (RECIPE, "auto")),
    *(Situation(case, f"observing {n}", lambda _, a=a, s=s: observed(a, s), gives(True))
      for case, n, a, s in [
          ("T12+", "a jagged tensor", lambda: F.scaled_dot_product_attention(*[jagged()] * 3), 0),
          ("T7+", "a jvp", under_jvp, 0),
          ("T8+", "meta tensors", lambda: F.scaled_dot_product_attention(*(t.to("meta") for t in qkv())), 0),
          ("T8+", "a plain call", lambda: F.scaled_dot_product_attention(*qkv()), 1)]),
    *(Situation("T12", f"{o}", lambda _, o=o: refused_as_torch(**o), gives(True))
      for o in ({"dropout_p": None}, {"enable_gqa": 1}, {"enable_gqa": "x"}, {"dropout_p": "x"})),
    *(Situation("T12+", f"{o}", lambda _, o=o: refused_as_torch(**o), gives(True))
      for o in ({"enable_gqa": None}, {"is_causal": None}, {"is_causal": 1}, {"scale": "x"}, {"attn_mask": "x"})),
    *(Situation("T13", f"torch.jit.trace of {n}", lambda _, c=c: traced(c),
                refused(InvalidArgumentError, "torch.jit.trace", "torch.export"))
      for n, c in (DOORS | {"sdpa": sdpa, "exact": lambda *t: attention(*t, recipe="exact")}).items()
      if n != "sdpa_enabled"),
    Situation("T13+", "torch.jit.trace in a block records torch's own", lambda _: traced_in_a_block(), gives(True)),
    *(Situation("S10", f"scale={type(s).__name__} {s}", lambda _, s=s: same_scale(s), gives(True))
      for s in (torch.tensor(0.125), np.float32(0.125))),
    *(Situation("S10+", f"scale={type(s).__name__} {s}", lambda _, s=s: same_scale(s), gives(True))
      for s in (torch.tensor(2), torch.tensor(0.3).double(), np.float64(0.3), np.int64(1), np.float16(0.5))),
    *(Situation("S10+", f"a scale that is {n}", lambda _, s=s: sdpa_8b(*qkv(), scale=s),
                refused(InvalidArgumentError, "scale"))
      for n, s in {"a tensor with a dimension": torch.tensor([0.1]),
                   "a trained tensor": torch.ones((), requires_grad=True), "complex": 1j,
                   "a complex tensor": torch.tensor(1j), "on meta": torch.ones((), device="meta"),
                   "NaN in a tensor": torch.tensor(float("nan"))}.items()),
    Situation("S10+", "a fraction", lambda _: same_scale(Fraction(1, 8)), gives(True)),
    *(Situation("S8", f"{f!r} is pickled and copied", lambda _, f=f: survives(f), gives(True))
      for f in (sdpa_8b, sdpa)),
    *(Situation("S8+", f"{f!r} is pickled and copied", lambda _, f=f: survives(f), gives(True))
      for f in (make_sdpa(recipe(RECIPE).replace(smooth_v=True), like=MINE), make_sdpa(RECIPE, training="exact"))),
]  # fmt: skip

SITUATIONS = [*T7, *T8, *T10, *T12]
