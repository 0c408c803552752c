"""The public functions: checks, a request, one dispatch, out."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Unpack

from . import ops
from .backends.dispatch import Explanation, check_possible, explain_request, run_request
from .backends.varlen import promised, run_sequences
from .call import checks
from .call.checks import for_scale
from .call.mask_types import Mask, checked_mask, tensors_of
from .call.memo import Memo
from .call.request import OnEmulation, Request, make_request, wants_grad
from .call.sinks import check_sinks, with_sinks
from .errors import InvalidArgumentError, UnsupportedError
from .recipes.definition import Recipe
from .recipes.machine import Machine, resolve_machine
from .recipes.named import recipe as find_recipe

Layout = Literal["HND", "NHD"]
CausalAlignment = Literal["bottom_right", "top_left"]


Training = Literal["refuse", "exact"]


class _Options(TypedDict, total=False):
    """What `attention` and `attention_varlen` share, for the type checker."""

    recipe: str | Recipe
    is_causal: bool
    causal_alignment: CausalAlignment | None
    sm_scale: float | None
    like: str | Machine | None
    on_emulation: OnEmulation
    sinks: Tensor | None


class _AttentionOptions(_Options, total=False):
    attn_mask: Mask | None
    layout: Layout
    training: Training
    qk_norm: tuple[Tensor, Tensor] | None
    rope: tuple[Tensor, Tensor] | None
    out_dtype: torch.dtype | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_AttentionOptions]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_AttentionOptions]
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: str | Recipe = "auto",
    is_causal: bool = False,
    causal_alignment: CausalAlignment | None = None,
    attn_mask: Mask | None = None,
    sm_scale: float | None = None,
    layout: Layout = "HND",
    return_lse: bool = False,
    like: str | Machine | None = None,
    training: Training = "refuse",
    on_emulation: OnEmulation = "warn",
    sinks: Tensor | None = None,
    qk_norm: tuple[Tensor, Tensor] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention ``softmax(sm_scale · Q Kᵀ + mask) V``, quantised as ``recipe`` says.

    Args:
        q: ``[B, Hq, Nq, D]`` (HND) or ``[B, Nq, Hq, D]`` (NHD); float16, bfloat16 or float32 (float64 with exact).
        k, v: ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]`` (or NHD), Hq a multiple of Hkv (GQA, MQA). D and Dv up to
            256; any strides.
        recipe: ``"auto"`` (the fastest that keeps the default error budget and is not slower than torch; exact where
            no kernel runs), a recipe's name such as ``"sage2_8b"`` with changes if wanted
            (``"sage2_4b:smooth_q=false"``), or a `Recipe`. A named recipe always runs, emulated where no kernel can.
        is_causal: hide later keys. Query i sees key j if ``j ≤ i + Nk − Nq``.
        causal_alignment: ``"bottom_right"`` (the default with ``is_causal``: the last query sees the last key) or
            ``"top_left"`` (``j ≤ i``, PyTorch's).
        attn_mask: broadcastable to ``[B, Hq, Nq, Nk]`` in either layout; bool (True: may see) or floating (added to
            the logits); or a `KeyPadding`, `Window`, `ALiBi` or `BlockMask`, which say it in a few numbers. May be
            combined with ``is_causal``. Keys that a key-padding mask hides from every query are left out of the means
            and scales.
        sm_scale: ``1 / √D`` if None; also one of numpy's numbers, or a tensor without dimensions. A quantising recipe
            takes what float32 holds.
        layout: ``"HND"`` or ``"NHD"``.
        return_lse: return the log-sum-exp, too.
        like: whose numbers an emulation gives: ``"sm_80"``, ``"sm_86"``, ``"sm_89"`` (the default), ``"sm_90a"``,
            ``"sm_120a"``, or a `Machine`. Only with a named, quantising recipe.
        training: a call whose gradients autograd would record is an error with a quantising recipe (``"refuse"``), or
            runs exact attention instead, by torch and with gradients (``"exact"``).
        on_emulation: what happens where no kernel can run a named recipe and ``like`` did not ask for an emulation.
            ``"warn"``: on a GPU, an `EmulationWarning` with every kernel's reasons, once a process for a recipe and
            these reasons; on a CPU nothing, as no kernel runs there. ``"error"``: an error with these reasons, on every
            device. ``"allow"``: nothing. ``recipe="auto"`` never emulates.
        sinks: floating ``[Hq]``: a logit per query head (in natural units; ``sm_scale`` does not touch it) that joins
            each row's softmax and has no value, as gpt-oss has them. Exact, whatever the recipe is; no gradient.
        qk_norm, rope, out_dtype: not yet; docs/api.md says what they will be. ``None`` is all they take.
    Returns:
        The output in q's dtype and layout (``Dv`` last, contiguous); with ``return_lse`` also the natural logarithm of
        the softmax's denominator, sinks included, float32 ``[B, Hq, Nq]`` in both layouts. A row that sees no key gives
        0 and −inf (its sink, if there is one).

    Quantised attention is for inference. From finite inputs whose logits are finite in float32 comes a finite output;
    a group of Q, K or V whose largest magnitude is below 2⁻¹¹² counts as zero.

    >>> q = k = v = torch.randn(1, 2, 128, 64)
    >>> attention(q, k, v, recipe="sage2_8b").shape
    torch.Size([1, 2, 128, 64])

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or value.
        InvalidRecipeError: an unknown recipe or option, or a contradiction.
        UnsupportedError: nothing can run the call (a gradient of a quantised recipe, say), with every reason.
        EmulationRefusedError: the emulation alone could, and ``on_emulation`` is ``"error"``.
    """
    _refuse_unbuilt(qk_norm=qk_norm, rope=rope, out_dtype=out_dtype)
    if sinks is not None:
        checks.check_flag("return_lse", return_lse)
        out, lse = attention(
            q, k, v, recipe=recipe, is_causal=is_causal, causal_alignment=causal_alignment, attn_mask=attn_mask,
            sm_scale=sm_scale, layout=layout, return_lse=True, like=like, training=training, on_emulation=on_emulation,
        )  # fmt: skip
        of_heads = 1 if layout == "HND" else 2
        checked = check_sinks(sinks, out.shape[of_heads], q, k, v, *tensors_of(attn_mask))
        out, lse = with_sinks(out, lse, checked, of_heads)
        return (out, lse) if return_lse else out
    recipe, like = for_training(training, recipe, like, q, k, v, *tensors_of(attn_mask))
    if goes_through_the_op(q, k, v, attn_mask):
        # (torch.compile cannot trace how changes are read: the operator refuses wrong ones)
        named = recipe.partition(":")[0] if torch.compiler.is_compiling() and isinstance(recipe, str) else recipe
        *_, scale, request = _attention_request(
            q, k, v, named, is_causal, causal_alignment, attn_mask, sm_scale, layout, return_lse, like, on_emulation
        )
        check_possible(request)
        sm_scale = None if sm_scale is None else scale
        out, lse = ops.attention(
            q, k, v, attn_mask, recipe, is_causal, causal_alignment, sm_scale, layout, return_lse, like, on_emulation
        )
        return (out, lse) if return_lse else out
    return run_attention(
        q, k, v, recipe, is_causal, causal_alignment, attn_mask, sm_scale, layout, return_lse, like, on_emulation
    )


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: str | Recipe,
    is_causal: bool,
    causal_alignment: str | None,
    attn_mask: Mask | None,
    sm_scale: float | None,
    layout: str,
    return_lse: bool,
    like: str | Machine | None,
    on_emulation: OnEmulation,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` with every argument given; the operator of `ops` comes here, too."""
    key: tuple[object, ...] | None = None
    known = None
    try:
        plain = type(q) is type(k) is type(v) is Tensor and not torch.compiler.is_compiling()
        plain = plain and torch._C._functorch.peek_interpreter_stack() is None
        plain = plain and torch._C._get_tracing_state() is None
        if plain and attn_mask is None and like is None and not wants_grad(q, k, v):
            key = (
                q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, recipe,
                q.layout, k.layout, v.layout,
                is_causal, causal_alignment, sm_scale, layout, return_lse, on_emulation,
                type(is_causal), type(return_lse), type(sm_scale),  # (1 equals True and 1.0, and is refused or not)
            )  # fmt: skip
            known = _calls.get(key)
    except (
        AttributeError,
        TypeError,
        RuntimeError,
    ):  # no tensor, a nested one, what cannot be hashed: checks say which
        key = None
    if known is not None:
        scale, request, mask = *known, None
        if layout == "NHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, k, v, mask, scale, request = _attention_request(
            q, k, v, recipe, is_causal, causal_alignment, attn_mask, sm_scale, layout, return_lse, like, on_emulation
        )
        if key is not None:
            _calls.put(key, (scale, request))
    (out, lse), _ = run_request(q, k, v, mask, scale, request)
    if layout == "NHD":
        out = out.transpose(1, 2)
    out = out.contiguous()
    return (out, promised(lse)) if return_lse else out


_calls: Memo[tuple[float, Request]] = Memo()
"""The scale and the request of calls that passed every check, by all that those look at: most calls are repeated."""


def goes_through_the_op(q: Tensor, k: Tensor, v: Tensor, attn_mask: Mask | None) -> bool:
    """Whether the call is traced, or its tensors hold no data: then one operator stands for it (`ops`).

    A gradient is torch's matter, or refused.
    """
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor) or (isinstance(q, Tensor) and q.is_meta):
        return not wants_grad(q, k, v, *tensors_of(attn_mask))
    return False


def for_training(
    training: str, recipe: str | Recipe, like: str | Machine | None, *tensors: Tensor | None
) -> tuple[str | Recipe, str | Machine | None]:
    """The recipe and machine that a call gets whose ``training`` is "refuse" or "exact"."""
    if training != "refuse":
        checks.check_choice("training", training, checks.TRAINING)
        if wants_grad(*tensors):
            return "exact", None
    return recipe, like


def _refuse_unbuilt(**given: object) -> None:
    """Arguments whose names stand fast and that nothing reads yet.

    Raises:
        UnsupportedError: one is given.
    """
    if asked := [name for name, value in given.items() if value is not None]:
        raise UnsupportedError(f"{', '.join(asked)}: not yet (docs/api.md says what it will be); leave it None")


def pack_kv(k: Tensor, v: Tensor, *, recipe: str | Recipe, layout: Layout = "HND") -> Any:
    """K and V packed once, for several calls: not yet. docs/api.md says what it will be.

    Raises:
        UnsupportedError: always.
    """
    del k, v, recipe, layout
    raise UnsupportedError("pack_kv: not yet (docs/api.md says what it will be); give k and v to attention itself")


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: str | Recipe = "auto",
    is_causal: bool = False,
    causal_alignment: CausalAlignment | None = None,
    attn_mask: Mask | None = None,
    sm_scale: float | None = None,
    layout: Layout = "HND",
    return_lse: bool = False,
    like: str | Machine | None = None,
    training: Training = "refuse",
    on_emulation: OnEmulation = "warn",
    sinks: Tensor | None = None,
) -> Explanation:
    """Which implementation and recipe `attention` would run for these arguments, and why not the others.

    With ``sinks`` that is who gives output and log-sum-exp of the keys.

    It warns of nothing: where `attention` would, the emulation's line says so, and where ``on_emulation="error"``
    refuses the emulation, nothing runs.

    >>> q = k = v = torch.randn(1, 2, 128, 64)
    >>> print(explain(q, k, v).implementation)
    torch_sdpa

    Raises:
        InvalidArgumentError: as `attention`, and inside torch.compile; a call that nothing can run is explained, not
            refused.
    """
    if torch.compiler.is_compiling():
        raise InvalidArgumentError("explain(…) inside torch.compile: call it outside, on tensors of the same shapes")
    recipe, like = for_training(training, recipe, like, q, k, v, *tensors_of(attn_mask))
    *_, request = _attention_request(
        q, k, v, recipe, is_causal, causal_alignment, attn_mask, sm_scale, layout, return_lse or sinks is not None,
        like, on_emulation,
    )  # fmt: skip
    if sinks is not None:
        check_sinks(sinks, request.q_heads, q, k, v, *tensors_of(attn_mask))
    return explain_request(request)


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None, max_seqlen_k: int | Tensor | None = None,
    *, return_lse: Literal[False] = False, **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None, max_seqlen_k: int | Tensor | None = None,
    *, return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *,
    recipe: str | Recipe = "auto",
    is_causal: bool = False,
    causal_alignment: CausalAlignment | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    like: str | Machine | None = None,
    on_emulation: OnEmulation = "warn",
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths, packed one behind another. Means and scales are per sequence.

    Args:
        q: ``[total_q, Hq, D]``; k, v: ``[total_k, Hkv, D]`` and ``[total_k, Hkv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[B + 1]``; sequence b is tokens ``cu[b] … cu[b + 1] − 1``.
        max_seqlen_q, max_seqlen_k: the longest sequences, or more. Not needed, and on a kernel not looked at.
        others: as in `attention`; a causal alignment holds within each sequence.
    Returns:
        ``[total_q, Hq, Dv]``; with ``return_lse`` also float32 ``[Hq, total_q]``.

    On a GPU, where a kernel runs the recipe, nobody reads ``cu_seqlens`` but the GPU: the call never waits for it, and
    in a captured CUDA graph lengths may change from replay to replay. Tokens may be left over before ``cu[0]`` and from
    ``cu[B]`` on: their output is 0 and their lse −inf. Offsets that fall, or point outside of the tensors, are not
    found there (they count as the nearest that do neither); elsewhere, where each sequence is a call of its own, they
    are errors.

    >>> q = k = v = torch.randn(10, 2, 16)
    >>> cu = torch.tensor([0, 3, 10])
    >>> attention_varlen(q, k, v, cu, cu, recipe="sage2_8b", is_causal=True).shape
    torch.Size([10, 2, 16])

    Raises:
        InvalidArgumentError, InvalidRecipeError, UnsupportedError: as `attention`.
    """
    if sinks is not None:
        checks.check_flag("return_lse", return_lse)
        out, lse = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, recipe=recipe, is_causal=is_causal,
            causal_alignment=causal_alignment, sm_scale=sm_scale, return_lse=True, like=like, on_emulation=on_emulation,
        )  # fmt: skip
        out, lse = with_sinks(out, lse, check_sinks(sinks, q.shape[1], q, k, v), 1)
        return (out, lse) if return_lse else out
    arguments = recipe, is_causal, causal_alignment, sm_scale, return_lse, like, on_emulation
    if torch.compiler.is_compiling() and not wants_grad(q, k, v):
        out, lse = ops.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *arguments)
        return (out, lse) if return_lse else out
    return run_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *arguments)


def run_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    recipe: str | Recipe,
    is_causal: bool,
    causal_alignment: str | None,
    sm_scale: float | None,
    return_lse: bool,
    like: str | Machine | None,
    on_emulation: OnEmulation,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_varlen` with every argument given; the operator of `ops` comes here, too."""
    chosen, machine = _check_options(recipe, like, is_causal, causal_alignment, return_lse, on_emulation)
    (out, lse), _ = run_sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, chosen, machine, sm_scale,
        is_causal=is_causal, bottom_right=causal_alignment != "top_left", return_lse=return_lse,
        on_emulation=on_emulation,
    )  # fmt: skip
    return (out, promised(lse)) if return_lse else out


def _check_options(
    recipe: str | Recipe,
    like: str | Machine | None,
    is_causal: bool,
    causal_alignment: str | None,
    return_lse: bool,
    on_emulation: OnEmulation,
) -> tuple[Recipe | None, Machine | None]:
    """The recipe (``None`` for auto) and machine, and a look at the flags."""
    checks.check_flag("is_causal", is_causal)
    checks.check_flag("return_lse", return_lse)
    checks.check_alignment(is_causal, causal_alignment)
    checks.check_choice("on_emulation", on_emulation, checks.ON_EMULATION)
    chosen = None if isinstance(recipe, str) and recipe == "auto" else find_recipe(recipe)
    return chosen, resolve_like(chosen, like)


def resolve_like(recipe: Recipe | None, like: str | Machine | None) -> Machine | None:
    if like is None:
        return None
    if recipe is None or recipe.is_exact:
        raise InvalidArgumentError(
            f"like={str(like)!r} says whose quantised numbers are emulated; recipe {recipe or 'auto'} emulates nothing"
        )
    machine = resolve_machine(like)
    recipe.check_geometry(machine.geometry)
    return machine


def _attention_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: str | Recipe,
    is_causal: bool,
    causal_alignment: str | None,
    attn_mask: Mask | None,
    sm_scale: float | None,
    layout: str,
    return_lse: bool,
    like: str | Machine | None,
    on_emulation: OnEmulation,
) -> tuple[Tensor, Tensor, Tensor, Mask | None, float, Request]:
    """Checked tensors as ``[B, H, N, D]`` views, the checked mask, the scale, and the request."""
    checks.check_choice("layout", layout, checks.LAYOUTS)
    chosen, machine = _check_options(recipe, like, is_causal, causal_alignment, return_lse, on_emulation)
    checks.check_tensors(q, k, v, 4, "[B, H, N, D]" if layout == "HND" else "[B, N, H, D]")
    if layout == "NHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    checks.check_hnd(q, k, v)
    scale = checks.resolve_scale("sm_scale", sm_scale, q.shape[3])
    chosen = for_scale("sm_scale", scale, chosen)
    mask = checked_mask(attn_mask, q, k)
    request = make_request(
        q, k, v, mask, chosen, machine,
        is_causal=is_causal, bottom_right=causal_alignment != "top_left", return_lse=return_lse, layout=layout,
        on_emulation=on_emulation,
    )  # fmt: skip
    return q, k, v, mask, scale, request


ops.implement(run_attention)
ops.implement_varlen(run_attention_varlen)
