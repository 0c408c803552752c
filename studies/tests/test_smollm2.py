"""The study of SmolLM2 on a tiny random Llama: its arithmetic, its counts, its page. Nothing is downloaded."""

import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install './studies[smollm2]'")

from model_cases import llama

from lowbit_attention import InvalidArgumentError, recipe, sdpa_enabled
from lowbit_attention.adaptive import CallKey, Policy
from lowbit_studies.smollm2 import __main__ as command
from lowbit_studies.smollm2 import page, policies, study, texts
from lowbit_studies.smollm2.measure import (
    NotQuantisedError,
    check,
    exact_way,
    judge,
    layer_errors,
    policy_way,
    recipe_way,
    yardsticks,
)
from lowbit_studies.smollm2.model import Witness, find

LAYERS = 3


@pytest.fixture(scope="module")
def witness():
    case = llama(heads=(4, 2), head_dim=32, layers=LAYERS)
    return Witness("tiny", case.model, lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def windows():
    return texts.windows(list(texts.read("prose").encode()), 64, 128)


def settings(**options):
    given = {"texts": ["prose", "code"], "contexts": [16, 32], "recipes": ["sage2_8b"], "tokens": 32}
    return study.Settings(**{**given, **options})


@pytest.mark.parametrize("name", [*texts.KINDS, texts.CALIBRATION])
def test_a_text_is_long_enough_and_small(name):
    text = texts.read(name)
    assert len(text.encode()) <= 64_000
    assert len(text) / 5 > 8192 or name == "licences"  # (five characters a token are more than any kind has)
    assert (texts.FOLDER / "SOURCES.md").read_text().count(f"`{name}.txt`") >= 1


def test_windows_do_not_overlap_and_share_a_border(windows):
    assert windows.shape == (2, 65)
    assert windows[0, -1] == windows[1, 0]


def test_too_few_tokens():
    with pytest.raises(InvalidArgumentError, match="8 of 8 tokens"):
        texts.windows(range(8), 4, 8)


def test_unknown_text():
    with pytest.raises(InvalidArgumentError, match="known: prose"):
        texts.read("poem")


def test_judging_by_hand():
    exact = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    other = torch.tensor([[[0.0, 0.0], [0.0, math.log(4.0)]]])
    (end,) = judge(exact, other, torch.tensor([[0, 1, 1]]))
    assert end.nats == pytest.approx((math.log(2) - math.log(0.8)) / 2)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    second = 0.8 * math.log(0.8 / 0.2) + 0.2 * math.log(0.2 / 0.8)
    assert end.kl == pytest.approx((first + second) / 2)
    assert (end.agree, end.right) == (0.0, 0.5)


def test_long_windows_are_judged_in_parts():
    torch.manual_seed(0)
    exact, other = torch.randn(2, 1, 2500, 7)
    target = torch.randint(7, (1, 2501))
    (end,) = judge(exact, other, target)
    a, b = exact[0].double().log_softmax(-1), other[0].double().log_softmax(-1)
    assert end.kl == pytest.approx(float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean")))
    assert end.nats == pytest.approx(float(torch.nn.functional.nll_loss(b, target[0, 1:])))


def test_each_way_is_as_far_as_it_should_be(witness, windows):
    exact, _ = exact_way().run(witness, windows)
    before = {name: weight.clone() for name, weight in witness.model.state_dict().items()}
    kl = {}
    for way in [*yardsticks(), recipe_way("sage2_8b", None), recipe_way("sage2_4b", None)]:
        out, ran = way.run(witness, windows)
        assert sum(ran.values()) == LAYERS
        assert out.dtype == torch.float32
        kl[way.name] = judge(exact, out, windows)[0].kl
    assert 0 < kl["bf16 attention"] < kl["sage2_8b"] < kl["sage2_4b"]
    assert kl["bf16 attention"] < kl["bf16 model"]
    after = witness.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.equal(exact_way().run(witness, windows)[0], exact)


def test_a_call_that_went_elsewhere_stops_the_study(witness, windows):
    x = torch.randn(1, 1, 8, 16)
    with sdpa_enabled(recipe="sage2_8b") as report:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.nn.functional.scaled_dot_product_attention(x.double(), x.double(), x.double())  # which goes to torch
    with pytest.raises(NotQuantisedError, match="2 calls of sage2_8b were expected"):
        check(report, "sage2_8b", 2)
    partly = Policy({CallKey("model.layers.0.self_attn", 0, 0.0): "exact"}, {"exact": recipe("exact")})
    with pytest.raises(NotQuantisedError, match=f"1 of {LAYERS} layers"):
        policy_way("partly", partly, None).run(witness, windows)


def test_errors_by_layer(witness, windows):
    rows = list(layer_errors(witness, windows, ["sage2_8b", "sage2_4b"], None))
    assert [(row["layer"], row["recipe"]) for row in rows[:3]] == [(0, "sage2_8b"), (0, "sage2_4b"), (1, "sage2_8b")]
    assert len(rows) == 2 * LAYERS
    assert all(a["l1"] < b["l1"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_the_whole_study(witness, tmp_path):
    steps = []
    wanted = settings(shuffles=1)
    found = study.Found(tmp_path)
    study.run(witness, wanted, found, steps.append)
    assert len(steps) == study.steps(wanted, LAYERS)
    assert {row["way"] for row in found.ends} == {
        "exact", "bf16 attention", "bf16 model", "sage2_8b", policies.NAME, "shuffled 1",
    }  # fmt: skip
    assert len(found.ends) == 6 * 2 * (2 + 1)
    assert len(found.layers) == 2 * 2 * LAYERS
    adaptive = [row for row in found.ends if row["kind"] == "policy"]
    assert all(row["four_bits"] >= policies.SHARE for row in adaptive)

    again = study.Found.resumed(tmp_path)
    steps.clear()
    study.run(witness, wanted, again, steps.append)
    assert steps == []
    assert len(again.ends) == len(found.ends)

    text = page.text(again.ends, again.layers, ABOUT, "images/a.png")
    for way in page.ways(again.ends):
        assert f"| `{way}` |" in text
    assert "| `exact` | torch, float32 | 0 % |" in text
    page.draw(again.layers, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


ABOUT = {
    "gpu": None, "versions": {"torch": "2"}, "like": None, "tokens": 64, "layers": LAYERS, "texts": {"prose": "words"},
    "candidates": policies.CANDIDATES, "skipped": {"sage1": "no"}, "file": "a.gguf", "sha256": "0" * 64,
}  # fmt: skip


def test_time_that_runs_out(witness, tmp_path):
    found = study.Found(tmp_path)
    one = {"texts": ["prose"], "contexts": [16], "shuffles": None, "layers": False}
    study.run(witness, settings(**one, seconds=0.0), found, lambda what: None)
    assert not found.complete
    study.run(witness, settings(**one), found, lambda what: None)
    assert found.complete
    assert len(found.ends) == 4 * 2


def test_the_page_says_how_much_more(tmp_path):
    def row(way, context, nats, kl):
        return {
            "text": "a", "context": context, "window": 0, "way": way, "kind": "recipe", "nats": nats, "kl": kl,
            "agree": 0.5, "right": 0.4, "ran_on": "x", "calls": 3, "four_bits": 0.0, "seconds": 1.0,
        }  # fmt: skip

    rows = [row("exact", 8, 1.0, 0.0), row("far", 8, 1.1, 0.2), row("near", 8, 1.0, 0.1)]
    assert page.ways(rows) == ["exact", "near", "far"]
    line = next(line for line in page.end_table(rows).splitlines() if "far" in line)
    assert line == f"| `far` | x | 0 % | {math.exp(1.1):.3f} | {100 * math.expm1(0.1):+.2f} | 200 | 50.00 |"


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--recipes", "sage3"], "no recipe 'sage3'"), (["--texts", "poem"], "no text 'poem'")],
)
def test_wrong_options(tmp_path, options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        command.main(["--out", str(tmp_path), *options])


def test_no_model(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgumentError, match="--model"):
        find(tmp_path / "none.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match="pip install"):
        find()
