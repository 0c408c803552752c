"""The kernels' host without a GPU: its launches and their arguments, in whole calls and with K and V packed once."""

import contextlib
import ctypes
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from c_structs import CTYPES, fields

from lowbit_attention import ALiBi, KeyPadding, UnsupportedError, Window, recipe
from lowbit_attention.backends.cuda import hopper, kernel, mask, mma, packing, smooth_q
from lowbit_attention.backends.cuda.arguments import AttentionArgs, MmaArgs, PackArgs, PrepareArgs, SmoothArgs
from lowbit_attention.backends.cuda.hopper import HopperAttention
from lowbit_attention.backends.cuda.mma import MmaAttention
from lowbit_attention.call.mask_types import as_tensor
from lowbit_attention.call.request import make_request

STRUCTURES = {
    "list_keys": PrepareArgs,
    "pack_bits": PrepareArgs,
    "list_tiles": PrepareArgs,
    "list_by_place": PrepareArgs,
    "largest_biases": PrepareArgs,
    "pack_biases": PrepareArgs,
    "pack_diagonals": PrepareArgs,
    "statistics": PackArgs,
    "pack": PackArgs,
    "attention_wgmma": AttentionArgs,
    "attention_mma": MmaArgs,
    "query_means": SmoothArgs,
    "delta_s": SmoothArgs,
}
CASES = [
    (HopperAttention, "fast_8b"),
    (HopperAttention, "sage2_8b"),
    (MmaAttention, "sage1"),
    (MmaAttention, "sage2_4b"),
    (MmaAttention, "rotated_4b"),
]
EVERY_KERNEL = pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))


class Launches(list):
    """What was launched: name, grid, whether it overlaps, and a copy of the arguments."""

    def names(self):
        return [name for name, *_ in self]

    def loaded(self, instance, name, threads, shared_bytes=0):
        def launch(grid, device, arguments, overlaps=False, cluster=1):
            structure = STRUCTURES[name]
            pointer = ctypes.c_void_p.from_address(arguments).value
            copied = structure.from_buffer_copy(structure.from_address(pointer))
            self.append((name, grid, overlaps, copied))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Everything that is launched, on a Hopper card (for `MmaAttention`: an Ada one) whose tensors are the CPU's."""
    found = Launches()
    for module in (hopper, mask, mma, packing, smooth_q):
        monkeypatch.setattr(module, "load", found.loaded)
    loaded = (hopper._kernel, mask._kernels, mma._kernel, smooth_q._kernels, packing.packer, hopper.sm_count)
    for function in loaded:
        function.cache_clear()
    monkeypatch.setattr(kernel, "cache", lambda: SimpleNamespace(get_all=lambda jobs: None))
    monkeypatch.setattr(mma, "_arch", lambda device: "sm_89")
    for module in (hopper, mma):
        monkeypatch.setattr(module, "_device_reasons", lambda device: ())
    card = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield found
    for function in loaded:
        function.cache_clear()


def tensors(*, batch=1, lengths=(700, 4000), heads=(34, 17), head_dims=(128, 128), dtype=torch.float16):
    (q_len, kv_len), (q_heads, kv_heads), (head_dim, v_head_dim) = lengths, heads, head_dims
    shapes = (q_heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, v_head_dim)
    return [torch.empty(batch, *shape, dtype=dtype) for shape in shapes]


def request_of(q, k, v, r, *, attn_mask=None, is_causal=False, bottom_right=True, return_lse=True, layout="HND"):
    return make_request(
        q, k, v, attn_mask, r, None, is_causal=is_causal, bottom_right=bottom_right, return_lse=return_lse,
        layout=layout,
    )  # fmt: skip


def values(structure, *, addresses=True):
    """A structure's fields by dotted names."""
    raw = bytes(structure)
    return {
        name: CTYPES[code].from_buffer_copy(raw, offset).value
        for name, offset, code in fields(type(structure))
        if addresses or code != "P"
    }


def addresses(structure):
    return {name: values(structure)[name] for name, _, code in fields(type(structure)) if code == "P"}


@EVERY_KERNEL
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 36)])
def test_a_call_has_its_own_addresses(launches, monkeypatch, kind, name, layout, head_dims):
    """Every address lies in a tensor of this call, though the plan has served another one before."""
    host, r = kind(), recipe(name)
    if r.rotation == "hadamard" and head_dims[0] != 128:
        head_dims = (128, 36)
    first = tensors(head_dims=head_dims)
    request = request_of(*first, r, layout=layout)
    plan = host.plan(request, r)
    for q, k, v in (first, tensors(head_dims=head_dims)):
        launches.clear()
        ours = []
        monkeypatch.setattr(kernel, "loadable", lambda x, ours=ours: ours.append(packing.loadable(x)) or ours[-1])
        memory = torch.empty(plan.workspace_size, dtype=torch.uint8)
        out, lse = host.run_in(memory, q, k, v, 0.1, plan)
        assert out.shape == (*q.shape[:3], v.shape[3])
        assert (out.transpose(1, 2) if layout == "NHD" else out).stride(-1) == 1
        assert lse.shape == q.shape[:3]
        spans = [
            (s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in (memory, out, lse, *ours))
        ]
        for kernel_name, _, _, args in launches:
            for field, address in addresses(args).items():
                assert address is None or any(a <= address <= b for a, b in spans), (kernel_name, field)
            if kernel_name.startswith("attention"):
                assert (args.q.data, args.out, args.lse) == (ours[0].data_ptr(), out.data_ptr(), lse.data_ptr())
                assert (args.q.batch, args.q.head, args.q.token) == ours[0].stride()[:3]
                assert (args.out_batch, args.out_head, args.out_token) == out.stride()[:3]
        assert host.plan(request, r) is plan


@EVERY_KERNEL
def test_packed_once_and_attended_by_several_q(launches, kind, name):
    """The launches of whole calls, K and V packed once; only these overlap with the packing."""
    host, r = kind(), recipe(name)
    q, k, v = tensors()
    packed = host.pack(k, v, r)
    assert launches.names() == ["statistics", "pack"]
    assert launches[0][3].zero_count == 0
    for rows in (700, 1, 130):
        some = q[:, :, :rows].contiguous()
        request = request_of(some, k, v, r)
        launches.clear()
        host.run(some, k, v, None, 0.1, request, r)
        assert launches.names()[:2] == ["statistics", "pack"]
        plan = host.plan(request, r)
        assert launches[0][3].zero_count == plan.zero_count
        assert launches[0][3].zeros == launches[0][3].k_tiles + packed.plan.layout.size
        whole = launches[2:]
        launches.clear()
        out, lse = host.attend(some, packed, 0.1, request)
        assert out.shape == some.shape
        assert lse.shape == some.shape[:3]
        assert launches.names() == [one[0] for one in whole]
        for (_, grid, overlaps, args), (_, its_grid, _, its_args) in zip(launches, whole, strict=True):
            assert grid == its_grid
            assert not overlaps
            assert values(args, addresses=False) == values(its_args, addresses=False)
        args = launches[-1][3]
        assert args.v_mean == packed.address + packed.plan.layout.v_mean
        if kind is HopperAttention:
            assert whole[0][2]
            assert not host.scratch(plan)[: 4 * plan.zero_count].any()


@EVERY_KERNEL
def test_other_packed_tensors_are_refused(launches, kind, name):
    host, r = kind(), recipe(name)
    q, k, v = tensors()
    packed = host.pack(k[:, :, :3000], v[:, :, :3000], r)
    with pytest.raises(ValueError, match="not those of"):
        host.attend(q, packed, 0.1, request_of(q, k, v, r))
    same = host.pack(k, v, r)
    host._packings.clear()  # (an equal plan, made anew, will do)
    host.attend(q, same, 0.1, request_of(q, k, v, r))


@EVERY_KERNEL
def test_the_kernel_alone_attends(launches, kind, name):
    host = kind()
    q, k, v = tensors()
    call = host.kernel_alone(q, k, v, name)
    launches.clear()
    assert call().shape == q.shape
    once = launches.names()
    assert "pack" not in once
    assert once[-1] == host.name
    call()
    assert launches.names() == once * 2
    with pytest.raises(UnsupportedError):
        host.kernel_alone(q, k, v, "int8_u8")


# ---- masks

B, H, N, M = 3, 4, 300, 1000
"""The masked calls' batches, query heads (half as many of K where they are grouped), queries and keys."""
MASKS = {  # shape, whether query heads share heads of K, whether causality holds besides; what the kernels get
    "of all": ((1, 1, 1, M), True, False, "keys"),
    "by batch": ((B, 1, 1, M), True, False, "keys"),
    "by head": ((1, H, 1, M), False, False, "keys"),
    "by both": ((B, H, 1, M), False, False, "keys"),
    "one key": ((B, 1, 1, 1), True, False, "keys"),
    "of all, causal": ((1, 1, 1, M), True, True, "bits"),
    "heads that share K": ((B, H, 1, M), True, False, "bits"),
    "rows": ((1, 1, N, M), True, False, "bits"),
    "rows by batch": ((B, 1, N, M), True, True, "bits"),
    "rows by head": ((1, H, N, M), False, False, "bits"),
    "rows by both": ((B, H, N, M), True, False, "bits"),
    "rows alone": ((B, 1, N, 1), True, False, "bits"),
}
EVERY_MASK = pytest.mark.parametrize("masked", MASKS)


def masked_call(masked, name, *, batch=B):
    """Inputs, a mask of every second key or row of a larger one, the request, and what the kernels get."""
    shape, grouped, is_causal, form = MASKS[masked]
    q, k, v = tensors(batch=batch, lengths=(N, M), heads=(H, H // 2 if grouped else H))
    attn_mask = torch.zeros(*shape[:2], 2 * shape[2], 2 * shape[3], dtype=torch.bool)[:, :, ::2, 1::2]
    request = request_of(q, k, v, recipe(name), attn_mask=attn_mask, is_causal=is_causal)
    return (q, k, v), attn_mask, request, form


def launched(host, launches, masked, name):
    """The launches of one masked call: by name the first one's grid and arguments; the plan, memory and mask."""
    (q, k, v), attn_mask, request, form = masked_call(masked, name)
    plan = host.plan(request, recipe(name))
    memory = torch.full((plan.workspace_size,), 0xAA, dtype=torch.uint8)
    launches.clear()
    host.run_in(memory, q, k, v, 0.1, plan, attn_mask)
    of = {kernel_name: (grid, args) for kernel_name, grid, _, args in reversed(launches)}
    return of, plan, memory, attn_mask, form


def part_sizes(kind, shape, grouped, form, q_rows, alike):
    """Bytes of each part as csrc/common/masks.cuh and mask.cu declare them."""
    lists, planes = shape[0] * (1 if shape[1] == 1 else H // 2 if grouped else H), shape[0] * shape[1]
    of_keys = {"key_counts": 4 * lists, "keys": 4 * lists * M}
    if form == "keys":
        return of_keys
    tile = 128 if kind is HopperAttention else 64
    tiles, row_blocks, q_blocks = (math.ceil(a / b) for a, b in ((M, tile), (N, 64), (N, q_rows)))
    row_blocks = 1 if alike else row_blocks
    return of_keys | {
        "key_seen": lists * tiles * tile // 8,
        "row_seen": planes * row_blocks * 64,
        "tile_lists": planes * q_blocks * (1 + tiles) * 4,
        "tile_seen": planes * row_blocks * tiles,
        "bits": planes * row_blocks * tiles * 64 * 4 * (tile // 32),
    }


def q_rows_of(host, name, request):
    if isinstance(host, HopperAttention):
        return hopper._config(request, recipe(name)).q_rows
    return host._config(recipe(name), 128, request.device, "bits").q_rows


@EVERY_KERNEL
@EVERY_MASK
def test_a_mask_is_prepared_before_k_and_v_are_packed(launches, kind, name, masked):
    host = kind()
    of, plan, _, attn_mask, form = launched(host, launches, masked, name)
    before = ["list_keys"] if form == "keys" else ["pack_bits", "list_tiles", "list_keys"]
    smoothed = ["query_means", "delta_s"] if recipe(name).smooth_q else []
    assert launches.names() == [*before, "statistics", "pack", *smoothed, host.name]
    assert not any(overlaps for kernel_name, _, overlaps, _ in launches if kernel_name in (*before, "statistics"))

    batches, heads, _, _ = attn_mask.shape
    grouped = plan.request.kv_heads < H
    q_rows, tile = q_rows_of(host, name, plan.request), 128 if kind is HopperAttention else 64
    lists = batches * (1 if heads == 1 else plan.request.kv_heads)
    row_blocks = 1 if attn_mask.shape[2] == 1 and not plan.request.is_causal else math.ceil(N / 64)
    assert of["list_keys"][0] == (lists, 1, 1)
    if form == "bits":
        assert of["pack_bits"][0] == (batches * heads * row_blocks, math.ceil(M / tile / 16), 1)
        assert of["list_tiles"][0] == (batches * heads * math.ceil(N / q_rows), 1, 1)
    args = of["list_keys"][1]
    assert args.mask == attn_mask.data_ptr()
    strides = [0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
    assert [args.batch, args.head, args.row, args.key] == strides
    assert (args.q_len, args.kv_len, args.group) == (N, M, 2 if grouped and heads > 1 else 1)
    assert args.causal_offset == (M - N if plan.request.is_causal else M)
    assert args.lists_seen == (form == "bits")
    if form == "bits":
        prepared = of[host.name][1].mask
        row_step = 0 if row_blocks == 1 else args.tiles
        assert (prepared.row_step, prepared.tile_step, prepared.tile_list_size) == (row_step, 1, 1 + args.tiles)
        plane_step = args.tiles - row_step if row_blocks == 1 else 0
        assert (prepared.last_step, prepared.plane_step, prepared.first_block) == (0, plane_step, 0)
        assert getattr(of[host.name][1], "tiles" if kind is HopperAttention else "tile_count") == args.tiles
    assert (args.tiles, args.row_blocks) == (math.ceil(M / tile), row_blocks)
    assert (args.q_blocks, args.row_blocks_a_block * 64) == (math.ceil(N / q_rows), q_rows)


@EVERY_KERNEL
@EVERY_MASK
def test_a_prepared_mask_has_its_own_memory(launches, kind, name, masked):
    """No part overlaps another, or packed K and V and the scratch memory; what must be 0 before, alone, is."""
    host = kind()
    of, plan, memory, _, form = launched(host, launches, masked, name)
    shape, grouped, *_ = MASKS[masked]
    alike = shape[2] == 1 and not plan.request.is_causal
    sizes = part_sizes(kind, shape, grouped, form, q_rows_of(host, name, plan.request), alike)
    args = of["list_keys"][1]
    places = {part: getattr(args, part) - memory.data_ptr() for part in sizes}
    spans = sorted((at, at + sizes[part]) for part, at in places.items())
    assert all(start % 256 == 0 for start, _ in spans)
    assert plan.packing.plan.layout.size + plan.scratch_size <= spans[0][0]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= plan.workspace_size
    zeros = {part for part, at in places.items() if not memory[at : at + sizes[part]].any()}
    assert zeros == ({"key_seen", "row_seen"} if form == "bits" else set())
    assert bool((memory[: places["key_seen"] if form == "bits" else None] == 0xAA).all())

    # the kernels that come after are told the same addresses
    names = ("key_counts", "keys", "key_seen", "bits", "tile_lists", "row_seen")
    for kernel_name in set(of) - {"list_keys", "pack_bits", "list_tiles"}:
        for part in names:
            found = getattr(of[kernel_name][1].mask, part)
            assert found == (getattr(args, part) if part in sizes else None), (kernel_name, part)


@EVERY_KERNEL
@EVERY_MASK
def test_lists_and_planes_are_those_of_the_mask(launches, kind, name, masked):
    """From a batch and a head to list and plane (`MaskArgs`), and from these to the mask (mask.cu): there and back."""
    of, plan, _, attn_mask, form = launched(kind(), launches, masked, name)
    args, masks = of["list_keys"][1], of["pack"][1].mask
    kv_heads = plan.request.kv_heads
    lists, planes, whole = set(), set(), attn_mask.expand(B, H, -1, -1)
    for b, h in itertools.product(range(B), range(H)):
        at = whole[b, h].data_ptr() - attn_mask.data_ptr()
        of_list = b * masks.list_batch + h // (H // kv_heads) * masks.list_head
        if form == "keys":
            assert of_list // args.lists_a_batch * args.batch + of_list % args.lists_a_batch * args.head == at
        plane = b * masks.plane_batch + h * masks.plane_head
        batch, head = divmod(plane, args.planes_a_batch)
        assert batch * args.batch + head * args.head == at
        assert batch * args.lists_a_batch + head // args.group == of_list
        lists.add(of_list)
        planes.add(plane)
    assert lists == set(range(plan.mask.lists))
    assert planes == set(range(plan.mask.planes))


SLOPES = torch.ones(2 * B, H, dtype=torch.float32)
BY_PLACE = {  # a mask of few numbers, whether causality holds besides; form, lists and planes
    "window": (Window(100, 7), False, "bits", 1, 1),
    "window, causal": (Window(100, 7), True, "bits", 1, 1),
    "slopes": (ALiBi(SLOPES[0]), False, "bias", H // 2, H),
    "slopes by batch": (ALiBi(SLOPES[::2]), True, "bias", B * H // 2, B * H),
    "lengths": (KeyPadding(torch.ones(2 * B, dtype=torch.int64)[::2]), False, "keys", B, B),
    "short lengths": (KeyPadding(torch.ones(B, dtype=torch.int32)), False, "keys", B, B),
}


@EVERY_KERNEL
@pytest.mark.parametrize("masked", BY_PLACE)
def test_few_numbers_are_read_as_they_are(launches, kind, name, masked):
    """No tensor of every pair, nothing zeroed, nothing overlapping; and every kernel is told where it lies."""
    given, is_causal, form, lists, planes = BY_PLACE[masked]
    host, r = kind(), recipe(name)
    q, k, v = tensors(batch=B, lengths=(N, M), heads=(H, H // 2))
    request = request_of(q, k, v, r, attn_mask=given, is_causal=is_causal)
    assert host.reads(request)
    assert "from its numbers alone" in host.remark(request)
    plan = host.plan(request, r)
    memory = torch.full((plan.workspace_size,), 0xAA, dtype=torch.uint8)
    launches.clear()
    host.run_in(memory, q, k, v, 0.1, plan, given)
    before = ["list_by_place"] if form == "keys" else ["list_by_place", "pack_diagonals"]
    assert launches.names()[: len(before) + 1] == [*before, "statistics"]
    assert bool((memory == 0xAA).all())
    of = {kernel_name: (grid, args) for kernel_name, grid, _, args in reversed(launches)}
    tile = 128 if kind is HopperAttention else 64
    tiles, row_blocks = math.ceil(M / tile), math.ceil(N / 64)
    blocks = 2 * row_blocks + (tiles - 1) * (tile // 64)  # (1000 keys: the last tile is not full)
    grid, args = of["list_by_place"]
    assert (plan.mask.form, plan.mask.lists, plan.mask.planes, grid[0]) == (form, lists, planes, planes)
    assert planes == lists * args.group
    sizes = {"key_counts": 4 * lists, "keys": 4 * lists * M}
    if form != "keys":
        assert of["pack_diagonals"][0] == (planes * math.ceil(blocks / 8), 1, 1)  # (a warp each)
        assert args.blocks == blocks
        q_rows = q_rows_of(host, name, plan.request)
        assert (args.q_blocks, args.row_blocks_a_block * 64) == (math.ceil(N / q_rows), q_rows)
        sizes |= {
            "key_seen": lists * tiles * tile // 8,
            "row_seen": planes * row_blocks * 64,
            "tile_lists": planes * args.q_blocks * 2 * 4,
            "bits" if form == "bits" else "bias": planes * blocks * 64 * tile // 8 * (1 if form == "bits" else 16),
        }
        if form == "bias":
            sizes["row_bias"] = 4 * planes * row_blocks * 64
        assert plan.mask.mask.row_step == -1
        assert getattr(of[host.name][1], "tiles" if kind is HopperAttention else "tile_count") == tiles
    spans = sorted((getattr(args, part), getattr(args, part) + size) for part, size in sizes.items())
    assert plan.packing.plan.layout.size + plan.scratch_size <= spans[0][0] - memory.data_ptr()
    assert all(first[1] <= after[0] for first, after in itertools.pairwise(spans))
    assert spans[-1][1] <= memory.data_ptr() + plan.workspace_size
    for kernel_name in set(of) - set(before):
        for part, _, code in fields(type(plan.mask.mask)):
            if code == "P":
                found = getattr(of[kernel_name][1].mask, part)
                assert found == (getattr(args, part) if part in sizes else None), (kernel_name, part)
    if isinstance(given, ALiBi):
        assert args.slopes == given.slopes.data_ptr()
        for b, h in itertools.product(range(B), range(H)):
            batch, head = divmod(b * plan.mask.mask.plane_batch + h * plan.mask.mask.plane_head, args.planes_a_batch)
            whole = given.slopes.expand(B, H)
            assert whole[b, h].data_ptr() - args.slopes == 4 * (batch * args.batch + head * args.head)
    elif isinstance(given, KeyPadding):
        assert (args.kv_lens, args.batch) == (given.kv_lens.data_ptr(), given.kv_lens.stride(0))
        assert args.long_lens == (given.kv_lens.dtype == torch.int64)


@EVERY_KERNEL
def test_what_is_no_matter_of_places_is_written_out(launches, kind, name):
    """Lengths with causality; slopes whose rows lie before the first key."""
    host, r = kind(), recipe(name)
    q, k, v = tensors(batch=B, lengths=(M, N), heads=(H, H))
    for given, is_causal in ((KeyPadding(torch.ones(B, dtype=torch.int64)), True), (ALiBi(SLOPES[0]), False)):
        request = request_of(q, k, v, r, attn_mask=given, is_causal=is_causal)
        assert not host.reads(request)
        assert "written out as a tensor first" in host.remark(request)
        launches.clear()
        host.run(q, k, v, as_tensor(given, q, k), 0.1, request, r)
        assert "list_by_place" not in launches.names()
        assert launches.names()[0] in ("pack_bits", "largest_biases")
        with pytest.raises(ValueError, match="for a mask written out"):
            host.run(q, k, v, given, 0.1, request, r)
    window = request_of(q, k, v, r, attn_mask=Window(9, 9))
    with pytest.raises(ValueError, match="for a mask of few numbers"):
        host.run(q, k, v, as_tensor(Window(9, 9), q, k), 0.1, window, r)


@EVERY_KERNEL
def test_masked_plans_are_remembered(launches, kind, name):
    host, r = kind(), recipe(name)
    _, _, first, _ = masked_call("rows by batch", name)
    _, _, second, _ = masked_call("rows by batch", name)
    assert first is second
    plan = host.plan(first, r)
    assert host.plan(second, r) is plan
    _, _, other, _ = masked_call("by batch", name)
    assert host.plan(other, r) is not plan
    (q, k, v), _, _, _ = masked_call("by batch", name)
    without = host.plan(request_of(q, k, v, r), r)
    assert without.mask is None
    assert without.packing.plan is not host.plan(other, r).packing.plan  # (another form)


@EVERY_KERNEL
@pytest.mark.parametrize("masked", ["by batch", "rows"])
def test_packed_keys_and_values_take_no_mask(launches, kind, name, masked):
    host = kind()
    (q, k, v), _, request, _ = masked_call(masked, name)
    packed = host.pack(k, v, recipe(name))
    launches.clear()
    with pytest.raises(ValueError, match="packed without a mask"):
        host.attend(q, packed, 0.1, request)
    assert not launches


# ---- what causality hides is left out

SEEN = [  # Nq, Nk, bottom-right; the first row that sees a key, and how many keys some row sees
    (300, 1000, True, 0, 1000),
    (300, 1000, False, 0, 300),
    (1000, 300, True, 700, 300),
    (1000, 300, False, 0, 300),
    (500, 500, True, 0, 500),
    (2, 300, False, 0, 2),
    (300, 2, True, 298, 2),
]


@EVERY_KERNEL
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("q_len", "kv_len", "bottom_right", "first", "keys"), SEEN)
def test_rows_and_keys_that_causality_hides_are_left_out(
    launches, kind, name, layout, q_len, kv_len, bottom_right, first, keys
):
    host, r = kind(), recipe(name)
    q, k, v = tensors(batch=2, lengths=(q_len, kv_len), heads=(4, 2))
    request = request_of(q, k, v, r, is_causal=True, bottom_right=bottom_right, layout=layout)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(request.causal_offset)
    assert [first, keys] == [int((~seen.any(dim=1)).sum()), int(seen.any(dim=0).sum())]
    assert kernel._seen_part(request)[:2] == (first, keys)
    out, lse = host.run(q, k, v, None, 0.1, request, r)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not out[:, :, :first].any()
    assert bool((lse[:, :, :first] == -math.inf).all())
    pack, attend = launches[launches.names().index("pack")][3], launches[-1][3]
    assert (pack.kv_len, attend.kv_len, attend.q_len) == (keys, keys, q_len - first)
    assert attend.q.data == q[:, :, first:].data_ptr()
    assert attend.causal_offset == seen[first:, :keys].sum(dim=1)[0] - 1


def test_a_call_without_a_seen_part_is_left_alone():
    for q_len, kv_len, bottom_right in ((5, 9, True), (9, 5, False), (7, 7, True)):
        q, k, v = tensors(lengths=(q_len, kv_len))
        request = request_of(q, k, v, recipe("sage1"), is_causal=True, bottom_right=bottom_right)
        assert kernel._seen_part(request) == (0, kv_len, request)
        assert kernel._seen_part(request)[2] is request
    q, k, v = tensors(lengths=(9, 5))
    request = request_of(q, k, v, recipe("sage1"), is_causal=True)
    assert kernel._seen_part(request)[2] is kernel._seen_part(request)[2]  # (plans are remembered by it)
