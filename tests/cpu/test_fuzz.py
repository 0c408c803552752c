"""Ten thousand random calls against float64, and whether the fuzz would notice if they were wrong."""

import math

import pytest
import torch
from fuzz import call, judge, run
from fuzz_cases import PROFILES, make_case, tensors
from fuzz_check import expected

CASES = 10_000
PARTS = 16  # so that workers can share them; each part has every recipe in turn


@pytest.mark.parametrize("part", range(PARTS))
@torch.no_grad()
def test_random_calls(part):
    with torch.enable_grad():  # (some cases ask for a gradient)
        tally = run("cpu", 0, range(part * CASES // PARTS, (part + 1) * CASES // PARTS), "cpu")
    assert not tally.failures, str(tally)
    assert tally.cases == CASES // PARTS
    assert sum(tally.ran.values()) == tally.cases - tally.refused  # every call that is no documented refusal
    assert tally.refused < 0.2 * tally.cases
    assert tally.ran["emulation"] > 0.6 * tally.cases


def test_a_case_is_a_function_of_its_number():
    for number in range(40):
        case = make_case("cpu", 3, number)
        assert case == make_case("cpu", 3, number)
        first, second = (tensors(case, "cpu") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert make_case("cpu", 3, 8) != make_case("cpu", 4, 8)


def test_cases_are_of_every_kind():
    cases = [make_case("cpu", 0, n) for n in range(2000)]
    seen = {
        "recipe": {(c.recipe, c.like) for c in cases},
        "layout": {layout for c in cases for layout in c.layouts},
        "dims": {len(c.shapes[0]) for c in cases},
        "head_dim": {c.shapes[0][-1] for c in cases},
        "mask": {c.mask_kind for c in cases if c.mask_shape},
    }
    assert seen["recipe"] == set(PROFILES["cpu"].recipes)
    assert len(seen["layout"]) == 7
    assert seen["dims"] == {2, 3, 4, 5}
    assert {1, 40, 72, 80, 96, 160, 256, 264} <= seen["head_dim"]
    assert seen["mask"] == {"bool", "padding", "float", "float_inf"}
    assert any(0 in shape for c in cases for shape in c.shapes)
    assert any(c.shapes[1][-2] == 1 for c in cases)
    assert any(c.enable_gqa and c.shapes[0][-3] > c.shapes[1][-3] for c in cases)


def test_kernels_get_masks_that_they_take():
    """Of all rows alike (lists of keys) and others (bits), with and without causality; none that is added."""
    cases = [c for c in (make_case("gpu", 0, n) for n in range(600)) if c.mask_shape and c.refusal is None]
    assert {c.mask_kind for c in cases} == {"bool", "padding"}
    assert {(c.mask_shape[-2] == 1, c.is_causal) for c in cases} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert any(math.prod(c.mask_shape[:-2]) > 1 and c.enable_gqa for c in cases)


def other_scale(case):
    return {"scale": 0.5 if case.scale is None else case.scale * 2}


MUTATIONS = {
    "mask dropped": lambda case, q, k, v, mask: (q, k, v, None, {}),
    "causality dropped": lambda case, q, k, v, mask: (q, k, v, mask, {"is_causal": False}),
    "bottom-right": lambda case, q, k, v, mask: (
        q, k, v, torch.ones(q.shape[-2], k.shape[-2]).tril(k.shape[-2] - q.shape[-2]).bool(), {"is_causal": False}
    ),
    "scale": lambda case, q, k, v, mask: (q, k, v, mask, other_scale(case)),
    "heads": lambda case, q, k, v, mask: (q, k.flip(-3), v.flip(-3), mask, {}),
    "last key": lambda case, q, k, v, mask: (
        q, k[..., :-1, :], v[..., :-1, :], mask if mask is None or mask.shape[-1] == 1 else mask[..., :-1], {}
    ),
    "float mask without log2 e": lambda case, q, k, v, mask: (q, k, v, mask * 0.6931, {}),
}  # fmt: skip


def applies(mutation, case):
    q, k, _ = case.shapes
    return {
        "mask dropped": case.mask_shape is not None,
        "causality dropped": case.is_causal,
        "bottom-right": case.is_causal and q[-2] != k[-2] and case.mask_shape is None,
        "scale": case.scale != 0.0,
        "heads": len(k) > 2 and k[-3] > 1 and case.layouts[1:] == ("plain", "plain"),
        "last key": k[-2] > 1 and not case.is_causal,
        "float mask without log2 e": case.mask_shape is not None and "float" in case.mask_kind,
    }[mutation]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_answer_is_noticed(mutation):
    """An exact answer to another question is a failure, if that answer differs by more than the recipe's own errors."""
    noticed = tried = 0
    for number in range(1, 8000, 8):  # sage2_8b
        case = make_case("cpu", 1, number)
        if case.refusal or case.family not in ("normal", "biased") or not applies(mutation, case):
            continue
        (q, k, v), mask = tensors(case, "cpu")
        answer = expected(case, q, k, v, mask)
        if not answer.out.numel():
            continue
        q, k, v, changed, options = MUTATIONS[mutation](case, *(t.double() for t in (q, k, v)), mask)
        changed = changed.double() if changed is not None and changed.dtype != torch.bool else changed
        arguments = {"is_causal": case.is_causal, "scale": case.scale} | options
        wrong = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, _both(changed, arguments.pop("is_causal"), q, k), enable_gqa=case.enable_gqa, **arguments
        )
        size = answer.out[answer.seen].square().mean().sqrt()
        if (wrong - answer.out).square().mean().sqrt() < 0.15 * size:
            continue  # (another question with nearly the same answer)
        tried += 1
        noticed += bool(judge(case, wrong.to(DTYPES[case.dtype]), answer))
    assert tried >= 20
    assert noticed >= 0.9 * tried, (noticed, tried)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _both(mask, is_causal, q, k):
    if not is_causal:
        return mask
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)


def test_a_changed_answer_is_noticed():
    """NaN, a row that should be zero, a wrong shape or dtype."""
    case = next(
        c for c in (make_case("cpu", 1, n) for n in range(1, 8000, 8)) if c.mask_kind == "bool" and c.mask_shape
    )
    (q, k, v), mask = tensors(case, "cpu")
    answer = expected(case, q, k, v, mask)
    right = answer.out.to(DTYPES[case.dtype])
    assert judge(case, right, answer) == []
    assert judge(case, right[..., :-1, :], answer)
    assert judge(case, right.double(), answer)
    broken = right.clone()
    broken.view(-1)[0] = torch.nan
    assert judge(case, broken, answer)
    assert call(case, q, k, v, mask).shape == right.shape
