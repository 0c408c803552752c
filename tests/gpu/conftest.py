"""What tests/gpu as a whole does: which of it is smoke, and how long it took.

`pytest tests/gpu -m smoke -n 8` is a small part of everything: bits, outputs, dispatch and edges of each kernel family.
"""

import time
from collections import Counter

import pytest
import torch

collect_ignore = ["accumulator_probe.py"]
"""The probe is a helper of the tests, not a test: it needs the run-time compiler as soon as it is imported."""

_BEGAN = time.monotonic()

_EVERY = {}
_DIMS = {"head_dim": {"64", "128", "40"}}
_PAIRS = {"head_dims": {"(128, 128)", "(64, 64)"}}
SMOKE = {
    # packed bits: each dtype and head dimension, of each kernel's form
    "test_packing.py::test_packed_bits": _DIMS | {"family": {"qkv_bias"}, "length": {"129"}},
    "test_packing.py::test_packed_bits_with_means_by_tile": _DIMS | {"family": {"drift"}, "length": {"1000"}},
    "test_packing.py::test_nothing_to_scale": _EVERY,
    "test_packing_mma.py::test_packed_bits": _DIMS | {"length": {"129"}},
    "test_attention_wgmma.py::test_the_integers_of_q": _DIMS | {"sign": {"1"}},
    "test_attention_mma.py::test_the_integers_of_q": _DIMS | {"granularity": {"per_thread"}, "smooth_q": {"True"}},
    "test_attention_mma.py::test_the_means_of_q": {"length": {"129"}},
    # outputs: the reference's, by the accumulators that the card has
    "test_attention_wgmma.py::test_it_is_the_reference": 8,
    "test_attention_mma.py::test_it_is_the_reference": 8,
    "test_attention_wgmma.py::test_the_sums_are_the_cards": {"length": {"100", "1000"}},
    "test_attention_mma.py::test_the_sums_are_the_cards": {"length": {"100"}},
    "test_attention_wgmma.py::test_splits_along_the_keys": {"lengths": {"(193, 2500)"}, "family": {"sink"}},
    "test_recipe_fuzz.py::test_random_recipes": 20,
    "test_accumulators.py::test_the_model_is_the_card": {"steps": {"3"}},
    "test_reference_on_cuda.py::test_packing_is_bitwise_the_cpus": {"family": {"qkv_bias"}},
    # dispatch, and being called
    "test_attention_mma_calls.py::test_the_hopper_kernel_comes_first": _EVERY,
    "test_attention_mma_calls.py::test_auto_leaves_it_alone_here": _EVERY,
    "test_attention_mma_calls.py::test_attention_runs_it_for_what_the_hopper_kernel_has_not": {"layout": {"HND"}},
    "test_attention_wgmma_calls.py::test_other_recipes_are_refused_with_a_reason": _EVERY,
    "test_attention_wgmma_calls.py::test_a_graph_replays_with_new_inputs": _EVERY,
    "test_torch_plug.py::test_the_kernel_runs_every_layer": _EVERY,
    "test_torch_plug.py::test_sageattention_names_run_the_kernel": _EVERY,
    # edges
    "test_attention_wgmma_calls.py::test_every_element_is_written_and_none_is_read_before": _PAIRS,
    "test_attention_mma_calls.py::test_every_element_is_written_and_none_is_read_before": _PAIRS,
    "test_attention_wgmma_calls.py::test_repeats_are_equal": _EVERY,
    "test_attention_mma_calls.py::test_repeats_are_equal": _EVERY,
    "test_attention_wgmma_edges.py::test_rows_that_see_no_key": _EVERY,
    "test_attention_mma_edges.py::test_rows_that_see_no_key": _PAIRS,
    "test_attention_wgmma_edges.py::test_finite_in_finite_out": {"magnitude": {"1e-30", "10000.0", "1e+18"}},
    "test_attention_mma_edges.py::test_finite_in_finite_out": {"magnitude": {"10000.0"}},
    "test_attention_wgmma_edges.py::test_a_bad_number_of_k_shows_in_the_rows_that_see_it": {"token": {"150"}},
}
"""Smoke tests: of those of that name the ones whose parameters have these values (as texts), or each so-manieth.

One table and no marks at the tests, so that what smoke costs is seen at once: it should stay within three minutes on
one H200 with `-n 8`.
"""


@pytest.hookimpl(tryfirst=True)  # (before `-m` looks for the mark)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `SMOKE` names. An entry that fits no test of its file is a mistake."""
    ours = [item for item in items if item.path.parent.name == "gpu"]
    found = Counter()
    for item in ours:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in SMOKE:
            found[name, "met"] += 1
            if _is_smoke(SMOKE[name], item, found[name, "met"]):
                item.add_marker("smoke")
                found[name, "marked"] += 1
    whole = {item.path.name for item in ours if "::" not in "".join(item.config.args)}
    lost = [name for name in SMOKE if name.split("::")[0] in whole and not found[name, "marked"]]
    if lost:
        raise pytest.UsageError(f"SMOKE in tests/gpu/conftest.py names no test: {', '.join(lost)}")


def _is_smoke(wanted: dict[str, set[str]] | int, item: pytest.Item, number: int) -> bool:
    if isinstance(wanted, int):
        return number % wanted == 1
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return all(str(params[name]) in values for name, values in wanted.items())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How long it took, on what, and which files took most of it (all workers' time together)."""
    by_file = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and "tests/gpu/" in report.nodeid:
                by_file[report.nodeid.split("::")[0].rpartition("/")[2]] += report.duration
    if not by_file:
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    workers = getattr(config.option, "numprocesses", None) or 1
    slowest = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in by_file.most_common(5))
    terminalreporter.write_line(f"tests/gpu: {time.monotonic() - _BEGAN:.0f} s, workers: {workers}, {card}")
    terminalreporter.write_line(f"tests/gpu: most of the workers' {sum(by_file.values()):.0f} s: {slowest}")
