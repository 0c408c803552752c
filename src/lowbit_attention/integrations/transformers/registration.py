"""`register` and `unregister`: a recipe under a name of transformers' own registries, of attention and of masks."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor, nn

from ...adaptive.policy import Policy
from ...api import Training
from ...call.request import OnEmulation
from ...errors import InvalidArgumentError, MissingExtraError, UnsupportedError, shown
from ...recipes.definition import Recipe
from ...recipes.machine import Machine
from ..call_report import CallReport
from ..packed import PackedCall
from .runs import OfPolicy, OneRecipe, RunOptions
from .words import refuse, words

OLDEST = "4.56"
_SPECIAL = ("flash", "sdpa", "flex", "eager", "paged", "/", "|", "@", ":")
"""Parts of names that transformers reads something into."""

ADDS_MASKS_ITSELF = frozenset({"bigbird_pegasus"})
"""Kinds of models in which attention that is not registered takes masks made for attention that is."""

_registered: dict[str, Attend] = {}


def register(
    recipe: str | Recipe | Policy = "auto",
    name: str = "lowbit",
    *,
    model: nn.Module | None = None,
    timesteps: Any = None,
    like: str | Machine | None = None,
    training: Training = "exact",
    strict: bool = False,
    on_emulation: OnEmulation = "warn",
) -> CallReport:
    """Make ``recipe`` an attention implementation of transformers: ``model.set_attn_implementation("lowbit")``.

    Args:
        recipe: ``"auto"`` (a kernel where it is faster than torch, torch elsewhere), a recipe's name, a `Recipe`, or a
            `Policy` (a recipe for each layer).
        name: what ``attn_implementation`` is given. Registering a name again replaces what it meant, also for the
            models that use it.
        model: with a policy that was made for a model, whose layers its names are: this one's, and no other's.
        timesteps: with a policy, what moves its steps, as in `observe`.
        like, training, strict, on_emulation: as in `sdpa_enabled`.
    Returns:
        A `CallReport` that counts every attention call of the models which use the name.

    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> report = register("sage2_8b")
    >>> config = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32)
    >>> model = BertModel(config).eval()
    >>> model.set_attn_implementation("lowbit")
    >>> with torch.no_grad():
    ...     out = model(input_ids=torch.arange(20)[None])
    >>> report.by_implementation()
    {'emulation': 2}
    >>> unregister()

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe, a name that is somebody else's.
        PolicyMismatchError: the policy was made for another model.
        MissingExtraError: there is no transformers. UnsupportedError: it is too old.
    """
    attention, masks, sdpa_mask = _registries()
    _check_name(name, attention)
    options: RunOptions = {"like": like, "training": training, "strict": strict, "on_emulation": on_emulation}
    runs: OneRecipe | OfPolicy
    if isinstance(recipe, Policy):
        runs = OfPolicy(recipe, model, timesteps, options)
    elif model is not None or timesteps is not None:
        raise InvalidArgumentError("model= and timesteps= mean something with a policy only, not with a recipe")
    else:
        runs = OneRecipe(recipe, options)
    attend = Attend(name, runs)
    masks.register(name, MakeMask(name, sdpa_mask))  # (first: without it padding and windows would be lost)
    attention.register(name, attend)
    if (before := _registered.get(name)) is not None:
        before.runs.close()
    _registered[name] = attend
    return runs.report


def unregister(name: str | None = None) -> None:
    """Take ``name`` back (``None``: every name of `register`). Where nothing was registered, nothing happens.

    A model that still uses it gets transformers' error at its next call; give it another implementation before
    (``model.set_attn_implementation("sdpa")``).
    """
    for each in list(_registered) if name is None else [name]:
        mine = _registered.pop(each, None)
        if mine is None:
            continue
        mine.runs.close()
        attention, masks, _ = _registries()
        if attention._global_mapping.get(each) is mine:  # (else somebody has put another in its place)
            attention._global_mapping.pop(each, None)
            masks._global_mapping.pop(each, None)


class Attend:
    """An attention function of transformers, as its interface calls it."""

    def __init__(self, name: str, runs: OneRecipe | OfPolicy) -> None:
        self.name = name
        self.runs = runs
        runs.report.of = f"attn_implementation={name!r}"

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """``[B, Hq, Nq, D]`` and K, V of Hkv heads → the output ``[B, Nq, Hq, Dv]``, and no weights.

        Raises:
            UnsupportedError: what no recipe can do, by its name (`words.refuse`).
        """
        refuse(self.name, dropout, others)
        call, logits = words(
            module, query, key, value, attention_mask, scaling, is_causal, sliding_window, position_bias,
            sinks if s_aux is None else s_aux, cu_seq_lens_q, cu_seq_lens_k, self.runs.packs,
        )  # fmt: skip
        out = self.runs.run(call, logits)
        if isinstance(call, PackedCall):
            return out.reshape(query.shape[0], query.shape[2], *out.shape[1:]), None
        return out.transpose(1, 2).contiguous(), None


class MakeMask:
    """A mask function of transformers: that of ``sdpa``, for attention that is told nothing but the mask."""

    def __init__(self, name: str, sdpa_mask: Any) -> None:
        self.name = name
        self.sdpa_mask = sdpa_mask

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The mask, bool (True: may see) of ``[B, 1, Nq, Nk]``, or ``None`` where causality says all.

        Raises:
            UnsupportedError: a part of the model adds masks to its logits by itself.
        """
        kind = getattr(options.get("config"), "model_type", None)
        if kind in ADDS_MASKS_ITSELF:
            raise UnsupportedError(
                f"attn_implementation={self.name!r}: {kind} models add masks to logits by themselves in some layers, "
                "and no registered attention gives them in that form; use attn_implementation='eager'"
            )
        rows, keys = options.get("q_length"), options.get("kv_length")
        if rows is None and options.get("cache_position") is not None:  # (before transformers 5)
            rows = options["cache_position"].shape[0]
        if rows is not None and rows != 1 and rows != keys:
            # (of a static cache that was empty sdpa's leaves the mask out: but then attention cannot tell its free
            # places from queries that the model leaves out after the mask is made, as Gemma 4 does)
            options["allow_is_causal_skip"] = False
        return self.sdpa_mask(*args, **options)


def _check_name(name: object, attention: Any) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"name={shown(name)} is no name for attn_implementation")
    if special := [part for part in _SPECIAL if part in name]:
        raise InvalidArgumentError(f"name={name!r}: transformers reads something of its own into {special[0]!r}")
    there = attention._global_mapping.get(name)
    if there is not None and there is not _registered.get(name):
        raise InvalidArgumentError(f"name={name!r} is an attention implementation of somebody else's: {there!r}")


def _registries() -> tuple[Any, Any, Any]:
    """Transformers' registries of attention and masks, and its maker of boolean masks.

    Raises:
        MissingExtraError: there is no transformers. UnsupportedError: it is too old.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("attn_implementation='lowbit'", "transformers", "transformers")
    import transformers

    try:
        masking = importlib.import_module("transformers.masking_utils")
        attention = importlib.import_module("transformers.modeling_utils").AttentionInterface
        return attention, masking.AttentionMaskInterface, masking.sdpa_mask
    except (ImportError, AttributeError):
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no registries of attention and of masks: "
            f'pip install --upgrade "transformers>={OLDEST}", or use sdpa_enabled'
        ) from None
