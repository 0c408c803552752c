"""S1, S2: no number depends on what belongs to the process: default dtype and device, precision of matrix products."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit_attention
from lowbit_attention import RECIPES, attention, recipe
from lowbit_attention.evaluation.synthetic import make
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.exact import exact

SOURCE = Path(lowbit_attention.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
OLD_FACTORIES = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"}
"""Constructors of the default device, or of the default dtype, that cannot be told another."""
IN_THE_DEFAULT_DTYPE = {"ldexp", "get_default_dtype", "set_default_dtype"}
"""``torch.ldexp`` takes the power of two in the default dtype."""
PROCESS_WIDE = {
    "allow_tf32", "fp32_precision", "set_float32_matmul_precision", "get_float32_matmul_precision",
    "set_default_device", "set_num_threads", "use_deterministic_algorithms", "manual_seed_all", "set_grad_enabled_",
}  # fmt: skip
_BENCH = "whole steps build models of 40 GB in bf16 on the device, in the benchmark's own process"
ALLOWED: dict[tuple[str, str], str] = {
    ("bench/step_models.py", "get_default_dtype"): _BENCH,
    ("bench/step_models.py", "set_default_dtype"): _BENCH,
}


def calls(tree: ast.Module):
    """Every ``torch.name(…)`` of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                yield node, node.func.attr


def faults(source: str, name: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for node, function in calls(tree):
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"dtype", "device"} if function in FACTORIES else set()
        if (name, function) in ALLOWED:
            continue
        if function in OLD_FACTORIES | IN_THE_DEFAULT_DTYPE:
            found.append(f"{name}:{node.lineno}: torch.{function}")
        elif missing := wanted - given:
            found.append(f"{name}:{node.lineno}: torch.{function} without {', '.join(sorted(missing))}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PROCESS_WIDE:
            found.append(f"{name}:{node.lineno}: {node.attr} belongs to the process")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"{name}:{node.lineno}: {a.name} imported by itself" for a in node.names if a.name in FACTORIES]
    return found


def test_every_tensor_is_made_with_dtype_and_device_and_nothing_process_wide_is_touched():
    found = [f for path in sorted(SOURCE.rglob("*.py"))
             for f in faults(path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix())]  # fmt: skip
    assert not found, "\n".join(found)


def test_no_allowance_is_left_over():
    for name, function in ALLOWED:
        assert function in {f for _, f in calls(ast.parse((SOURCE / name).read_text(encoding="utf-8")))}


@pytest.mark.parametrize("line", [
    "torch.zeros(3, dtype=torch.float32)", "torch.tensor(1.0, device='cpu')", "torch.Tensor(3)", "torch.ldexp(x, e)",
    "torch.backends.cuda.matmul.allow_tf32 = False", "from torch import arange",
])  # fmt: skip
def test_the_walk_sees(line):
    assert faults(line, "a.py")


class Rounded(TorchDispatchMode):
    """Float32 matrix products as hardware makes them whose owner allows less: operands rounded to so many bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.seen = bits, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("bmm", "mm", "baddbmm", "baddbmm_", "addmm", "mv", "dot"):
            self.seen += 1
            first = 1 if "add" in function.overloadpacket.__name__ else 0  # (what is added is not rounded)
            args = tuple(self.rounded(a) if i >= first else a for i, a in enumerate(args))
        return function(*args, **(kwargs or {}))

    def rounded(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        mantissa, exponent = torch.frexp(x.double())
        rounded = torch.round(mantissa * 2**self.bits) / 2**self.bits * 2.0 ** exponent.double()
        return torch.where(x.isfinite(), rounded, x.double()).float()


UNQUANTIZED = "sage2_8b:qk_bits=none,smooth_k=false,row_sum=unrounded"


@pytest.mark.parametrize("like", ["sm_89", "sm_90a", "sm_80"])
@pytest.mark.parametrize("spec", [
    *(n for n, r in RECIPES.items() if not r.is_exact), UNQUANTIZED,
    "int8_fp16:pv_format=fp32,p_max=1,v_max=1,v_scale_power_of_two=false",
])  # fmt: skip
def test_s2_products_of_fewer_bits_change_no_number(spec, like):
    """bfloat16's 8 bits; TF32 has 11."""
    q, k, v = make("qkv_bias", heads=2, length=150, head_dim=32)
    want = attention(q, k, v, recipe=spec, like=like, return_lse=True, is_causal=True)
    with Rounded(8) as mode:
        got = attention(q, k, v, recipe=spec, like=like, return_lse=True, is_causal=True)
    assert mode.seen
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_s2_instruction_fidelity_too():
    q, k, v = make("sink", heads=1, length=70, head_dim=16)
    from dataclasses import replace

    like = replace(MACHINES["sm_80"], fidelity="instruction")
    want = attention(q, k, v, recipe="sage1", like=like)
    with Rounded(8):
        assert torch.equal(attention(q, k, v, recipe="sage1", like=like), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_in_float32_keeps_its_digits_where_tf32_is_allowed(dtype):
    """As it runs on a GPU. TF32 alone would err by 2⁻¹² of logits of size 40: 1e-2."""
    q, k, v = (t.to(dtype) for t in make("normal", heads=2, length=700, head_dim=64))
    want, want_lse = exact(q, k, v, sm_scale=1.0)
    with Rounded(11):
        got, lse = exact(q, k, v, sm_scale=1.0, dtype=torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)  # 64 products of size 40 · 2⁻²⁴, and P's 2⁻²¹
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-5)


@pytest.fixture
def precision():
    """Torch's own ways to allow fewer bits; where one is set by its new name, the old one cannot even be read."""
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no such setting")
@pytest.mark.parametrize("where", ["cuda", "mkldnn"])
@pytest.mark.usefixtures("precision")
def test_s2_the_new_settings_are_neither_read_nor_written(where):
    q, k, v = make("normal", heads=2, length=100, head_dim=32)
    want = [attention(q, k, v, recipe=r, return_lse=True) for r in ("sage2_8b", "exact", recipe("sage1"))]
    settings = getattr(torch.backends, where).matmul
    settings.fp32_precision = "tf32"
    got = [attention(q, k, v, recipe=r, return_lse=True) for r in ("sage2_8b", "exact", recipe("sage1"))]
    assert settings.fp32_precision == "tf32"
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
