"""ComfyUI nodes of lowbit-attention: "Low-bit attention" and "Low-bit attention: calibrate".

Copy this folder into ``ComfyUI/custom_nodes``. It needs the package ``lowbit-attention`` in ComfyUI's own Python, which
does all of the work (``lowbit_attention.integrations.comfyui``); its guide is docs/comfyui.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

try:
    from lowbit_attention import RECIPES, InvalidArgumentError
    from lowbit_attention import recipe as find_recipe
    from lowbit_attention.adaptive import Policy
    from lowbit_attention.adaptive.calibrate import POLICY, Rule
    from lowbit_attention.adaptive.observing import DEFAULT_CANDIDATES
    from lowbit_attention.integrations import comfyui
    from lowbit_attention.integrations.comfyui.runs import LARGEST_SIGMA
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lowbit_attention":
        raise
    raise ImportError(
        "the nodes of lowbit-attention need the package itself, in the Python that runs ComfyUI: "
        f'"{sys.executable}" -m pip install "lowbit-attention[cuda13]"'
    ) from error

CATEGORY = "model_patches/lowbit-attention"
CHOSEN_BY_POLICY = "policy: "
COSTS = {"RTX 4090 (published rates)": "sm_89", "H100 (measured)": "sm_90", "this card (timed after the run)": "this"}


def policies() -> Path:
    """Where policies are kept: a workflow is somebody else's file, and reads and writes nowhere else."""
    return Path(folder_paths.get_output_directory()) / "lowbit"


def policy_folder(name: str) -> Path:
    """The folder of a policy by its name.

    Raises:
        InvalidArgumentError: something else than a plain name (a path, say).
    """
    if not re.fullmatch(r"\w[\w .-]*", name) or name != name.rstrip(" ."):
        raise InvalidArgumentError(f"the policy's name {name!r}: letters, digits, spaces, dots, - and _, and no path")
    return policies() / name


def known_policies() -> list[str]:
    """The names of those that are there."""
    return sorted(path.parent.name for path in policies().glob(f"*/{POLICY}"))


class LowBitAttention(io.ComfyNode):
    """The model with its attention in low precision."""

    @classmethod
    def define_schema(cls):
        named = [name for name, recipe in RECIPES.items() if not recipe.is_exact]
        return io.Schema(
            node_id="LowBitAttention",
            display_name="Low-bit attention",
            category=CATEGORY,
            description="Runs the model's attention with quantised Q, K and V. One line in the console says after each "
            "run how many calls did, and why the others did not. Bypass the node to undo it.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "recipe",
                    options=["auto", *named, *(CHOSEN_BY_POLICY + name for name in known_policies())],
                    default="auto",
                    tooltip="auto: the fastest kernel here that keeps the default error budget, where it is faster "
                    "than torch. policy: what the calibrate node wrote for this model.",
                ),
                io.Float.Input(
                    "sigma_start", default=LARGEST_SIGMA, min=0.0, max=LARGEST_SIGMA, step=0.001,
                    tooltip="From this sigma down. The first steps make the composition: to keep them exact, set it "
                    "below the largest sigma of the schedule.",
                ),
                io.Float.Input(
                    "sigma_end", default=0.0, min=0.0, max=LARGEST_SIGMA, step=0.001,
                    tooltip="Down to this sigma. The last steps make fine detail.",
                ),
                io.Boolean.Input("verbose", default=False, tooltip="Log the whole table of calls after each run."),
                io.Boolean.Input(
                    "emulate", default=False,
                    tooltip="Where no kernel runs the recipe, compute its numbers all the same, far slower: to look at "
                    "a recipe's pictures on another card. Off: ComfyUI's own attention runs there.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, recipe, **others):
        """A policy that was written anew is another policy."""
        if not recipe.startswith(CHOSEN_BY_POLICY):
            return ""
        file = policy_folder(recipe.removeprefix(CHOSEN_BY_POLICY)) / POLICY
        return str(file.stat().st_mtime_ns) if file.is_file() else "missing"

    @classmethod
    def execute(cls, model, recipe, sigma_start, sigma_end, verbose, emulate):
        if recipe.startswith(CHOSEN_BY_POLICY):
            recipe = Policy.load(policy_folder(recipe.removeprefix(CHOSEN_BY_POLICY)) / POLICY)
        return io.NodeOutput(
            comfyui.apply(model, recipe, sigma_start=sigma_start, sigma_end=sigma_end, verbose=verbose, emulate=emulate)
        )


class LowBitCalibrate(io.ComfyNode):
    """The model as it is; each run with it writes a policy."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LowBitAttentionCalibrate",
            display_name="Low-bit attention: calibrate",
            category=CATEGORY,
            description="Scores every attention call of a run with several recipes, and writes a policy (which recipe "
            "for which layer) and a report to output/lowbit/<name>. The picture stays the exact one. Runs add up. Then "
            "press R, and choose the policy in the node Low-bit attention.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("name", default="my model", tooltip="The policy's name."),
                io.Float.Input(
                    "budget", default=0.03, min=0.0, max=1.0, step=0.001,
                    tooltip="The mean relative error (L1) that the attention calls may have.",
                ),
                io.String.Input(
                    "candidates", default=", ".join(DEFAULT_CANDIDATES), tooltip="Recipes to choose from, by commas."
                ),
                io.Combo.Input(
                    "speeds_of", options=list(COSTS), default=next(iter(COSTS)),
                    tooltip="Whose speeds decide which recipe is worth it.",
                ),
                io.Boolean.Input(
                    "per_step", default=False,
                    tooltip="Choose for each step apart. Such a policy is for one schedule of sigmas.",
                ),
                io.Boolean.Input("verbose", default=False, tooltip="Log the whole table of calls after each run."),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, name, budget, candidates, speeds_of, per_step, verbose):
        recipes = [find_recipe(one.strip()).name for one in candidates.split(",") if one.strip()]
        rule = Rule(budget=budget, cost=COSTS[speeds_of], mode="joint" if per_step else "per-layer")
        return io.NodeOutput(
            comfyui.calibrate(model, policy_folder(name), candidates=recipes, rule=rule, verbose=verbose)
        )


class LowBitExtension(ComfyExtension):
    """Both nodes."""

    async def get_node_list(self):
        return [LowBitAttention, LowBitCalibrate]


async def comfy_entrypoint():
    """What ComfyUI asks for."""
    return LowBitExtension()
