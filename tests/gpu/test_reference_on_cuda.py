"""The reference on a GPU gives the CPU's numbers: the same quantised operands bit for bit, and sums to rounding."""

import pytest
import torch

from lowbit_attention import RECIPES, attention, compare, explain
from lowbit_attention.cli import diagnosis as doctor
from lowbit_attention.evaluation.errors import Grid
from lowbit_attention.evaluation.synthetic import FAMILIES, make
from lowbit_attention.recipes.formats import round_e4m3, round_e5m2
from lowbit_attention.recipes.machine import MACHINES, resolve_machine
from lowbit_attention.reference.quantize import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUANTIZING = [name for name, r in RECIPES.items() if not r.is_exact]


@pytest.mark.parametrize(("rounding", "dtype"), [(round_e4m3, torch.float8_e4m3fn), (round_e5m2, torch.float8_e5m2)])
def test_formats_are_the_device_casts(rounding, dtype):
    largest = torch.finfo(dtype).max
    x = torch.randn(1 << 20, device="cuda") * torch.exp2(torch.randint(-24, 10, (1 << 20,), device="cuda").float())
    x = x.clamp(-largest, largest)
    assert torch.equal(rounding(x), x.to(dtype).float())


@pytest.mark.parametrize("family", ["normal", "qkv_bias", "sink"])
@pytest.mark.parametrize("name", QUANTIZING)
def test_packing_is_bitwise_the_cpus(name, family):
    recipe, geometry = RECIPES[name], MACHINES["sm_90a"].geometry
    tensors = make(family, heads=2, length=333, head_dim=64)
    on_cpu = pack(*tensors, recipe, geometry, None)
    on_gpu = pack(*(t.cuda() for t in tensors), recipe, geometry, None)
    for field in ("k_mean", "v_mean", "q_mean", "q", "q_scale", "k", "k_scale", "v", "v_scale"):
        a, b = getattr(on_cpu, field), getattr(on_gpu, field)
        if a is not None:
            # rotate() divides by a square root and adds in the same order everywhere: equal bits there, too
            assert torch.equal(a, b.cpu()), field


@pytest.mark.parametrize("machine", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("name", QUANTIZING)
def test_output_is_the_cpus_to_rounding(name, machine):
    q, k, v = make("normal", heads=2, length=777, head_dim=64)
    exact = attention(q.double(), k.double(), v.double(), recipe="exact", is_causal=True)
    ours = attention(q, k, v, recipe=name, is_causal=True, like=machine)
    gpu = attention(q.cuda(), k.cuda(), v.cuda(), recipe=name, is_causal=True, like=machine).cpu()
    # another order of float32 sums and another exp2 (2 ulp) flip single roundings of P to a neighbour; each flip moves
    # one of ~400 terms by at most the recipe's own rounding error, so the difference is far below that error
    assert compare(ours, gpu).l1 < 0.05 * compare(exact, ours).l1


def test_errors_by_length_are_the_cpus_and_go_on_beyond():
    """Up to 8192 tokens the same inputs; longer ones, drawn on the card, keep the property of their family."""
    machine, grid = resolve_machine("sm_90a", "instruction"), Grid(heads=4, seeds=1)
    recipes = {name: RECIPES[name] for name in ("sage2_8b", "fast_8b")}
    here, there = (grid.measure(["normal", "sinks"], 1024, recipes, machine, device) for device in ("cuda", "cpu"))
    for key, errors in here.items():
        assert errors.l1 == pytest.approx(there[key].l1, rel=0.02)
    longer = grid.measure(list(FAMILIES), 16_384, recipes, machine, "cuda")
    assert all(0 < errors.l1 < 1 for errors in longer.values())
    assert 0.03 < longer["normal", "sage2_8b"].l1 < 0.045
    assert longer["v_mean", "sage2_8b"].l1 < 0.005


def test_auto_on_a_card_without_kernels_is_torch():
    q = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    explanation = explain(q, q, q)
    assert explanation.implementation == "torch_sdpa"
    assert torch.equal(attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_doctor_sees_the_card():
    report = doctor.examine()
    assert report.gpus[0].name == torch.cuda.get_device_name(0)
    assert report.driver_cuda is not None
    assert any(
        a.device.startswith("cuda") and a.implementation == "emulation" and not a.reasons for a in report.abilities
    )
