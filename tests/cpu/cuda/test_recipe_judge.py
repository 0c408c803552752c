"""What tests/gpu/test_recipe_fuzz.py allows is less than an output that is not rescaled costs (emulated, no GPU)."""

from dataclasses import replace

import kernel_cases
import pytest
import torch
import wgmma_cases
from fuzz_recipes import check
from recipe_cases import Case

from lowbit_attention import recipe
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.quantize import Means
from lowbit_attention.reference.softmax import OnlineSoftmax


class NoKernelMeans:
    def means(self):
        return Means()


@pytest.fixture
def emulated(monkeypatch):
    """The kernel's place is taken by an emulation; ``emulated["rescales"]``: whether it rescales O."""
    options, promote = {"rescales": True}, OnlineSoftmax.promote

    def promote_wrongly(self, rows, *options):  # as if the output's maximum were always the interval's
        self.out_m[:, rows] = self.partial_m[:, rows]
        promote(self, rows, *options)

    def run(q, k, v, r):
        machine = replace(wgmma_cases.MACHINE, fidelity="instruction")
        with pytest.MonkeyPatch.context() as patch:
            if not options["rescales"]:
                patch.setattr(OnlineSoftmax, "promote", promote_wrongly)
            result = emulate(q, k, v, r, sm_scale=q.shape[3] ** -0.5, machine=machine)
        return result.out.to(q.dtype), result.lse

    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(wgmma_cases, "run", run)
    monkeypatch.setattr(wgmma_cases, "pack_kv", lambda k, v, r: NoKernelMeans())
    monkeypatch.setattr(wgmma_cases, "split_rows", lambda q, k, v, r, offset: (1, torch.zeros(q.shape[:3]).bool()))
    return options


@pytest.mark.parametrize(("keys", "family"), [(129, "normal"), (400, "sink")])
@pytest.mark.parametrize("spec", ["sage2_8b:softmax_max=restarted(20;4)", "sage2pp_8b:softmax_max=restarted(60)"])
def test_an_output_that_is_not_rescaled_is_seen(emulated, spec, keys, family):
    case = Case("attention_wgmma", 0, 0, keys, recipe(spec), "bf16", (64, 64), (2, 1), (150, keys), "none", family)
    check(case)
    emulated["rescales"] = False
    with pytest.raises(AssertionError):
        check(case)
