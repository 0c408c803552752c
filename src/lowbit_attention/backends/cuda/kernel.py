"""The host of both kernels: K and V are packed, and attended once or many times.

A subclass says what it takes, how K and V are packed for it, and which launches make its attention (`AttentionPlan`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...call.mask_types import Mask
from ...call.masks import LOG2E
from ...call.memo import IdentityMemo, Memo
from ...call.request import Request, make_request
from ...errors import UnsupportedError
from ...recipes.definition import Recipe
from ...recipes.named import recipe as find_recipe
from ..base import Implementation, Output, inference_only
from .arguments import AttentionArgs, MaskArgs, MmaArgs, SequenceArgs
from .instances import Instance, MaskForm, PackFormat, mask_instance, pack_instance, padded_head_dim, sequences_instance
from .launch import cache
from .mask import MaskPlan, is_by_place, mask_form
from .packing import Packer, PackPlan, aligned, loadable, packer
from .sequences import SequencesPlan
from .speeds import speedup
from .support import request_reasons


class KvKind(NamedTuple):
    """What decides, beside the recipe, how K ``[B, Hkv, N, D]`` and V are packed."""

    batch: int
    kv_heads: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KvKind:
        """What the tensors themselves say."""
        batch, kv_heads, kv_len, head_dim = k.shape
        return cls(batch, kv_heads, kv_len, head_dim, v.shape[3], k.dtype, k.device)

    @classmethod
    def of_request(cls, r: Request) -> KvKind:
        """What a request says of them."""
        return cls(r.batch, r.kv_heads, r.kv_len, r.head_dim, r.v_head_dim, r.dtype, r.device)

    @property
    def dim(self) -> int:
        """The channels of a packed head."""
        dim = padded_head_dim(max(self.head_dim, self.v_head_dim))
        if dim is None:
            raise ValueError(f"head_dim {max(self.head_dim, self.v_head_dim)} has no packed form")
        return dim


class Packing(NamedTuple):
    """How K and V of one kind are packed."""

    plan: PackPlan
    packer: Packer


@dataclass(slots=True, eq=False)
class PackedKV:
    """K and V as a kernel's tiles at ``address``: the first ``plan.layout.size`` bytes of ``memory``.

    ``k``: K itself, where Q is smoothed: ΔS is made of it, too. ``mask``: which keys it was packed for; ``sequences``:
    where they lie.
    """

    plan: PackPlan
    memory: Tensor
    address: int
    k: Tensor | None
    mask: MaskArgs | None = None
    sequences: SequenceArgs | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan(ABC):
    """The launches of one kind of call, but for addresses and strides.

    Beside packed K and V they use ``scratch_size`` bytes of scratch memory, whose first ``zero_count`` 32-bit words
    are 0 before a launch, and again after it.
    """

    request: Request
    recipe: Recipe
    packing: Packing
    zero_count: int = 0
    scratch_size: int = 0
    mask: MaskPlan | None = None
    sequences: SequencesPlan | None = None

    @cached_property
    def workspace_size(self) -> int:
        """Bytes of packed K and V, of the scratch memory behind them, and of the mask or sequences behind that."""
        return self.mask_offset + sum(plan.size for plan in (self.mask, self.sequences) if plan is not None)

    @cached_property
    def mask_offset(self) -> int:
        """Where the prepared mask begins, or what is known of sequences."""
        return aligned(self.packing.plan.layout.size + self.scratch_size)

    @abstractmethod
    def launch(
        self,
        q: Tensor,
        packed: PackedKV,
        scratch: int,
        out: Tensor,
        lse: Tensor | None,
        sm_scale: float,
        device: int,
        after_packing: bool,
    ) -> None:
        """Attention of `loadable` Q, with scratch memory at that address.

        ``after_packing``: the kernel before this one on the stream is the packing, which Q's writer did not outlast, so
        attention may begin while it ends.
        """


class CudaKernel(Implementation):
    """An attention kernel of this package, with the kernels that pack K and V for it."""

    is_kernel = True
    takes_sequences: ClassVar[bool] = False
    """Whether it runs sequences of different lengths that only the device knows (`run_sequences`)."""

    def __init__(self) -> None:
        self._plans = IdentityMemo[AttentionPlan]()
        self._packings = Memo[Packing]()

    # ---- what a kernel says

    @abstractmethod
    def device_reasons(self, device: torch.device) -> tuple[str, ...]:
        """Why it does not run on a device."""

    @abstractmethod
    def recipe_reasons(self, recipe: Recipe, device: torch.device) -> tuple[str, ...]:
        """What of a recipe it does not do there."""

    def call_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        """What of a request it does not do with this recipe, though others may."""
        del request, recipe
        return ()

    @abstractmethod
    def pack_format(self, recipe: Recipe, dim: int, device: torch.device, mask: MaskForm) -> tuple[str, PackFormat]:
        """For which architecture the packing kernels are compiled, and how K and V of ``dim`` channels are packed."""

    @abstractmethod
    def work_rows(self, recipe: Recipe, dim: int, device: torch.device) -> int:
        """Query rows of a work tile, for ``dim`` channels without a mask."""

    @abstractmethod
    def instances(self, request: Request, recipe: Recipe) -> list[Instance]:
        """What attention of a supported request is compiled to."""

    @abstractmethod
    def make_plan(self, request: Request, recipe: Recipe, packing: Packing) -> AttentionPlan:
        """The launches of a supported request."""

    # ---- what follows from it

    def expected_speedup(self, request: Request, recipe: Recipe) -> float | None:
        return speedup(request, recipe, self.name)

    def reads(self, request: Request) -> bool:
        return request.mask_text == "tensor" or is_by_place(request)

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        return (
            *self.device_reasons(request.device),
            *self.recipe_reasons(recipe, request.device),
            *request_reasons(request),
            *self.call_reasons(request, recipe),
            *(
                ("it takes no sequences of different lengths",)
                if request.sequences and not self.takes_sequences
                else ()
            ),
            *inference_only(request),
        )

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        device = q.device.index
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(q, k, v, mask, sm_scale, request, recipe)
        if request.is_causal and mask is None and request.q_len != request.kv_len:
            first, keys, inner = _seen_part(request)
            if inner is not request:
                out, lse = self.run(q[:, :, first:], k[:, :, :keys], v[:, :, :keys], None, sm_scale, inner, recipe)
                return _behind_blind_rows(first, out, lse)
        plan = self.plan(request, recipe)
        memory = torch.empty(plan.workspace_size, dtype=torch.uint8, device=q.device)
        return self.run_in(memory, q, k, v, sm_scale, plan, mask)

    def run_in(
        self,
        memory: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sm_scale: float,
        plan: AttentionPlan,
        mask: Mask | None = None,
    ) -> Output:
        """A whole call on the current device, in ``plan.workspace_size`` bytes of ``memory``, whatever they hold."""
        q, k, v = loadable(q), loadable(k), loadable(v)
        address, device, packing = memory.data_ptr(), q.device.index, plan.packing
        scratch, prepared = address + packing.plan.layout.size, None
        if plan.mask is not None:
            if mask is None:
                raise ValueError(f"{plan.request} has a mask, which was not given")
            prepared = plan.mask.prepare(mask, memory, plan.mask_offset, device)
        packing.packer(k, v, packing.plan, address, device, scratch, plan.zero_count, prepared)
        packed = PackedKV(packing.plan, memory, address, k, prepared)
        return _attend(q, packed, scratch, sm_scale, plan, device, after_packing=True)

    def run_sequences(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        sm_scale: float,
        request: Request,
        recipe: Recipe,
    ) -> Output:
        """Attention of sequences ``[tokens, heads, channels]``: ``[Tq, Hq, Dv]``, and float32 ``[Hq, Tq]`` if asked.

        ``cu_q``, ``cu_k``: int32 or int64 ``[sequences + 1]`` on the device, not read by the host.
        """
        device = q.device.index
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run_sequences(q, k, v, cu_q, cu_k, sm_scale, request, recipe)
        plan = self.plan(request, recipe)
        if plan.sequences is None:
            raise ValueError(f"{request} has no sequences")
        memory = torch.empty(plan.workspace_size, dtype=torch.uint8, device=q.device)
        q, k, v = (loadable(t.transpose(0, 1)[None]) for t in (q, k, v))
        address, packing, width = memory.data_ptr(), plan.packing, plan.packing.plan.v_head_dim
        out = q.new_empty(request.q_len, request.q_heads, width)
        lse = q.new_empty(request.q_heads, request.q_len, dtype=torch.float32) if request.return_lse else None
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
        lie = plan.sequences.prepare(cu_q, cu_k, address + plan.mask_offset, out, lse, device)
        scratch = address + packing.plan.layout.size
        packing.packer(k, v, packing.plan, address, device, scratch, plan.zero_count, sequences=lie)
        packed = PackedKV(packing.plan, memory, address, k, sequences=lie)
        plan.launch(q, packed, scratch, out, lse, sm_scale, device, after_packing=True)
        return (out if width == request.v_head_dim else out[..., : request.v_head_dim]), lse

    def pack(self, k: Tensor, v: Tensor, recipe: Recipe) -> PackedKV:
        """Pack K and V ``[B, Hkv, N, D]``, to be attended by any number of Q on the same stream."""
        with torch.cuda.device(k.device.index):
            plan, packs = self._packing(KvKind.of(k, v), recipe, "none")
            k, v = loadable(k), loadable(v)
            memory = torch.empty(plan.layout.size, dtype=torch.uint8, device=k.device)
            packs(k, v, plan, memory.data_ptr(), k.device.index)
        return PackedKV(plan, memory, memory.data_ptr(), k if recipe.smooth_q else None)

    def attend(
        self, q: Tensor, packed: PackedKV, sm_scale: float, request: Request, scratch: Tensor | None = None
    ) -> Output:
        """Attention of Q ``[B, H, N, D]`` and what `pack` gave, as a supported request says (also K's and V's sizes).

        ``scratch``: by `scratch`, for calls of this request one after the other on a stream; else each has its own.

        Raises:
            ValueError: K and V of this request are packed otherwise.
        """
        with torch.cuda.device(q.device.index):
            plan = self.plan(request, packed.plan.recipe)
            if request.mask != "none":
                raise ValueError(f"K and V were packed without a mask, which {request} has")
            if packed.plan is not plan.packing.plan and packed.plan != plan.packing.plan:
                raise ValueError(f"the packed K and V are not those of {request}")
            memory = self.scratch(plan) if scratch is None else scratch
            address = memory.data_ptr()
            return _attend(loadable(q), packed, address, sm_scale, plan, q.device.index, after_packing=False)

    def scratch(self, plan: AttentionPlan) -> Tensor:
        """Scratch memory for `attend`; what is 0 in it is so again after each call."""
        memory = torch.empty(plan.scratch_size, dtype=torch.uint8, device=plan.request.device)
        memory[: 4 * plan.zero_count].zero_()
        return memory

    def kernel_alone(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        recipe: str | Recipe,
        is_causal: bool = False,
        sm_scale: float | None = None,
    ) -> Callable[[], Tensor]:
        """`attend` without `pack`, for benchmarks: of K and V that are packed here, once (with ΔS, if Q is smoothed).

        Args:
            q, k, v: ``[B, H, N, D]`` on a GPU.

        Raises:
            UnsupportedError: the kernel cannot run it, with every reason.
        """
        chosen = find_recipe(recipe)
        request = make_request(
            q, k, v, None, chosen, None, is_causal=is_causal, bottom_right=True, return_lse=False, layout="HND"
        )
        if reasons := self.not_supported_reasons(request, chosen):
            raise UnsupportedError(f"{self.name} cannot run this call ({request})", {self.name: reasons})
        scale = sm_scale if sm_scale is not None else 1.0 / math.sqrt(q.shape[3])
        with torch.cuda.device(q.device.index):
            plan = self.plan(request, chosen)
            q, packed, scratch = loadable(q), self.pack(k, v, chosen), self.scratch(plan)
        return lambda: self.attend(q, packed, scale, request, scratch)[0]

    def plan(self, request: Request, recipe: Recipe) -> AttentionPlan:
        """The launches of a supported request, on the current device; compiled and loaded."""
        found = self._plans.get(request, recipe)
        if found is None:
            kind = KvKind.of_request(request)
            mask = mask_form(request)
            arch, form = self.pack_format(recipe, kind.dim, kind.device, mask)
            instances = [pack_instance(kind.dim, kind.dtype, arch, form), *self.instances(request, recipe)]
            instances += [mask_instance(form.tile_keys, arch)] if mask in ("keys", "bits", "bias") else []
            instances += [sequences_instance(arch)] if mask == "sequences" else []
            cache().get_all((i.source(), i.options()) for i in instances)  # (side by side, the first time)
            found = self._plans.put(self.make_plan(request, recipe, self._packing(kind, recipe, mask)), request, recipe)
        return found

    def _packing(self, kind: KvKind, recipe: Recipe, mask: MaskForm) -> Packing:
        arch, form = self.pack_format(recipe, kind.dim, kind.device, mask)
        key = (kind, recipe, arch, form)
        found = self._packings.get(key)
        if found is None:
            width, v_width = (-(-d // 8) * 8 for d in (kind.head_dim, kind.v_head_dim))  # (as `loadable` makes them)
            plan = PackPlan.of(kind.batch, kind.kv_heads, kind.kv_len, width, v_width, recipe, form)
            packs = packer(kind.dim, kind.dtype, kind.device.index, arch, form)
            found = self._packings.put(key, Packing(plan, packs))
        return found


@lru_cache(maxsize=256)
def _seen_part(request: Request) -> tuple[int, int, Request]:
    """What causality leaves of a request without a mask: others would count in scales and means.

    The first row that sees a key, how many keys some row sees, and the request of these.
    """
    offset = request.causal_offset or 0
    first, keys = min(max(0, -offset), request.q_len), max(0, min(request.kv_len, request.q_len + offset))
    if (first == 0 and keys == request.kv_len) or first == request.q_len or keys == 0:
        return 0, request.kv_len, request
    return first, keys, replace(request, q_len=request.q_len - first, kv_len=keys)


def _behind_blind_rows(count: int, out: Tensor, lse: Tensor | None) -> Output:
    """With so many rows before them that see no key."""
    if count == 0:
        return out, lse
    rows = torch.nn.functional.pad(out, (0, 0, count, 0))
    return rows, None if lse is None else torch.nn.functional.pad(lse, (count, 0), value=-math.inf)


def _attend(
    q: Tensor,
    packed: PackedKV,
    scratch: int,
    sm_scale: float,
    plan: AttentionPlan,
    device: int,
    after_packing: bool,
) -> Output:
    """Make what the launches write (as `out_strides` has it), and launch them."""
    request, width = plan.request, packed.plan.v_head_dim
    batch, heads, length = request.batch, request.q_heads, request.q_len
    if request.layout == "NHD":
        out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    else:
        out = q.new_empty(batch, heads, length, width)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device) if request.return_lse else None
    plan.launch(q, packed, scratch, out, lse, sm_scale, device, after_packing)
    return (out if width == request.v_head_dim else out[..., : request.v_head_dim]), lse


def sizes(request: Request, pack: PackPlan) -> dict[str, int]:
    """The fields by which the kernels' argument structures know a call's size and causality."""
    return {
        "q_heads": request.q_heads,
        "kv_heads": request.kv_heads,
        "q_len": request.q_len,
        "kv_len": request.kv_len,
        "channels": pack.head_dim,
        "causal_offset": request.kv_len if request.causal_offset is None else request.causal_offset,
    }


def out_strides(request: Request, pack: PackPlan) -> dict[str, int]:
    """The fields by which they know how the output lies in memory: like Q, with packed V's channels."""
    heads, length, width = request.q_heads, request.q_len, pack.v_head_dim
    head, token = (width, heads * width) if request.layout == "NHD" else (length * width, width)
    return {"v_channels": width, "out_batch": heads * length * width, "out_head": head, "out_token": token}


def point_to_call(
    args: AttentionArgs | MmaArgs, q: Tensor, packed: PackedKV, out: Tensor, lse: Tensor | None, sm_scale: float
) -> None:
    """Write what the argument structures of both kernels have in common and no two calls."""
    layout, address = packed.plan.layout, packed.address
    args.q.point_to(q)
    if packed.mask is not None:
        args.mask = packed.mask
    if packed.sequences is not None:
        args.sequences = packed.sequences
    args.out = out.data_ptr()
    args.lse = 0 if lse is None else lse.data_ptr()
    args.k_mean = address + layout.k_mean
    args.k_largest_scale = address + layout.k_largest_scale
    args.v_scale = address + layout.v_scale
    args.v_mean = address + layout.v_mean
    args.sm_scale = sm_scale
    args.logits_scale = abs(sm_scale) * LOG2E
