"""What ComfyUI's nodes do: a clone of a model whose attention runs by a recipe or a policy, or is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ...adaptive import calibrate as calibration
from ...adaptive.calibrate import Rule
from ...adaptive.fingerprint import Fingerprint
from ...adaptive.observing import DEFAULT_CANDIDATES, Observer
from ...adaptive.policy import Policy
from ...adaptive.records import Observations
from ...adaptive.scoring import Sample
from ...adaptive.subjects import Subject
from ...call.checks import check_flag
from ...errors import InvalidArgumentError, LowbitError, UnsupportedError
from ...recipes.definition import Recipe
from ...recipes.named import recipe as find_recipe
from .override import ByPolicy, ByRecipe, Override, Scoring
from .runs import LARGEST_SIGMA, Runs, SigmaWindow, log

KEY = "lowbit_attention"
"""By which name the wrappers of a node are known."""
_OVERRIDE = "optimized_attention_override"


def apply(
    model: Any,
    recipe: str | Recipe | Policy = "auto",
    *,
    sigma_start: float = LARGEST_SIGMA,
    sigma_end: float = 0.0,
    verbose: bool = False,
    emulate: bool = False,
) -> Any:
    """A clone of ComfyUI's ``model`` (a ModelPatcher) whose attention calls run in low precision.

    The model itself stays as it is, so a node that is bypassed or removed has changed nothing. What the recipe does not
    run goes to the override that the model had before, else to ComfyUI's own function, and is counted with its reason;
    one line in the log says it all at the end of each sampling run.

    Args:
        model: what a loader's output MODEL holds.
        recipe: ``"auto"``, a recipe's name, a `Recipe`, or a `Policy` made for this model (`calibrate`).
        sigma_start, sigma_end: only steps whose sigma is from ``sigma_start`` down to ``sigma_end``.
        verbose: log the whole table of calls, too.
        emulate: run a recipe's numbers where no kernel does, far slower than attention; else ComfyUI runs these calls.

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
        PolicyMismatchError: a policy that was made for another model.
        UnsupportedError: this ComfyUI cannot be patched this way.
    """
    check_flag("verbose", verbose)
    check_flag("emulate", emulate)
    window = SigmaWindow(sigma_start, sigma_end)
    on_emulation: Any = "allow" if emulate else "error"
    clone, previous = _clone(model)
    override: Override
    if isinstance(recipe, Policy):
        inside = _diffusion_model(clone)
        recipe.check(inside)
        override, what = ByPolicy(recipe, inside, previous, window, on_emulation), "a policy"
    else:
        override, what = ByRecipe(recipe, previous, window, on_emulation), str(recipe)
    _install(clone, override, Runs(f"{what}{window}", override.report, verbose, override.begin_forward))
    return clone


def calibrate(
    model: Any,
    folder: str | Path,
    *,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    rule: Rule = Rule(budget=0.03, mode="per-layer"),  # noqa: B008
    sample: Sample = Sample(),
    verbose: bool = False,
) -> Any:
    """A clone of ComfyUI's ``model`` that samples as ever, and writes a policy for it after each run.

    Every attention call is scored with every candidate on the way, on a sample of its heads and queries. Runs add up,
    as long as the clone lives; each writes ``policy.json``, ``report.html``, ``observations.json`` and ``scores.csv``.

    Args:
        model: what a loader's output MODEL holds.
        folder: where the files go.
        candidates: the recipes to choose from.
        rule: how to choose; see `lowbit_attention.adaptive.choose`.
        sample: how much of each call is scored.
        verbose: log the whole table of calls, too.

    Raises:
        LowbitError: a wrong argument; a folder that cannot be written, before and after the run.
        UnsupportedError: this ComfyUI cannot be patched this way.
    """
    check_flag("verbose", verbose)
    folder = Path(folder)
    calibration.check(folder, rule, candidates, None)
    clone, previous = _clone(model)
    inside = _diffusion_model(clone)
    recipes = {recipe.name: recipe for recipe in map(find_recipe, candidates)}
    observer = Observer(Observations(recipes, None, Fingerprint.of(inside)), sample, None)
    override = Scoring(observer, inside, previous)
    runs = Runs(
        "calibrating", override.report, verbose, override.begin_forward, observer.restart,
        lambda finished: _write(folder, inside, observer, rule, finished),
    )  # fmt: skip
    _install(clone, override, runs)
    return clone


def _write(folder: Path, model: nn.Module, observer: Observer, rule: Rule, finished: bool) -> None:
    """The policy of all runs so far."""
    seen = observer.observations
    if not finished:
        log.info("lowbit-attention: a run was not finished; nothing is written, and its calls count in the next one")
        return
    seen.runs += 1
    if not seen.records:
        raise LowbitError(
            "calibrating: no attention call of the diffusion model arrived, so there is no policy to write: a node "
            "behind this one has taken its place, or the model does not call ComfyUI's attention"
        )
    choice = calibration.decide(seen, rule)
    subject = Subject(type(model).__name__, model, ["a run of ComfyUI"], lambda prompt: None)
    files = calibration.write_all(folder, subject, choice)
    log.info("lowbit-attention: %s", " | ".join(str(choice).splitlines()))
    log.info("lowbit-attention: written after run %d: %s", seen.runs, ", ".join(map(str, files)))


def _clone(model: Any) -> tuple[Any, Callable[..., Any] | None]:
    """A clone with options of its own, and the override that it has."""
    for name in ("clone", "get_model_object", "add_wrapper_with_key"):
        if not callable(getattr(model, name, None)):
            raise UnsupportedError(
                f"{type(model).__name__} has no {name}(): this is no MODEL of ComfyUI, or a ComfyUI of before 2025-10"
            )
    clone = model.clone()
    previous = clone.model_options.get("transformer_options", {}).get(_OVERRIDE)
    if previous is not None and not callable(previous):
        raise InvalidArgumentError(f"the model has an {_OVERRIDE} that is a {type(previous).__name__}, not a function")
    return clone, previous


def _diffusion_model(model: Any) -> nn.Module:
    inside = model.get_model_object("diffusion_model")
    if not isinstance(inside, nn.Module):
        raise InvalidArgumentError(f"the model's diffusion_model is a {type(inside).__name__}, not a torch.nn.Module")
    return inside


def _install(model: Any, override: Override, runs: Runs) -> None:
    """Put them into a clone's options, which are its own."""
    kinds = import_module("comfy.patcher_extension").WrappersMP
    options = dict(model.model_options)
    options["transformer_options"] = {**options.get("transformer_options", {}), _OVERRIDE: override}
    model.model_options = options
    model.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, runs.outer_sample)
    model.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, runs.apply_model)
