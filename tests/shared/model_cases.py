"""Real model classes with small random weights, and MiniLM with its own, for the tests on CPU and GPU.

A helper, not a test. Attention must matter in a random model, or any attention would pass: Q and K are drawn so that
the logits spread by more than 1, and a model whose attention is made uniform must answer something else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from lowbit_attention import compare, sdpa_enabled
from lowbit_attention.integrations.intercept import intercepted

SPREAD = {"q_proj": 0.08, "k_proj": 0.08, "v_proj": 0.09, "o_proj": 0.09}
BERT_SPREAD = {"query": 0.16, "key": 0.16, "value": 0.09, "attention.output.dense": 0.09}


@dataclass(frozen=True)
class ModelCase:
    """A model, inputs to it, and how many attention layers it has."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    layers: int
    read: Callable[[object], torch.Tensor] = lambda output: output.logits

    def to(self, device, dtype):
        """The same on a device."""
        inputs = {name: t.to(device) for name, t in self.inputs.items()}
        return ModelCase(self.model.to(device, dtype), inputs, self.layers, self.read)


def _spread(model, spreads):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        for part, std in spreads.items():
            if part in name and parameter.dim() == 2:
                parameter.data.normal_(std=std, generator=generator)
    return model.eval()


def llama(padded=False, length=96, heads=(4, 2), head_dim=32, layers=3):
    """Causal with GQA: without padding by ``is_causal`` and ``enable_gqa``, with padding by a bool mask."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = _spread(transformers.LlamaForCausalLM(config), SPREAD)
    inputs = {"input_ids": torch.randint(0, 256, (2, length))}
    if padded:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, : length // 5] = 0
    return ModelCase(model, inputs, layers)


def bert(padded=False, length=96, heads=4, layers=3):
    """Bidirectional, with or without a padding mask."""
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=heads, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = _spread(transformers.BertForMaskedLM(config), BERT_SPREAD)
    inputs = {"input_ids": torch.randint(0, 256, (2, length))}
    if padded:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, -length // 5 :] = 0
    return ModelCase(model, inputs, layers)


def minilm(folder, padded=True):
    """The demo's model with its real weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    texts = ["Attention weighs every word against every other.", "Short.", "The ship sailed at dawn, " * 8]
    if not padded:
        texts = texts[2:]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    if not padded:
        del inputs["attention_mask"]  # (all ones)
    return ModelCase(model, inputs, model.config.num_hidden_layers, lambda output: output.last_hidden_state)


@torch.no_grad()
def check(case, compiled, recipe="sage2_8b", implementation="emulation", target="model"):
    """Logits as native ones, every attention call by the recipe, eager and compiled; and attention matters at all."""
    model, inputs = case.model, case.inputs
    keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    native = case.read(model(**inputs))[keep]
    with intercepted(lambda original, name, q, *rest, **options: original(q * 0, *rest, **options), model):
        without = case.read(model(**inputs))[keep]
    assert compare(native, without).cos_sim < 0.98  # (weights that do not look at the keys give something else)
    called = model if compiled is None else torch.compile(model, fullgraph=True, backend=compiled)
    forwards = 3
    with sdpa_enabled(model if target == "model" else None, recipe, strict=True) as report:
        for _ in range(forwards):
            out = case.read(called(**inputs))[keep]
    assert report.by_implementation() == {implementation: case.layers * forwards}, str(report)
    result = compare(native, out)
    assert result.cos_sim >= 0.999, result
    assert not torch.equal(out, native)
    return result
