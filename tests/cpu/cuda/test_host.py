"""The kernels' host without a GPU: its launches and their arguments, in whole calls and with K and V packed once."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from c_structs import CTYPES, fields

from lowbit_attention import UnsupportedError, recipe
from lowbit_attention.backends.cuda import hopper, kernel, mma, packing, smooth_q
from lowbit_attention.backends.cuda.arguments import AttentionArgs, MmaArgs, PackArgs, SmoothArgs
from lowbit_attention.backends.cuda.hopper import HopperAttention
from lowbit_attention.backends.cuda.mma import MmaAttention
from lowbit_attention.call.request import make_request

STRUCTURES = {
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
    for module in (hopper, mma, packing, smooth_q):
        monkeypatch.setattr(module, "load", found.loaded)
    loaded = (hopper._kernel, mma._kernel, smooth_q._kernels, packing.packer, hopper.sm_count)
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


def tensors(*, lengths=(700, 4000), heads=(34, 17), head_dims=(128, 128), dtype=torch.float16):
    (q_len, kv_len), (q_heads, kv_heads), (head_dim, v_head_dim) = lengths, heads, head_dims
    shapes = (q_heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, v_head_dim)
    return [torch.empty(1, *shape, dtype=dtype) for shape in shapes]


def request_of(q, k, v, r, *, return_lse=True, layout="HND"):
    return make_request(
        q, k, v, None, r, None, is_causal=False, bottom_right=True, return_lse=return_lse, layout=layout
    )


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
        out, lse = host.run_in(memory, q, k, v, None, 0.1, plan)
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
