"""A stub of ComfyUI, written from its documented behaviour; nothing of ComfyUI is in it.

What it assumes of ComfyUI (releases of 2025-10 to 2026-09), and what therefore holds only as far as this is right:

1. Attention functions are called ``f(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
   skip_output_reshape=False, **kwargs)`` with kwargs ``scale``, ``enable_gqa``, ``low_precision_attention``,
   ``transformer_options``, ``preferred_attention``. q, k, v: ``[B, N, H · D]``, or ``[B, H, N, D]`` with
   ``skip_reshape``. Masks have 2, 3 or 4 dimensions; the missing ones are batch first, then heads.
2. A registered function is wrapped. The wrapper looks for ``transformer_options["optimized_attention_override"]`` and
   calls ``override(function, *args, **kwargs)`` with the function that is not wrapped, once: nested calls carry
   ``_inside_attn_wrapper`` among kwargs and look for no override. ``preferred_attention`` is taken out before.
3. q, k and v may all come in containers with ``peek()`` and ``take()``, the second of which works once and leaves the
   container empty. An override with an attribute ``container_function`` then gets ``container_function(*args,
   **kwargs)``, without the function; another gets the tensors.
4. ``ModelPatcher.clone()`` gives a patcher of the same inner model, whose ``model_options`` and wrappers are deep
   copies (at times shallow ones), in which functions stay the same. ``set_model_optimized_attention(f)`` stores an
   override that calls f and nothing else.
5. ``patcher.add_wrapper_with_key(kind, key, f)``, ``f(executor, *args, **kwargs)``: ``OUTER_SAMPLE`` is around one
   sampling run, ``APPLY_MODEL`` around each forward of the diffusion model, as ``apply_model(x, t, c_concat,
   c_crossattn, control, transformer_options)`` with t the sigma of each batch entry. Wrappers run in the order added.
6. ``transformer_options`` holds ``sigmas``, the tensor of the current step, during sampling. Positive and negative
   conditions may be one forward or several.
7. Nodes (V3): classes with ``define_schema`` and ``execute``, inputs named as ``execute``'s parameters; the folder's
   ``comfy_entrypoint()`` gives an extension whose ``get_node_list()`` is awaited. Nodes write to
   ``folder_paths.get_output_directory()``.
"""

from __future__ import annotations

import copy
import functools
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

HEADS, DIM, TEXT = 4, 16, 24
WIDTH = HEADS * DIM


# ---- attention


class Container:
    """Point 3."""

    def __init__(self, tensor):
        self._tensor = tensor

    def peek(self):
        if self._tensor is None:
            raise RuntimeError("this container is empty")
        return self._tensor

    def take(self):
        tensor, self._tensor = self.peek(), None
        return tensor


def wrapped(function):
    """Points 2 and 3."""

    @functools.wraps(function)
    def entry(*args, **kwargs):
        kwargs.pop("preferred_attention", None)
        in_containers = bool(args) and isinstance(args[0], Container)
        override = None
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if in_containers and override is not None and hasattr(override, "container_function"):
            return override.container_function(*args, **kwargs)
        if in_containers:
            args = (*(c.take() for c in args[:3]), *args[3:])
        return function(*args, **kwargs) if override is None else override(function, *args, **kwargs)

    return entry


CALLS = []
"""Names of the attention functions that ran, in order."""


@wrapped
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """Exact attention in ComfyUI's shapes (point 1)."""
    CALLS.append("pytorch")
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (t.shape[-1] // dim, dim)).transpose(1, 2) for t in (q, k, v))
    while mask is not None and mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


optimized_attention = attention_pytorch


# ---- a model


class Block(nn.Module):
    """Self-attention in heads, and attention to a text of which some is padding."""

    def __init__(self, low_precision=True, containers=False):
        super().__init__()
        self.qkv, self.text, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(TEXT, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.low_precision, self.containers = low_precision, containers

    def forward(self, x, text, mask, transformer_options):
        options = {"transformer_options": transformer_options}
        if not self.low_precision:
            options["low_precision_attention"] = False
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        given = [Container(t) for t in (q, k, v)] if self.containers else [q, k, v]
        x = x + self.out(optimized_attention(*given, HEADS, skip_reshape=True, **options))
        shared = self.text(text)[..., : WIDTH // 2]  # (two heads of keys and values for four of queries)
        seen = optimized_attention(x, shared, shared, HEADS, mask=mask, enable_gqa=True, **options)
        return x + self.out(seen)


class DiffusionModel(nn.Module):
    def __init__(self, **blocks):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block(**blocks)])

    def forward(self, x, t, context, transformer_options):
        mask = torch.arange(context.shape[1]) < context.shape[1] - 2
        for block in self.blocks:
            x = block(x * (1 + t[:, None, None]).log(), context, mask[None].expand(x.shape[1], -1), transformer_options)
        return x


# ---- patchers and sampling


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    APPLY_MODEL = "apply_model"


class ModelPatcher:
    """Points 4 and 5."""

    def __init__(self, diffusion_model):
        self.model = SimpleNamespace(diffusion_model=diffusion_model)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        twin = ModelPatcher(self.model.diffusion_model)
        twin.model = self.model
        twin.model_options = copy.deepcopy(self.model_options)
        twin.wrappers = copy.deepcopy(self.wrappers)
        return twin

    def get_model_object(self, name):
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def set_model_optimized_attention(self, function):
        def override(_, *args, **kwargs):
            return function(*args, **kwargs)

        self.model_options["transformer_options"]["optimized_attention_override"] = override


def _around(patcher, kind, innermost):
    wrappers = [f for fs in patcher.wrappers.get(kind, {}).values() for f in fs]
    for wrapper in reversed(wrappers):
        innermost = functools.partial(wrapper, innermost)
    return innermost


def sample(patcher, sigmas=(10.0, 4.0, 1.0), tokens=40, seed=0, together=True, one_tensor=False):
    """A run of as many steps, each with two conditions in one forward (``together``) or in two; the result.

    ``one_tensor``: the sampler keeps its sigma in one tensor, which it writes to.
    """
    g = torch.Generator().manual_seed(seed)
    x, texts = torch.randn(1, tokens, WIDTH, generator=g), torch.randn(2, 9, TEXT, generator=g)

    def apply_model(x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None):
        return patcher.model.diffusion_model(x, t, c_crossattn, transformer_options=transformer_options)

    def run(x, sigmas):
        kept = torch.zeros(1)
        for sigma in sigmas:
            options = dict(patcher.model_options["transformer_options"])
            step = kept.fill_(sigma) if one_tensor else torch.tensor([sigma])
            options["sigmas"] = step
            call = _around(patcher, WrappersMP.APPLY_MODEL, apply_model)
            if together:
                both = call(x.expand(2, -1, -1), step.expand(2), None, texts, None, options)
            else:
                both = torch.cat([call(x, step, None, text[None], None, options) for text in texts])
            x = both.mean(0, keepdim=True) / (1 + sigma)
        return x

    with torch.no_grad():
        return _around(patcher, WrappersMP.OUTER_SAMPLE, run)(x, list(sigmas))


# ---- nodes


class _Input:
    def __init__(self, kind, id, **options):
        self.kind, self.id, self.options = kind, id, options


class _Output:
    def __init__(self, kind, **options):
        self.kind, self.options = kind, options


def _io():
    kinds = {
        kind: SimpleNamespace(Input=functools.partial(_Input, kind), Output=functools.partial(_Output, kind))
        for kind in ("Model", "Combo", "Float", "Int", "Boolean", "String")
    }

    class NodeOutput:
        def __init__(self, *values, **options):
            self.values = values

    class Schema(SimpleNamespace):
        pass

    return SimpleNamespace(ComfyNode=type("ComfyNode", (), {}), NodeOutput=NodeOutput, Schema=Schema, **kinds)


class ComfyExtension:
    async def get_node_list(self):
        raise NotImplementedError


def modules(output_folder):
    """What ``import comfy…`` finds, by name."""
    attention = ModuleType("comfy.ldm.modules.attention")
    attention.optimized_attention = optimized_attention
    attention.attention_pytorch = attention_pytorch
    extension = ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP
    api = ModuleType("comfy_api.latest")
    api.ComfyExtension, api.io = ComfyExtension, _io()
    paths = ModuleType("folder_paths")
    paths.get_output_directory = lambda: str(output_folder)
    found = {m.__name__: m for m in (attention, extension, api, paths)}
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy_api"):
        found[name] = ModuleType(name)
        found[name].__path__ = []
    return found


def install(monkeypatch, output_folder):
    """Let this test find the stub."""
    CALLS.clear()
    for name, module in modules(output_folder).items():
        monkeypatch.setitem(sys.modules, name, module)
