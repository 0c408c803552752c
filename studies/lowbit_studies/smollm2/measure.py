"""One batch of windows by one way of attention: logits, and how far they are from the exact model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_attention import RECIPES, CallReport, LowbitError, sdpa_enabled
from lowbit_attention.adaptive import Policy, Sample, observe
from lowbit_attention.integrations.intercept import intercepted

from .model import Witness

EXACT = "exact"
BF16_ATTENTION, BF16_MODEL = "bf16 attention", "bf16 model"
RECIPE_NAMES = tuple(name for name in RECIPES if name != EXACT)
_ROWS = 1024
"""Predictions that are compared at once: in float64, [1024, 49152] are 0.4 GB."""

Ran = dict[str, int]
"""Attention calls by what ran them: an implementation, or a policy's recipe."""


class NotQuantisedError(LowbitError):
    """An attention call did not run the recipe that was asked for."""


@dataclass(frozen=True)
class Way:
    """How every attention call of the model runs. kind: ``recipe``, ``policy``, ``yardstick`` or ``exact``."""

    name: str
    kind: str
    run: Callable[[Witness, Tensor], tuple[Tensor, Ran]]
    four_bits: float = 0.0


@dataclass(frozen=True)
class End:
    """A window's result. nats: mean negative log-likelihood of the next token. kl: mean KL divergence from the exact
    model's prediction, in nats. agree: share of the positions whose likeliest token is the exact model's. right: share
    whose likeliest token comes next."""

    nats: float
    kl: float
    agree: float
    right: float


@torch.no_grad()
def logits(model: Any, windows: Tensor) -> Tensor:
    """``[W, N, vocabulary]`` of windows ``[W, N + 1]``, on the model's device."""
    out: Tensor = model(input_ids=windows[:, :-1].to(model.device), use_cache=False).logits
    return out


def exact_way() -> Way:
    """The reference: torch's own attention in float32, nothing rerouted."""
    return Way(EXACT, EXACT, lambda witness, windows: (logits(witness.model, windows), {}))


def recipe_way(name: str, like: str | None) -> Way:
    """A recipe in every layer, a kernel where there is one, emulated elsewhere (as ``like``)."""

    def run(witness: Witness, windows: Tensor) -> tuple[Tensor, Ran]:
        with sdpa_enabled(witness.model, recipe=name, like=like, strict=True, on_emulation="allow") as report:
            out = logits(witness.model, windows)
        return out, check(report, name, witness.layers)

    return Way(name, "recipe", run, four_bits=float(RECIPES[name].qk_bits == 4))


def check(report: CallReport, name: str, layers: int) -> Ran:
    """What ran the calls of one forward.

    Raises:
        NotQuantisedError: a call did not run the recipe, or is missing.
    """
    by_recipe = [(kind.recipe, n) for kind, n in report.counts.items()]
    if report.ran != layers or by_recipe != [(name, layers)]:
        raise NotQuantisedError(f"{layers} calls of {name} were expected, and this is what ran:\n{report}")
    return report.by_implementation()


def policy_way(name: str, policy: Policy, like: str | None) -> Way:
    """A policy: each layer by its own recipe."""
    layers = {key.name for key in policy.routes}
    at_four = sum(policy.recipes[recipe].qk_bits == 4 for recipe in policy.routes.values())

    def run(witness: Witness, windows: Tensor) -> tuple[Tensor, Ran]:
        if len(layers) != witness.layers:
            raise NotQuantisedError(f"the policy knows {len(layers)} of {witness.layers} layers")
        with policy.applied(witness.model, like=like, on_emulation="allow"):
            return logits(witness.model, windows), dict(Counter(policy.routes.values()))

    return Way(name, "policy", run, at_four / len(policy.routes))


def yardsticks() -> list[Way]:
    """What bfloat16 does, without any quantisation."""
    return [Way(BF16_ATTENTION, "yardstick", _bf16_attention), Way(BF16_MODEL, "yardstick", _bf16_model)]


def _bf16_attention(witness: Witness, windows: Tensor) -> tuple[Tensor, Ran]:
    calls = 0

    def rounded(original: Callable[..., Tensor], name: str | None, *given: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        q, k, v, *rest = given
        out = original(q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest, **options)
        return out.to(q.dtype)

    with intercepted(rounded, witness.model):
        out = logits(witness.model, windows)
    if calls != witness.layers:
        raise NotQuantisedError(f"{calls} of {witness.layers} calls were seen")
    return out, {"torch, bf16": calls}


def _bf16_model(witness: Witness, windows: Tensor) -> tuple[Tensor, Ran]:
    with _weights_as(witness.model, torch.bfloat16):
        return logits(witness.model, windows).float(), {"torch, bf16": witness.layers}


@contextmanager
def _weights_as(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model's weights are of another type; afterwards they are what they were, to the bit.

    (Tied weights stay tied: a parameter's data is exchanged. Buffers, which hold RoPE's frequencies, stay float32.)
    """
    kept = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def judge(exact: Tensor, other: Tensor, windows: Tensor) -> list[End]:
    """Each window's result.

    Args:
        exact, other: logits ``[W, N, vocabulary]``; windows: int64 ``[W, N + 1]``.
    """
    targets = windows[:, 1:].to(exact.device)
    return [_judge(a, b, target) for a, b, target in zip(exact, other, targets, strict=True)]


def _judge(exact: Tensor, other: Tensor, target: Tensor) -> End:
    sums = torch.zeros(4, dtype=torch.float64, device=exact.device)
    for first in range(0, len(target), _ROWS):
        rows = slice(first, first + _ROWS)
        a, b = exact[rows].double().log_softmax(dim=-1), other[rows].double().log_softmax(dim=-1)
        wanted, best = target[rows], b.argmax(dim=-1)
        sums += torch.stack(
            (
                -b.gather(1, wanted[:, None]).sum(),
                (a.exp() * (a - b)).sum(),
                (best == a.argmax(dim=-1)).sum(),
                (best == wanted).sum(),
            )
        )
    return End(*(sums / len(target)).tolist())


def layer_errors(
    witness: Witness, windows: Tensor, recipes: Sequence[str], like: str | None
) -> Iterator[dict[str, Any]]:
    """Each layer's attention output by every recipe, against float64 attention on the exact model's own Q, K and V.

    All heads and tokens of the windows; a row for each layer and recipe: ``layer``, ``recipe``, ``l1``, ``cos_sim``,
    ``rmse``.
    """
    everything = Sample(heads=None, tiles=None)
    with observe(witness.model, recipes, sample=everything, like=like) as watch:
        logits(witness.model, windows)
    for layer, record in enumerate(watch.observations.records.values()):
        if record.problem:
            raise NotQuantisedError(f"layer {layer} was not scored: {record.problem}")
        for name, score in record.scores.items():
            yield {"layer": layer, "recipe": name, "l1": score.l1, "cos_sim": score.cos_sim, "rmse": score.rmse}
