"""The masks of shapes: what they hide and add, who gets them, and what is said of those who do not."""

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, TINY, Fake, inputs, measured

from lowbit_attention.adaptive.records import _record
from lowbit_attention.bench import providers, results
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.masks import make_mask
from lowbit_attention.bench.providers import resolve_providers
from lowbit_attention.bench.shapes import FLOAT_MASKS, MASKS, Shape, parse_shape
from lowbit_attention.errors import InvalidArgumentError

BIG = "3x4/2x160,256x16"


def mask_of(text, dtype=torch.bfloat16, seed=0):
    return make_mask(parse_shape(text), CPU, dtype, seed)


@pytest.mark.parametrize("causal", ["", ":causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_read_written_and_made_of_its_size(mask, causal):
    text = f"{BIG}{causal}:{mask}"
    shape = parse_shape(text)
    assert (shape.mask, shape.is_causal) == (mask, bool(causal))
    assert shape.label == shape.name == text
    assert parse_shape(shape.label) == shape
    assert shape.flops == parse_shape(BIG + causal).flops
    made = mask_of(text)
    wanted = {"padding": (3, 1, 1, 256), "holes": (3, 1, 1, 256), "key_bias": (3, 1, 1, 256)}
    assert made.shape == wanted.get(mask, (3, 4, 160, 256) if mask == "bits_by_head" else (1, 1, 160, 256))
    assert made.shape == shape.mask_size
    assert made.is_contiguous()
    assert made.nbytes == shape.mask_bytes
    assert made.dtype == (torch.bfloat16 if mask in FLOAT_MASKS else torch.bool)
    assert torch.equal(made, mask_of(text))
    is_random = mask not in ("padding", "seen", "blocks")
    assert torch.equal(made, mask_of(text, seed=1)) is not is_random


def test_a_shape_without_a_mask_has_none():
    assert (TINY.mask, TINY.mask_size, TINY.mask_bytes) == (None, None, 0)
    assert mask_of(TINY.label) is None


def test_what_the_masks_hide():
    padding = mask_of(f"{BIG}:padding")
    assert padding[0].all()
    assert padding[1:, 0, 0].tolist() == [[key < 252 for key in range(256)]] * 2
    assert mask_of(f"{BIG}:seen").all()
    blocks = mask_of(f"{BIG}:blocks")[0, 0]
    assert blocks.tolist() == [[i // 40 == j // 64 for j in range(256)] for i in range(160)]
    for mask, share in (("holes", 0.3), ("bits", 0.1), ("bits_by_head", 0.1)):
        made = mask_of(f"3x4x{2048 if mask == 'holes' else 256}x16:{mask}")
        assert (~made).float().mean().item() == pytest.approx(share, abs=0.02)
        for a, b in zip(made.flatten(0, 1), made.flatten(0, 1)[1:], strict=False):  # each sequence (and head) its own
            assert not torch.equal(a, b)


def test_a_bias_is_normal_and_not_the_queries():
    for mask in FLOAT_MASKS:
        shape = parse_shape(f"4x1x512x128:{mask}")
        made = make_mask(shape, CPU, torch.float16, 0)
        assert made.dtype == torch.float16
        numbers = made.double().flatten()
        assert numbers.mean().item() == pytest.approx(0, abs=0.1)
        assert numbers.std().item() == pytest.approx(1, abs=0.1)
        q = inputs(shape)[0].double().flatten()[: numbers.numel()]
        assert abs(torch.corrcoef(torch.stack([q, numbers[: q.numel()]]))[0, 1]) < 0.1


def test_padding_hides_a_key_where_there_are_few_and_never_all():
    assert mask_of("2x1x5x8:padding")[1].flatten().tolist() == [True] * 4 + [False]
    assert mask_of("2x1x1x8:padding").all()


@pytest.mark.parametrize(
    "text", ["1x2x3x4:mask", "1x2x3x4:bits:causal", "1x2x3x4:bits:seen", "1x2x3x4:", "1x2x3x4:Bits", "1x2x3x4bits"]
)
def test_another_mask_is_refused(text):
    with pytest.raises(InvalidArgumentError, match=r"is not batch x heads.*padding, holes, .*bits_by_head"):
        parse_shape(text)


def test_a_shape_of_an_unknown_mask_is_refused():
    with pytest.raises(InvalidArgumentError, match="unknown mask 'mesh'; known: padding"):
        Shape("x", 1, 1, 1, 8, 8, 16, mask="mesh")


def test_a_saved_record_of_calls_has_no_mask_in_its_shape():
    call = {"name": "a", "index": 0, "timestep": 0, "shape": "1x2x64x32:bits"}
    with pytest.raises(ValueError, match="'1x2x64x32:bits' names a mask"):
        _record(call, [])


@pytest.mark.parametrize("causal", ["", ":causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["ours:sage2_8b", "ours:exact", "torch_default"])
def test_ours_and_torch_get_the_mask(name, mask, causal):
    shape = parse_shape(f"2x4/2x96x32{causal}:{mask}")
    q, k, v = inputs(shape)
    made = make_mask(shape, CPU, q.dtype, 0)
    (provider,) = resolve_providers([name])
    out = provider.prepare(shape, q, k, v, made)["whole"]().float()
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 32**0.5
    scores = scores + made if mask in FLOAT_MASKS else scores.masked_fill(~made, float("-inf"))
    if causal:
        scores = scores.masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), float("-inf"))
    exact = scores.softmax(3).nan_to_num() @ v.double().repeat_interleave(2, 1)

    assert ((out - exact).abs().sum() / exact.abs().sum()).item() < 0.05
    unmasked = provider.prepare(replace(shape, mask=None), q, k, v)["whole"]().float()
    assert torch.allclose(out, unmasked, atol=0.02, rtol=0.02) == (mask == "seen")


def test_the_choice_of_a_kernel_knows_the_mask(monkeypatch):
    seen = []
    explain = providers.explain

    def record(*arguments, **options):
        seen.append(explain(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(providers, "explain", record)
    measured(resolve_providers(["ours:sage2_8b"]), [parse_shape(f"1x2x64x32{end}") for end in ("", ":bits", ":bias")])
    assert ["mask" in str(one).partition("\n")[0] for one in seen] == [False, True, True]
    assert "bool mask" in str(seen[1])
    assert "float mask" in str(seen[2])


@pytest.mark.parametrize("name", ["cudnn_fp8", "fa3", "sageattention", "comfy_kitchen", "xformers"])
def test_others_say_that_they_get_none(monkeypatch, name):
    module = "cudnn_fp8" if name == "cudnn_fp8" else "peers"
    monkeypatch.setattr(f"lowbit_attention.bench.{module}.need_cuda", lambda q: None)
    (provider,) = resolve_providers([name])
    shape = replace(TINY, mask="seen")
    with pytest.raises(Unsupported, match=r"^no mask is timed with it: "):
        provider.prepare(shape, *inputs(shape), make_mask(shape, CPU, torch.bfloat16, 0))


def test_a_run_hands_masks_over_and_notes_the_kernel_alone(tmp_path):
    class Keeps(Fake):
        masks: list = []  # noqa: RUF012

        def prepare(self, shape, q, k, v, mask=None):
            self.masks.append(mask)
            return self.parts

    works = Keeps("works", {"whole": lambda: None, "kernel": providers._refuse_mask_alone})
    shape = parse_shape("2x2x64x32:holes")
    plain, masked = measured([works], [TINY, shape])
    assert works.masks[0] is None
    assert torch.equal(works.masks[1], make_mask(shape, CPU, torch.bfloat16, 0))
    assert [(r.part, r.shape) for r in masked.rows] == [("whole", "2x2x64x32:holes")]
    (note,) = masked.notes
    assert (note.provider, note.shape) == ("works kernel", "2x2x64x32:holes")
    assert note.reason == "the kernel alone takes no mask, so only whole calls are timed with one"

    path = tmp_path / "speed.csv"
    results.append_csv(path, plain.rows)  # a file from before masks has these columns
    results.append_csv(path, masked.rows)
    assert results.read_csv(path) == plain.rows + masked.rows
