"""What a model is, as far as a policy depends on it: its modules' names, classes and shapes, and its configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidArgumentError, shown


@dataclass(frozen=True)
class Fingerprint:
    """``model``: its class. ``modules``, ``parameters``: how many. ``structure``: a hash of every module's name, class
    and parameter shapes; ``config``: a hash of ``model.config``, or empty. The weights do not count."""

    model: str
    modules: int
    parameters: int
    structure: str
    config: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> Fingerprint:
        """The fingerprint of a model, compiled or not.

        Raises:
            InvalidArgumentError: no module.

        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, n)) for n in (4, 5))
        >>> Fingerprint.of(a) == Fingerprint.of(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        True
        >>> Fingerprint.of(a).differences(Fingerprint.of(b))
        ['parameters: 20, here 25', 'structure (names, classes and shapes of the modules) differs']
        """
        if not isinstance(model, torch.nn.Module):
            raise InvalidArgumentError(f"model is a {type(model).__name__}, not a torch.nn.Module")
        digest = hashlib.sha256()
        modules = parameters = 0
        inner = model
        for path, module in model.named_modules():
            if isinstance(module, torch._dynamo.OptimizedModule):
                inner = module._orig_mod if module is model else inner
                continue
            plain = ".".join(part for part in path.split(".") if part != "_orig_mod")
            shapes = [[name, list(p.shape)] for name, p in module.named_parameters(recurse=False)]
            digest.update(json.dumps([plain, type(module).__qualname__, shapes]).encode())
            modules += 1
            parameters += sum(p.numel() for _, p in module.named_parameters(recurse=False))
        kind = type(inner)
        return cls(
            f"{kind.__module__}.{kind.__qualname__}", modules, parameters, digest.hexdigest()[:16], _config(inner)
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """In what another model (``here``) differs; empty if it fits."""
        found = [
            f"{name}: {mine}, here {theirs}"
            for name in ("model", "modules", "parameters")
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        if self.structure != other.structure:
            found.append("structure (names, classes and shapes of the modules) differs")
        if self.config != other.config:
            found.append("the model's config differs")
        return found

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """What `to_json` gave.

        Raises:
            InvalidArgumentError: not that.
        """
        kinds = {"model": str, "modules": int, "parameters": int, "structure": str, "config": str}
        if not isinstance(data, dict) or {n: type(v) for n, v in data.items()} != kinds:
            raise InvalidArgumentError(f"a model's fingerprint has {', '.join(kinds)}; got {shown(data)}")
        return cls(**data)


def _config(model: torch.nn.Module) -> str:
    """A hash of a Hugging Face or diffusers configuration, without what changes from one loading to the next."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    data = to_dict() if callable(to_dict) else dict(config) if isinstance(config, dict) else None
    if data is None:
        return ""
    passing = ("transformers_version", "_diffusers_version", "_name_or_path", "torch_dtype", "dtype")
    kept = {k: v for k, v in data.items() if k not in passing and "attn_implementation" not in k}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
