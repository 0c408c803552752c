"""Loops, and what stands in them, read from a disassembly."""

import json
from pathlib import Path

import pytest

from lowbit_attention import recipe
from lowbit_attention.backends.cuda.inspect import kernels as inspect
from lowbit_attention.backends.cuda.instances import mma_config

ROOT = Path(__file__).resolve().parents[3]

SASS = """
.L_x_0:
        /*0000*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, RZ ;
        /*0010*/                   FFMA R4, R4, R5, R6 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
.L_x_1:
        /*0040*/                   QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, RZ ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""


def test_a_loop_is_from_a_label_to_a_branch_back():
    outer, inner = inspect.loops(SASS)
    assert dict(outer.counts) == {"IMMA": 1, "FFMA": 1, "BRA": 2, "MUFU": 1, "QMMA": 1}
    assert (outer.mma, outer.other) == (2, 4)
    assert (inner.mma, inner.other) == (1, 2)


def test_the_main_loop_is_the_shortest_with_all_mmas():
    assert inspect.main_loop(SASS, 2).other == 4
    assert inspect.main_loop(SASS, 1).other == 2
    with pytest.raises(ValueError, match="3 MMAs"):
        inspect.main_loop(SASS, 3)


@pytest.mark.parametrize(
    ("spec", "mmas"),
    [  # of the issue slots' counts: 32 × 64 scores, m16n8k32 (k64 at 4 bits, k16 in FP16), and four with ones
        ("sage2_8b:row_sum=unrounded", 128),
        ("sage2_8b", 132),
        ("sage2pp_4b", 100),
        ("int8_fp16", 192),
    ],
)
def test_mmas_of_an_iteration(spec, mmas):
    assert mma_config(recipe(spec), 128, "sm_89").own_mmas == mmas


def test_a_row_of_the_real_kernel():
    pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")
    row = inspect.inspect(recipe("sage2pp_8b"), 64, "sm_89")
    assert row.mma == mma_config(recipe("sage2pp_8b"), 64, "sm_89").own_mmas
    assert row.spill_bytes == 0
    assert row.elements == 64
    assert 4 < row.other_per_element < 8
    # 32 × 64 × 64 products at 1024 a clock, twice, and 8 columns of ones
    assert row.tensor_clocks == 2 * 128 + 16
    assert row.issue_clocks == (row.mma + row.other) / 4
    assert row.bound_tops == pytest.approx(4 * 32 * 64 * 64 / 272 * 128 * 2.52e9 / 1e12)


def test_the_limits_are_those_that_were_set_as_goals_or_said_otherwise():
    """75 % of the official kernels' instructions, at head dimension 128 on Ada; docs/results/mma.md has the table."""
    limits = json.loads((ROOT / "tools" / "instruction_limits.json").read_text())
    goals = {"sage2_8b": 501, "sage2pp_8b": 611, "sage2pp_4b": 672}
    for name, goal in goals.items():
        assert limits[str(mma_config(recipe(name), 128, "sm_89").instance())] <= goal
