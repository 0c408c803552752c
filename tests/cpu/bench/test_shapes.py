"""The shapes of the benchmark."""

import pytest

from lowbit_attention.bench.shapes import MASKS, SETS, Shape, parse_shape, shape_set
from lowbit_attention.errors import InvalidArgumentError


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (3, 7), (7, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_the_visible_pairs(q_len, kv_len, causal):
    shape = Shape("x", 2, 6, 3, q_len, kv_len, 16, causal)
    seen = sum(not causal or j <= i + kv_len - q_len for i in range(q_len) for j in range(kv_len))
    assert shape.flops == 4 * 2 * 6 * seen * 16


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_sequences_and_of_two_head_dims(causal):
    shape = Shape("x", 5, 6, 3, 40, 64, 16, causal, v_head_dim=8, is_varlen=True)
    lengths = list(zip(shape.sequence_lengths(40), shape.sequence_lengths(64), strict=True))
    assert (sum(n for n, _ in lengths), sum(m for _, m in lengths)) == (5 * 40, 5 * 64)
    assert (min(lengths), max(lengths)) == ((5, 8), (75, 120))
    seen = sum(not causal or j <= i + m - n for n, m in lengths for i in range(n) for j in range(m))
    assert shape.flops == 2 * 6 * seen * (16 + 8)


@pytest.mark.parametrize(
    ("text", "sizes", "causal"),
    [
        ("1x24x4608x128", (1, 24, 24, 4608, 4608, 128), False),
        ("4x32/8x8192x128:causal", (4, 32, 8, 8192, 8192, 128), True),
        ("1x40x32760,512x128", (1, 40, 40, 32760, 512, 128), False),
    ],
)
def test_a_shape_is_read_and_written(text, sizes, causal):
    shape = parse_shape(f" {text} ")
    assert (shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.head_dim) == sizes
    assert shape.is_causal is causal
    assert shape.label == shape.name == text
    assert parse_shape(shape.label) == shape
    assert shape.v_head_dim == shape.head_dim
    assert shape.sequence_lengths(shape.q_len) == [shape.q_len] * shape.batch


@pytest.mark.parametrize(
    "text", ["1x128x4096x192/128:causal", "16x4/2x100,30x64:causal:varlen", "2x4x100x64/32:varlen"]
)
def test_two_head_dims_and_sequences_are_read_and_written(text):
    shape = parse_shape(text)
    assert shape.label == shape.name == text
    assert parse_shape(shape.label) == shape
    assert shape.is_varlen is text.endswith("varlen")
    assert f"{shape.head_dim}/{shape.v_head_dim}" in text or shape.head_dim == shape.v_head_dim


def test_a_label_says_nothing_twice():
    assert parse_shape("1x4/4x8,8x16") == parse_shape("1x4x8x16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1x2x3", "is not batch x heads"),
        ("1x2x3x4x5", "is not batch x heads"),
        ("1x2x3x4:Causal", "is not batch x heads"),
        ("", "is not batch x heads"),
        ("axbxcxd", "is not batch x heads"),
        ("1x0x8x16", "at least 1"),
        ("1x8/0x8x16", "at least 1"),
        ("1x8x8x16/0", "at least 1"),
        ("1x8x8x16:varlen:padding", "is not batch x heads"),
        ("1x8x8x16:padding:varlen", "is not batch x heads"),
        ("1x6/4x8x16", "6 query heads are not a multiple of 4"),
    ],
)
def test_a_bad_shape_is_refused(text, words):
    with pytest.raises(InvalidArgumentError, match=words):
        parse_shape(text)


def test_the_sets():
    assert len(SETS["models"]) == 12
    assert len(SETS["grid"]) == 24
    for shapes in SETS.values():
        assert len({s.name for s in shapes}) == len({s.label for s in shapes}) == len(shapes)
        assert all(parse_shape(s.label).flops == s.flops for s in shapes)
    llama = next(s for s in shape_set("models") if s.name == "Llama-3.1-8B 8K")
    plain, *masked = shape_set("masks")
    assert plain.label == "4x32x8192x128"
    assert [s.label for s in masked] == [f"{plain.label}:{mask}" for mask in MASKS]
    assert all(s.name == s.label and s.flops == plain.flops for s in masked)
    assert llama.label == "1x32/8x8192x128:causal"
    with pytest.raises(InvalidArgumentError, match="known: quick, grid, models, masks, varlen, prefill"):
        shape_set("slow")
