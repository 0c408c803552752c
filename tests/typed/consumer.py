"""A user's code, which `make types` shows to mypy and to pyright (S21): the types are what a user would write."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lowbit_attention
from lowbit_attention import (
    RECIPES,
    CallReport,
    InvalidArgumentError,
    LowbitError,
    Machine,
    Metrics,
    PerThread,
    Recipe,
    attention,
    attention_varlen,
    compare,
    explain,
    make_sdpa,
    recipe,
    sdpa,
    sdpa_enabled,
)
from lowbit_attention.adaptive import Policy
from lowbit_attention.compat import SageAttentionAlias, install_as_sageattention


def calls(q: Tensor, lengths: Tensor) -> None:
    assert_type(attention(q, q, q), Tensor)
    assert_type(attention(q, q, q, recipe="sage2_8b", is_causal=True, return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention_varlen(q, q, q, lengths, lengths, return_lse=True), tuple[Tensor, Tensor])
    assert_type(lowbit_attention.attention(q, q, q, recipe=recipe("sage2_8b").replace(name="mine")), Tensor)
    assert_type(compare(q, q), Metrics)
    assert_type(sdpa(q, q, q), Tensor)
    assert_type(make_sdpa("sage2_8b")(q, q, q, is_causal=True), Tensor)
    print(explain(q, q, q))


def recipes() -> None:
    assert_type(RECIPES["exact"], Recipe)
    assert_type(recipe("sage2_4b"), Recipe)
    assert_type(lowbit_attention.recipe("sage2_4b"), Recipe)
    print(Recipe(qk_bits=8), PerThread(), Machine, lowbit_attention.__version__)


def blocks(model: nn.Module, x: Tensor) -> None:
    with sdpa_enabled(model, recipe="fast_8b") as report:
        model(x)
    assert_type(report, CallReport)
    assert_type(report.ran, int)
    with Policy.load("policy.json").applied(model):
        model(x)
    with install_as_sageattention("sage2_8b") as alias:
        assert_type(alias, SageAttentionAlias)


def errors() -> str:
    try:
        attention(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    except InvalidArgumentError as error:
        return str(error)
    except LowbitError:
        raise
    return ""
