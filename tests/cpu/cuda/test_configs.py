"""Configurations of kernels: those that no card can run are refused, with the limit and the values."""

import dataclasses
import re

import pytest
import torch

from lowbit_attention import RECIPES, LowbitError
from lowbit_attention.backends.cuda import configs
from lowbit_attention.backends.cuda.configs import (
    ConfigError,
    MmaConfig,
    Part,
    SharedPlan,
    WgmmaConfig,
    WgmmaTile,
    pack_instance,
)
from lowbit_attention.backends.cuda.instances import MANIFEST, mma_config, wgmma_config

FAST = RECIPES["fast_8b"]


def test_a_head_dimension_without_a_tile_is_refused():
    with pytest.raises(ConfigError, match="no tile for head dimension 256 with O in shared"):
        wgmma_config(FAST, 256, torch.float16)
    with pytest.raises(ConfigError, match="no tile for head dimension 256 with e4m3 V"):
        mma_config(RECIPES["sage2_8b"], 256, "sm_89")
    assert issubclass(ConfigError, LowbitError)


def test_shared_memory_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setitem(configs._WGMMA_TILES, ("shared", 256), dataclasses.replace(_tile(128), stages=2))
    with pytest.raises(
        ConfigError, match=r"takes \d{3},\d{3} bytes of shared memory, and sm_90a has 232,448: k 65,536, v"
    ):
        wgmma_config(FAST, 256, torch.float16)
    monkeypatch.setitem(configs._MMA_TILES, ("e4m3", 256), configs.MmaTile(groups=1, blocks=2))
    with pytest.raises(ConfigError, match=r"sm_89 has 50,176 for each of 2 thread blocks"):
        MmaConfig("sm_89", 256)


def _tile(dim):
    return configs._WGMMA_TILES["shared", dim]


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (WgmmaTile(3, 2, 128, 80, 152), r"80 \+ 3 · 152 = 536 registers a lane, and the launch has 128 · 4 = 512"),
        (WgmmaTile(3, 2, 136, 80, 152), "512 threads of 136 registers, and there are 65,536"),
        (WgmmaTile(3, 2, 128, 101, 137), "101 registers; setmaxnreg takes multiples of 8 from 24 to 256"),
    ],
)
def test_registers_that_do_not_add_up_are_refused(tile, reason):
    with pytest.raises(ConfigError, match=reason):
        tile.check("it")


def test_sums_that_the_kernel_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="FP32-typed sums are promoted after 128 keys, not 256"):
        WgmmaConfig(128, torch.float16, promotion_keys=256)
    with pytest.raises(ConfigError, match="promotes after 64 keys or a multiple of 128"):
        WgmmaConfig(128, torch.float16, sums_f16=True, promotion_keys=192)
    with pytest.raises(ConfigError, match="16 tiles an interval, and 8 columns of ones"):
        WgmmaConfig(64, torch.float16, sums_f16=True, promotion_keys=2048, sum_in_mma=True, tile_means=True)
    with pytest.raises(ConfigError, match="not 256 channels"):
        pack_instance(256, torch.float16, "sm_89")


def test_a_plan_lays_parts_out_as_c_does():
    plan = SharedPlan((Part("a", 5, 1), Part("b", 8, 8), Part("c", 2, 2)), 16)
    assert plan.offsets == {"a": 0, "b": 8, "c": 16}
    assert plan.size == 32


def test_every_number_stands_once_before_the_source():
    for instance in MANIFEST:
        names = re.findall(r"^(?:#define|constexpr \w+) (\w+)", instance.config, flags=re.MULTILINE)
        assert len(names) == len(set(names))
        assert not set(names) & {name for name, _ in instance.defines}
        assert instance.source().text.startswith('#line 1 "config.cuh"\n')
