"""`make kernels-same` names the instances whose machine code changed, and no others."""

import shutil

import kernels_same

CSRC = "src/lowbit_attention/backends/cuda/csrc"
ONLY = "smooth_q sm_89 HEAD_DIM=64"  # (the smallest: a compilation takes a quarter of a second)


def test_other_code_is_told_from_other_text(tmp_path):
    copy = shutil.copytree(kernels_same.ROOT / "src", tmp_path / "src")
    changed = tmp_path / CSRC / "pack/smooth_q.cu"
    scale = tmp_path / CSRC / "common/scale.cuh"
    assert copy.is_dir()
    scale.write_text("// a remark\n" + scale.read_text())  # every instance has another source
    text = changed.read_text()
    guarded = "const int first = blockIdx.x * kTileRows, end ="
    assert text.count(guarded) == 1
    changed.write_text(text.replace(guarded, f"if (kType == kFloat16 && args.scale < 0) return;\n  {guarded}"))

    lines, count = kernels_same.compare(kernels_same.ROOT, tmp_path, ONLY)
    assert count == 6  # FP16 and BF16, with each form of mask
    assert len(lines) == 3, lines
    for line in lines:
        assert line.startswith(f"{ONLY} INPUT_DTYPE=1")
        assert " instructions, then " in line


def test_instances_that_come_and_go_are_told():
    answers = {"a": "1", "b": "1"}, {"b": "1", "c": "1"}
    assert kernels_same.differences(lambda wanted: answers, "") == (["a: only before", "c: only after"], 3)
