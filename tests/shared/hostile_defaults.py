"""Run by test_hostile_defaults.py: every door once, as a process's first call, under one hostile default.

``python hostile_defaults.py`` has imported torch and nothing of ours when it forks: for each default that it reads, a
line each, one child a door, which sets the default, imports the library and calls it. A child without any default made
the numbers to compare with. It answers a line each: in JSON, what is wrong, in words.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import traceback
import warnings

import torch
import torch._dynamo  # (seconds, which every child that compiles would need by itself)
import torch._functorch.aot_autograd
import torch._inductor.scheduler
import torch.nn.functional as F

CPU = torch.device("cpu")


def numbers(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float32, device=CPU).to(dtype)


def offsets():
    return torch.tensor([0, 12, 40], dtype=torch.int32, device=CPU)


# ---- doors: each gives its numbers by name; those whose name begins with "torch" are torch's own


def by_attention(q):
    from lowbit_attention import attention

    found = {}
    for name in ("sage2_8b", "fast_8b", "int8_fp16", "rotated_4b", "exact"):
        out, lse = attention(q, q, q, recipe=name, is_causal=True, return_lse=True)
        found |= {f"{name} out": out, f"{name} lse": lse}
    mask = torch.ones(40, 40, dtype=torch.bool, device=CPU).tril(3)
    return found | {
        "mask": attention(q, q, q, recipe="int8_u8", attn_mask=mask),
        "hopper": attention(q, q, q, recipe="fast_8b", like="sm_90a"),
        "torch": attention(q, q, q),
    }


def by_varlen(q):
    from lowbit_attention import attention_varlen

    packed = q[0].transpose(0, 1)
    out, lse = attention_varlen(packed, packed, packed, offsets(), offsets(), recipe="sage2_8b", return_lse=True)
    exact = attention_varlen(packed, packed, packed, offsets(), offsets(), is_causal=True)
    return {"out": out, "lse": lse, "torch": exact}


def by_sdpa(q):
    from lowbit_attention import sdpa

    return {"torch": sdpa(q, q, q, is_causal=True), "torch scaled": sdpa(q, q, q, scale=0.2)}


def by_make_sdpa(q):
    from lowbit_attention import make_sdpa

    return {"out": make_sdpa("sage2_4b")(q, q, q, is_causal=True), "torch": make_sdpa("exact")(q, q, q)}


def by_sdpa_enabled(q):
    from lowbit_attention import disable_sdpa, enable_sdpa, sdpa_enabled

    with sdpa_enabled(recipe="sage2_8b") as report:
        out = F.scaled_dot_product_attention(q, q, q)
    kept = enable_sdpa(recipe="sage1")
    other = F.scaled_dot_product_attention(q, q, q)
    disable_sdpa()
    assert (report.ran, kept.ran, kept.calls) == (1, 1, 1), (report.counts, kept.counts)
    assert "sage2_8b" in str(report)
    return {"out": out, "other": other, "torch": F.scaled_dot_product_attention(q, q, q)}


def by_observe(q):
    from lowbit_attention.adaptive import choose, observe

    with observe(candidates=["sage2_8b", "sage2_4b"]) as watch:
        seen = F.scaled_dot_product_attention(q, q, q)
    observations = watch.observations
    errors = [observations.mean(r) for r in ("sage2_8b", "sage2_4b")]
    assert 0 < errors[0] < errors[1] < 1, errors
    applied = choose(observations, threshold=0.05).policy().apply()
    out = F.scaled_dot_product_attention(q, q, q)
    applied.remove()
    return {"torch seen": seen, "applied": out}


def by_compile(q):
    from lowbit_attention import attention, make_sdpa, sdpa_enabled

    def call(q):
        return attention(q, q, q, recipe="sage2_8b") + make_sdpa("sage2_8b")(q, q, q, is_causal=True)

    with torch.no_grad():
        out = torch.compile(call, backend="aot_eager", fullgraph=True)(q)
        with sdpa_enabled(recipe="sage2_8b") as report:
            inside = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager")(q)
    assert report.ran == 1, report.counts
    return {"out": out, "inside": inside}


DOORS = {
    "attention": by_attention,
    "attention_varlen": by_varlen,
    "sdpa": by_sdpa,
    "make_sdpa": by_make_sdpa,
    "sdpa_enabled": by_sdpa_enabled,
    "observe": by_observe,
    "compile": by_compile,
}

# ---- defaults: what is set before the library is imported, and what the call is made in


def warnings_are_errors():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\b")  # (what torch tells itself)


def new_precision():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def everything():
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    warnings_are_errors()


NOTHING = contextlib.nullcontext
DEFAULTS = {
    "bfloat16": (lambda: torch.set_default_dtype(torch.bfloat16), NOTHING),
    "float16": (lambda: torch.set_default_dtype(torch.float16), NOTHING),
    "float64": (lambda: torch.set_default_dtype(torch.float64), NOTHING),
    "default device meta": (lambda: torch.set_default_device("meta"), NOTHING),
    "with torch.device('meta')": (NOTHING, lambda: torch.device("meta")),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), NOTHING),
    "inference_mode": (NOTHING, torch.inference_mode),
    "no gradients": (lambda: torch.set_grad_enabled(False), NOTHING),
    "precision medium": (lambda: torch.set_float32_matmul_precision("medium"), NOTHING),
    "precision by its new name": (new_precision, NOTHING),
    "autocast": (NOTHING, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "warnings as errors": (warnings_are_errors, NOTHING),
    "everything": (everything, torch.inference_mode),
}


def state():
    """What must be as it was."""
    new = [getattr(getattr(torch.backends, b).matmul, "fp32_precision", None) for b in ("cuda", "mkldnn")]
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": new,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "torch's function": F.scaled_dot_product_attention,
        "random numbers": torch.random.get_rng_state().tolist(),
        "warnings": len(warnings.filters),
    }


def differences(want, got):
    for name, a in want.items():
        b = got[name]
        close = name.startswith("torch") and a.dtype == b.dtype and torch.allclose(a.double(), b.double(), atol=0.03)
        if not (torch.equal(a, b.clone()) or close):
            yield f"{name}: {a.dtype} became {b.dtype}, off by {float((a.double() - b.double()).abs().max()):g}"


def hostile(default, door, want, dtype):
    """What is wrong with one door under one default, in words."""
    begin, inside = DEFAULTS[default]
    begin()
    q = numbers(1, 2, 40, 32, dtype=dtype)
    with inside():
        before = state() if door != "compile" else {}  # (dynamo draws numbers and warns)
        got = DOORS[door](q.clone() if torch.is_inference_mode_enabled() else q)
        after = state() if door != "compile" else {}
    # (what a process's first import adds to the warnings' filters is not ours)
    changed = [k for k in before if before[k] != after[k] and k != "warnings"]
    return [*differences(want, got), *(f"{k}: {before[k]} became {after[k]}" for k in changed)]


def in_a_child(work):
    """Run ``work`` in a fork of this process; what it returns, as text."""
    with tempfile.TemporaryFile("w+") as answer:
        if (child := os.fork()) == 0:
            status = 0
            try:
                answer.write("\n".join(work()))
            except BaseException:
                answer.write(traceback.format_exc())
                status = 1
            answer.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        return answer.read().strip() or ("" if status == 0 else f"ended with {status}")


@functools.cache
def expected(dtype):
    """The numbers of every door, by name, from a child without any default."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "expected.pt")

        def save():
            torch.save({door: call(numbers(1, 2, 40, 32, dtype=dtype)) for door, call in DOORS.items()}, file)
            return []

        if problem := in_a_child(save):
            sys.exit(f"without any default: {problem}")
        return torch.load(file)


def problems(default):
    """What is wrong under one default, a text for each door that has anything."""
    dtype = torch.bfloat16 if default == "autocast" else torch.float32  # (autocast casts, and is to change no more)
    want = expected(dtype)
    found = {door: in_a_child(lambda door=door: hostile(default, door, want[door], dtype)) for door in DOORS}
    assert not any(name.startswith("lowbit_attention") for name in sys.modules), "the parent imported it"
    return [f"---- {door}\n{problem}" for door, problem in found.items() if problem]


def main():
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # (what a child prints is no answer)
    for line in sys.stdin:
        print(json.dumps(problems(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
