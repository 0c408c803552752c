"""The training loop that both models share: AdamW, warm-up and cosine, bf16 autocast, a log, a limit in time."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_studies.subjects import weights

SAVE_EVERY_SECONDS = 60.0
WARMUP_STEPS = 200


@dataclass
class Options:
    """What the command line says."""

    data: Path
    out: Path
    minutes: float = 4.0
    steps: int | None = None
    seed: int = 0
    batch: int = 64
    learning_rate: float = 1e-3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    overrides: dict[str, float] = field(default_factory=dict)


def parse(description: str, data: Path, batch: int, learning_rate: float) -> Options:
    """The options of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data, help="from prepare.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the weights (.safetensors); the log goes beside them")
    parser.add_argument("--minutes", type=float, default=4.0, help="wall time for everything (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="so many steps instead: the same result on the same machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=batch, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="(default: %(default)s)")
    parser.add_argument("--device", default=Options.device, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks; where that fails, go on without")
    parser.add_argument(
        "--set", dest="overrides", nargs="*", default=[], metavar="SIZE=N", help="change a size of the model: layers=2"
    )
    found = vars(parser.parse_args())
    found["overrides"] = {name: float(n) for name, _, n in (text.partition("=") for text in found["overrides"])}
    return Options(**found)


def sizes(config_type: type[Any], overrides: dict[str, float]) -> Any:
    """The configuration, with sizes changed."""
    default = config_type()
    return config_type(**{name: type(getattr(default, name))(value) for name, value in overrides.items()})


def train(
    model: nn.Module,
    loss_at: Callable[[nn.Module, float, torch.Generator], Tensor],
    options: Options,
    ema_decay: float,
    validate: Callable[[nn.Module], dict[str, Any]],
    notes: dict[str, str],
    reserve_seconds: float = 15.0,
) -> None:
    """Train ``model`` and write the weights' moving average and a JSON log to ``options.out``.

    Args:
        loss_at: the loss of a new batch, given the model, how much of the training is done (0…1) and the device's
            random numbers.
        validate: figures of the finished model, read back from the file, for the log.
        reserve_seconds: kept for saving and validating within ``options.minutes``.
    """
    start = time.monotonic()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    numbers = torch.Generator(device).manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model.to(device).train()
    if options.compile:
        _compile(model, loss_at, numbers, device)
    average = [p.detach().clone() for p in model.parameters()]
    parameters: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    limit = options.minutes * 60 - reserve_seconds
    log: dict[str, Any] = {
        "options": {name: str(value) for name, value in asdict(options).items()},
        "parameters": sum(p.numel() for p in parameters),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "notes": notes,
        "curve": [],
    }
    step, saved = 0, time.monotonic()
    running: list[Tensor] = []
    while True:
        elapsed = time.monotonic() - start
        progress = step / options.steps if options.steps is not None else elapsed / limit
        if progress >= 1.0:
            break
        rate = options.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * _cosine(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_at(model, progress, numbers)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, parameters, 1 - min(ema_decay, (1 + step) / (10 + step)))
        running.append(loss.detach())
        if step % 50 == 0 or step in (1, 10):
            mean = float(torch.stack(running).mean())
            running = []
            log["curve"].append({"step": step, "seconds": round(elapsed, 1), "loss": mean, "norm": float(norm)})
            print(
                f"step {step:6d}  {elapsed:6.1f} s  loss {mean:.4f}  norm {float(norm):.2f}  lr {rate:.2e}", flush=True
            )
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step}")
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:  # something is left if the machine goes away
            _save(model, average, options.out, log, step, start, notes)
            saved = time.monotonic()
    _save(model, average, options.out, log, step, start, notes)
    loaded = weights.load(options.out, type(model), type(model.config)).to(device)
    log["validation"] = validate(loaded)
    _save(model, average, options.out, log, step, start, notes)
    print(f"{step} steps in {log['seconds']:.1f} s; {log['validation']}; wrote {options.out}", flush=True)


def _cosine(progress: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    model: nn.Module,
    average: list[Tensor],
    out: Path,
    log: dict[str, Any],
    step: int,
    start: float,
    notes: dict[str, str],
) -> None:
    current = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, mean in zip(model.parameters(), average, strict=True):
            p.copy_(mean)
        weights.save(out, model, {**notes, "steps": str(step)})
        for p, own in zip(model.parameters(), current, strict=True):
            p.copy_(own)
    log |= {"steps": step, "seconds": round(time.monotonic() - start, 1), "bytes": out.stat().st_size}
    out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


def _compile(
    model: nn.Module,
    loss_at: Callable[[nn.Module, float, torch.Generator], Tensor],
    numbers: torch.Generator,
    device: torch.device,
) -> None:
    """Compile the blocks (they share one program), try them forward and backward, and undo it all if that fails."""
    blocks: Any = model.blocks
    state = numbers.get_state()
    try:
        for block in blocks:
            block.compile(dynamic=False)
        for progress in (0.0, 0.999):  # every shape that training will see
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_at(model, progress, numbers)
            torch.autograd.backward(loss)
        print(f"compiled; loss {float(loss.detach()):.4f}", flush=True)
    except Exception as error:  # whatever the compiler trips over, training without it is only slower
        print(f"not compiled: {type(error).__name__}: {str(error)[:500]}", flush=True)
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    numbers.set_state(state)
