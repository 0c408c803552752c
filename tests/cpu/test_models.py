"""Models of real classes through `sdpa_enabled`, eager and compiled: logits as before, every layer counted."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra demo")
import model_cases

from lowbit_attention import sdpa_enabled
from lowbit_attention.demo.minilm import _model_folder

CASES = {
    "llama": lambda: model_cases.llama(),
    "llama_padded": lambda: model_cases.llama(padded=True),
    "bert": lambda: model_cases.bert(),
    "bert_padded": lambda: model_cases.bert(padded=True),
    "minilm": lambda: model_cases.minilm(_model_folder(), padded=False),
    "minilm_padded": lambda: model_cases.minilm(_model_folder()),
}


@pytest.mark.parametrize("compiled", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_counter(name, compiled):
    torch._dynamo.reset()
    model_cases.check(CASES[name](), compiled)


def test_process_wide():
    model_cases.check(model_cases.llama(), None, target="process")


@torch.no_grad()
def test_generate_with_a_cache():
    """A prefill, then one query a call against a growing cache."""
    case = model_cases.llama()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with sdpa_enabled(case.model, "sage2_8b", strict=True) as report:
        out = case.model.generate(**case.inputs, attention_mask=torch.ones_like(case.inputs["input_ids"]), **options)
    assert out.shape == (2, 96 + 5)
    assert report.by_implementation() == {"emulation": 5 * case.layers}


def test_training_is_torchs():
    case = model_cases.bert()
    case.model.train()
    with sdpa_enabled(case.model, "sage2_8b") as report:
        case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    assert report.fallbacks == {"gradients are asked for": case.layers}
    assert all(p.grad is not None for n, p in case.model.named_parameters() if "query.weight" in n)
