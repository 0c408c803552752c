"""Weights in 16 bits with their model's sizes: one safetensors file a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lowbit_attention import InvalidArgumentError

FOLDER = Path(__file__).parent / "weights"
SCHEMA = "1"

Model = TypeVar("Model", bound=nn.Module)


def save(path: Path, model: nn.Module, notes: dict[str, str]) -> None:
    """Write ``model`` (whose ``config`` is a dataclass) in float16, which has three digits more than bfloat16 and
    range to spare for weights; ``notes`` go into the file's header.

    Raises:
        InvalidArgumentError: if a weight does not fit float16.
    """
    tensors = {
        name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in model.state_dict().items()
    }
    if bad := [name for name, weight in tensors.items() if not bool(weight.isfinite().all())]:
        raise InvalidArgumentError(f"not finite in float16: {', '.join(bad)}")
    config: Any = model.config
    header = {"schema": SCHEMA, "kind": type(model).__name__, "config": json.dumps(dataclasses.asdict(config)), **notes}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=header)


def load(path: Path, kind: Callable[[Any], Model], config_type: type[Any]) -> Model:
    """The model in ``path``: ``kind(config_type(**sizes))`` with its weights in float32, in eval mode, on the CPU.

    Raises:
        InvalidArgumentError: if the file is missing, or holds another kind of model or other weights.
    """
    if not path.is_file():
        raise InvalidArgumentError(f"no weights in {path}: train them (docs/subjects.md says how)")
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        wanted = {"schema": SCHEMA, "kind": getattr(kind, "__name__", "")}
        if found := {key: header.get(key) for key, value in wanted.items() if header.get(key) != value}:
            raise InvalidArgumentError(f"{path} holds {found}, not {wanted}")
        model = kind(config_type(**json.loads(header["config"])))
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if shapes != {name: tuple(t.shape) for name, t in state.items()}:
        raise InvalidArgumentError(f"the weights in {path} are not those of {model.config}")
    model.load_state_dict(state)
    return model.eval()
