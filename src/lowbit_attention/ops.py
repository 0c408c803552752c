"""One functional operator for a whole attention call, for `torch.compile`, export and fake tensors.

In eager mode `attention` runs without it: an operator costs the host 6–10 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from .call.checks import TRANSFORMED
from .call.mask_types import Mask, from_text, tensors_of, to_text
from .call.request import OnEmulation, has_tangent
from .call.torch_call import OPERANDS, as_query_lies, of_operands
from .errors import InvalidArgumentError, UnsupportedError
from .recipes.definition import Recipe
from .recipes.machine import MACHINES, Machine
from .recipes.named import recipe as find_recipe

# (importlib.reload runs this file again, and an operator can be defined once in a process)
LIBRARY: Any = globals().get("LIBRARY") or torch.library.Library("lowbit_attention", "DEF")  # type: ignore[no-untyped-call]
_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = globals().get("_FUNCTIONS") or {}
"""What each operator does now, by name: ``run``, ``fake``, ``check``."""

Run = Callable[..., Any]


@lru_cache(maxsize=256)
def parse_recipe(text: str) -> str | Recipe:
    """What crossed as text: a `Recipe` from its JSON form, or a name."""
    return Recipe.from_json(text) if text.startswith("{") else text


def operator(
    schema: str, run: Run, fake: Run, check: Callable[..., Any] = lambda *_: None, mutates: bool = False
) -> None:
    """Define an operator of ours for every device; with the same name again (a reload) it gets the newer functions.

    Args:
        schema: as `torch.library.Library.define` has it.
        run: what it does. fake: the same for tensors without data.
        check: sees the arguments before autograd leaves the tensors: below that they have no tangents of forward-mode
            AD any more, and above it nothing of ours runs in compiled code. An answer, if it gives one, is the call's.
        mutates: whether it changes an argument (then it has no rule for `torch.func.vmap`).
    """
    name = schema.partition("(")[0]
    known = name in _FUNCTIONS
    functions = _FUNCTIONS.setdefault(name, {})
    functions.update(run=run, fake=fake, check=check)
    if known:
        return
    LIBRARY.define(schema)
    LIBRARY.impl(name, lambda *arguments: functions["run"](*arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_attention::{name}", lambda *a: functions["fake"](*a), lib=LIBRARY)
    if not mutates:
        torch.library.register_vmap(f"lowbit_attention::{name}", _vmap, lib=LIBRARY)
    packet = getattr(torch.ops.lowbit_attention, name)

    def autograd(*arguments: Any) -> Any:
        answer = functions["check"](*arguments)
        if answer is not None:
            return answer
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*arguments)

    LIBRARY.impl(name, autograd, "Autograd")


def sdpa_operator(name: str, more: str, run: Callable[..., Tensor]) -> None:
    """Define an operator that stands for one call of torch's ``scaled_dot_product_attention`` without dropout.

    Args:
        more: what it takes behind the call's arguments (`OPERANDS`), as a schema has it.
        run: called as ``run(call, *more)`` with a `TorchCall`.
    """

    def implementation(*operands: Any) -> Tensor:
        call, options = of_operands(*operands)
        return as_query_lies(run(call, *options), call.query)

    def fake(*operands: Any) -> Tensor:
        return of_operands(*operands)[0].empty_answer()

    def tangents_to_torch(*operands: Any) -> Tensor | None:
        call, _ = of_operands(*operands)
        return call.run(torch._C._nn.scaled_dot_product_attention) if call.has_tangent() else None

    operator(f"{name}({OPERANDS}, {more}) -> Tensor", implementation, fake, tangents_to_torch)


def _vmap(info: object, in_dims: object, *arguments: object) -> NoReturn:
    raise InvalidArgumentError(f"the call {TRANSFORMED}")


def refuse_tangents(q: Tensor, k: Tensor, v: Tensor, mask_tensors: list[Tensor], *options: Any) -> None:
    """The check of an operator that has no forward-mode derivative.

    Raises:
        UnsupportedError: one is asked for.
    """
    if has_tangent(q, k, v, *mask_tensors):
        raise UnsupportedError(
            "quantised attention has no forward-mode derivative (make_dual, jvp, jacfwd, hessian), and in compiled "
            "code exact attention has none, either; call torch.nn.functional.scaled_dot_product_attention"
        )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask_tensors: list[Tensor], mask: str, recipe: str, *options: Any
) -> tuple[Tensor, Tensor]:
    del k, mask_tensors, mask
    if recipe != "auto":
        find_recipe(parse_recipe(recipe))
    layout, return_lse = options[3], options[4]
    batch, length, heads = (q.shape[0], q.shape[2], q.shape[1]) if layout == "HND" else q.shape[:3]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = (batch, heads, length) if return_lse else (0,)
    return out, q.new_empty(lse, dtype=torch.float32)


SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] mask_tensors, str mask, str recipe, bool is_causal, "
    "str? causal_alignment, float? sm_scale, str layout, bool return_lse, str? like, "
    "str on_emulation='warn') -> (Tensor, Tensor)"
)
"""A mask crosses as its tensors and a text (`call.mask_types`): new kinds of masks need no new schema. docs/api.md has
what will be added behind ``on_emulation``."""


def implement(run: Run) -> None:
    """Let ``run`` (`api.run_attention`) be what the operator does on every device."""

    def implementation(
        q: Tensor, k: Tensor, v: Tensor, mask_tensors: list[Tensor], mask: str, recipe: str, *options: Any
    ) -> tuple[Tensor, Tensor]:
        # (torch leaves out what equals its default in the schema)
        is_causal, causal_alignment, sm_scale, layout, return_lse, like, on_emulation = (*options, "warn")[:7]
        chosen, attn_mask = parse_recipe(recipe), from_text(mask, mask_tensors)
        result = run(
            q, k, v, chosen, is_causal, causal_alignment, attn_mask, sm_scale, layout, return_lse, like, on_emulation
        )
        return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))

    operator(SCHEMA, implementation, _fake, refuse_tangents)


VARLEN_SCHEMA = (
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, str recipe, "
    "bool is_causal, str? causal_alignment, float? sm_scale, bool return_lse, str? like, "
    "str on_emulation='warn') -> (Tensor, Tensor)"
)


def implement_varlen(run: Run) -> None:
    """Let ``run`` (`api.run_attention_varlen`) be what the operator does on every device."""

    def implementation(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, recipe: str, *options: Any
    ) -> tuple[Tensor, Tensor]:
        options = (*options, "warn")[:6]
        result = run(q, k, v, cu_q, cu_k, None, None, parse_recipe(recipe), *options)
        return result if options[3] else (result, q.new_empty(0, dtype=torch.float32))

    def fake(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, recipe: str, *options: Any
    ) -> tuple[Tensor, Tensor]:
        del k, cu_q, cu_k
        if recipe != "auto":
            find_recipe(parse_recipe(recipe))
        lse = (q.shape[1], q.shape[0]) if options[3] else (0,)
        return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(lse, dtype=torch.float32)

    def check(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
        refuse_tangents(q, k, v, [], *options)

    operator(VARLEN_SCHEMA, implementation, fake, check)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    recipe: str | Recipe,
    is_causal: bool,
    causal_alignment: str | None,
    sm_scale: float | None,
    return_lse: bool,
    like: str | Machine | None,
    on_emulation: OnEmulation,
) -> tuple[Tensor, Tensor]:
    """Call the operator: output and lse (empty unless ``return_lse``).

    Raises:
        InvalidArgumentError: a `Machine` of the caller's own, which an operator cannot take.
    """
    text = recipe if isinstance(recipe, str) else recipe.to_json()
    out, lse = torch.ops.lowbit_attention.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, text, is_causal, causal_alignment, sm_scale, return_lse, _named(like),
        on_emulation,
    )  # fmt: skip
    return out, lse


def _named(like: str | Machine | None) -> str | None:
    """A machine's name, which can cross into an operator."""
    if isinstance(like, Machine) and MACHINES.get(like.name) is like:
        return like.name
    if isinstance(like, Machine):
        raise InvalidArgumentError(
            f"like={like.name!r}: inside torch.compile give one of the names {', '.join(MACHINES)}, no Machine object"
        )
    return like


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Mask | None,
    recipe: str | Recipe,
    is_causal: bool,
    causal_alignment: str | None,
    sm_scale: float | None,
    layout: str,
    return_lse: bool,
    like: str | Machine | None,
    on_emulation: OnEmulation,
) -> tuple[Tensor, Tensor]:
    """Call the operator: output and lse (empty unless ``return_lse``).

    Raises:
        InvalidArgumentError: a `Machine` of the caller's own, which an operator cannot take.
    """
    like = _named(like)
    text = recipe if isinstance(recipe, str) else recipe.to_json()
    out, lse = torch.ops.lowbit_attention.attention(
        q,
        k,
        v,
        tensors_of(attn_mask),
        to_text(attn_mask),
        text,
        is_causal,
        causal_alignment,
        sm_scale,
        layout,
        return_lse,
        like,
        on_emulation,
    )
    return out, lse
