"""Observing: names, timesteps, an untouched model, bounded memory, files."""

import inspect
import json

import cases
import pytest
import torch
import torch.nn.functional as F

from lowbit_attention import InvalidArgumentError
from lowbit_attention.adaptive import CallKey, Observations, Sample, choose, observe
from lowbit_attention.adaptive.clock import Clock, driven
from lowbit_attention.adaptive.distributions import BINS, Summary, edges
from lowbit_attention.adaptive.report import report_data


class Scheduler:
    """A diffusion scheduler as code that knows diffusers expects it."""

    def __init__(self, count=3):
        self.set_timesteps(count)

    def set_timesteps(self, count):
        self.timesteps = torch.linspace(900, 100, count)

    def step(self, out, t, sample):
        return sample - 0.1 * out


def keys(watch):
    return [(k.name, k.index, k.timestep) for k in watch.observations.records]


def test_the_model_runs_as_it_always_does():
    model, x = cases.net(), cases.tokens()
    want = model(x)
    with observe(model, ["sage2_4b"]) as watch:
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), want)
    assert keys(watch) == [(f"layers.{n}", 0, 0.0) for n in range(3)]
    assert all(0 < r.scores["sage2_4b"].l1 < 1 for r in watch.observations.records.values())
    assert watch.observations.attention_seconds > 0
    assert watch.observations.scoring_seconds > 0


def test_calls_of_one_module_are_numbered_and_every_forward_begins_anew():
    model, x = cases.net(layers=2, calls=2), cases.tokens()
    with observe(model, ["sage2_8b"]) as watch:
        model(x)
        model(x)
    assert keys(watch) == [(f"layers.{n}", i, 0.0) for n in range(2) for i in range(2)]
    assert {r.count for r in watch.observations.records.values()} == {2}
    assert watch.observations.runs == 2


def test_without_a_model_calls_have_numbers():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    with observe(candidates=["sage2_8b"]) as watch:
        for t in (5.0, 2.5):
            watch.step(t)
            for _ in range(2):
                F.scaled_dot_product_attention(q, k, v)
        watch.restart()
        watch.step(5.0)
        F.scaled_dot_product_attention(q, k, v)
    assert keys(watch) == [("call 0", 0, 5.0), ("call 1", 0, 5.0), ("call 0", 0, 2.5), ("call 1", 0, 2.5)]
    assert watch.observations.records[CallKey("call 0", 0, 5.0)].count == 2
    assert watch.observations.runs == 2
    assert watch.observations.model is None


def test_a_model_that_attends_itself():
    model, x = cases.Attention(64, 2), cases.tokens()
    with torch.no_grad(), observe(model, ["sage2_8b"]) as watch:
        model(x)
    assert keys(watch) == [("(model)", 0, 0.0)]


def test_forwards_are_steps():
    model, x = cases.net(layers=1), cases.tokens()
    with observe(model, ["sage2_8b"], timesteps="forwards") as watch:
        for _ in range(2):
            watch.restart()
            for _ in range(3):
                model(x)
    assert keys(watch) == [("layers.0", 0, float(t)) for t in range(3)]
    assert watch.observations.runs == 2


def test_steps_by_hand_are_not_undone_by_forwards():
    model, x = cases.net(layers=1), cases.tokens()
    with observe(model, ["sage2_8b"]) as watch:
        for t in (7, torch.tensor(3)):
            watch.step(t)
            model(x)
            model(x)  # guidance runs the model twice a step
    assert keys(watch) == [("layers.0", i, t) for t in (7.0, 3.0) for i in (0, 1)]
    with observe(model, ["sage2_8b"]) as watch, pytest.raises(InvalidArgumentError, match="a timestep is a number"):
        watch.step("first")


def test_a_followed_scheduler_shows_its_own_signatures():
    """Pipelines look there for what a scheduler takes (``eta``, ``generator``, ``sigmas``), and give no more."""
    scheduler = Scheduler(3)
    own = {name: inspect.signature(getattr(scheduler, name)) for name in ("step", "set_timesteps")}
    with driven(Clock(), scheduler, None), driven(Clock(), scheduler, None):
        assert {name: inspect.signature(getattr(scheduler, name)) for name in own} == own


def test_a_scheduler_is_followed_and_left_as_it_was():
    model, x, scheduler = cases.net(layers=1), cases.tokens(), Scheduler()
    with observe(model, ["sage2_8b"], timesteps=scheduler) as watch:
        for _ in range(2):  # two prompts
            sample = x
            for t in scheduler.timesteps:
                sample = scheduler.step(model(sample), t, sample)
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            scheduler.step(model(x), t, x)
    assert keys(watch) == [("layers.0", 0, t) for t in (900.0, 500.0, 100.0)]
    assert [r.count for r in watch.observations.records.values()] == [3, 2, 3]
    assert watch.observations.runs == 3
    assert "step" not in vars(scheduler)
    assert "set_timesteps" not in vars(scheduler)
    assert torch.equal(scheduler.step(x, 0, x), x - 0.1 * x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": []}, "different recipes that quantise, got none"),
        ({"candidates": ["exact"]}, "different recipes that quantise, got exact"),
        ({"candidates": ["sage2_8b", "sage2_8b"]}, "got sage2_8b, sage2_8b"),
        ({"timesteps": "steps"}, "timesteps='steps' is neither"),
        ({"timesteps": "forwards"}, "counts the forwards of a model"),
        ({"like": "sm_70"}, "names no machine"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message), observe(**arguments):
        pass


def test_nothing_stays_patched_after_an_error():
    model = cases.net()
    with pytest.raises(RuntimeError, match="mine"), observe(model, ["sage2_8b"], timesteps=(scheduler := Scheduler())):
        raise RuntimeError("mine")
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert "step" not in vars(scheduler)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_empty_calls_are_let_through():
    q = torch.randn(1, 2, 0, 16)
    with observe(candidates=["sage2_8b"]) as watch:
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert watch.observations.records == {}


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "why"),
    [
        ((1, 1, 40, 512), torch.float32, {}, "head_dim 512 is above 256"),
        ((1, 1, 40, 16), torch.float64, {}, "would lose float64's digits"),
        ((1, 1, 40, 16), torch.float32, {"dropout_p": 0.5}, "it has dropout"),
    ],
)
def test_calls_that_no_recipe_runs_stay_exact(shape, dtype, options, why, tmp_path):
    plain, odd = torch.randn(1, 2, 40, 16), torch.randn(shape, dtype=dtype)
    with observe(candidates=["sage2_8b"]) as watch:
        F.scaled_dot_product_attention(plain, plain, plain)
        F.scaled_dot_product_attention(odd, odd, odd, **options)
    watch.observations.save(tmp_path / "o.json")
    seen = Observations.load(tmp_path / "o.json")
    assert seen.records == watch.observations.records
    choice = choose(seen, budget=1.0)
    assert {k.name: r for k, r in choice.recipes.items()} == {"call 0": "sage2_8b"}
    assert any(why in note for note in choice.notes)
    with choice.policy().applied():
        F.scaled_dot_product_attention(plain, plain, plain)
        out = F.scaled_dot_product_attention(odd, odd, odd)
    assert torch.equal(out, F.scaled_dot_product_attention(odd, odd, odd))
    report_data(choice, "t")


def test_a_progress_bar_counts_the_calls(capsys):
    class Bar:
        calls = 0

        def add_task(self, *_, **__):
            return 0

        def update(self, task, advance, description):
            assert description == f"observing layers.{self.calls % 3}[0] at 0"
            self.calls += advance

    model, bar = cases.net(), Bar()
    with observe(model, ["sage2_8b"], progress=bar):
        model(cases.tokens())
    assert bar.calls == 3
    with observe(model, ["sage2_8b"], progress=True):
        model(cases.tokens())


def test_under_compile_it_observes_the_same():
    model, x = cases.net(), cases.tokens()
    with observe(model, ["sage2_4b"], like="sm_89") as plain:
        model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with observe(compiled, ["sage2_4b"], like="sm_89") as watch:
        compiled(x)
    assert keys(watch) == keys(plain)
    assert watch.observations.model == plain.observations.model
    for key, record in plain.observations.records.items():
        assert watch.observations.records[key].scores == record.scores


def test_it_is_repeatable_and_saved_whole(tmp_path):
    def run():
        model = cases.net()
        with observe(model, ["sage2_8b", "sage2_4b"], timesteps="forwards", like="sm_89") as watch:
            for seed in range(2):
                model(cases.tokens(seed=seed))
        return watch.observations

    first, second = run(), run()
    assert first.records == second.records
    first.save(tmp_path / "a.json")
    loaded = Observations.load(tmp_path / "a.json")
    assert loaded.records == first.records
    assert loaded.candidates == first.candidates
    assert loaded.model == first.model
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    assert "tensor(" not in (tmp_path / "a.json").read_text()


def test_prompts_accumulate_and_a_file_is_resumed(tmp_path):
    model = cases.net()
    whole = Sample(heads=None, tiles=None)

    def run(seeds, resume=None):
        with observe(model, ["sage2_4b"], sample=whole, resume=resume) as watch:
            for seed in seeds:
                model(cases.tokens(seed=seed))
        return watch.observations

    together = run([0, 1, 2])
    run([0, 1]).save(tmp_path / "half.json")
    resumed = run([2], Observations.load(tmp_path / "half.json"))
    merged = run([0])
    merged.merge(run([1, 2]))
    for key, record in together.records.items():
        for other in (resumed, merged):
            assert other.records[key].count == record.count == 3
            assert other.records[key].scores["sage2_4b"].l1 == pytest.approx(record.scores["sage2_4b"].l1, rel=1e-12)
            assert other.records[key].scores["sage2_4b"].worst == record.scores["sage2_4b"].worst
    assert resumed.runs == merged.runs == together.runs == 3


def test_what_does_not_go_together():
    model, other = cases.net(), cases.net(layers=2)
    with observe(model, ["sage2_8b"]) as watch:
        model(cases.tokens())
    for arguments, message in (
        ((other, ["sage2_8b"]), "modules: 8, here 6"),
        ((model, ["sage2_4b"]), "recipes sage2_8b and sage2_4b"),
        ((None, ["sage2_8b"]), "one of them with a model"),
    ):
        with (
            pytest.raises(InvalidArgumentError, match=message),
            observe(*arguments, resume=watch.observations),
        ):
            pass
    with pytest.raises(InvalidArgumentError, match="scored as None and as sm_89"):
        watch.observations.merge(Observations(watch.observations.candidates, "sm_89", watch.observations.model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(format="a policy"), "its format is 'a policy'"),
        (lambda d: d.update(schema=2), "has schema 2; this version reads 1"),
        (lambda d: d.pop("calls"), "is damaged: KeyError"),
        (lambda d: d["calls"][0].update(timestep="late"), "is damaged: timestep is 'late'"),
        (lambda d: d["calls"][0]["scores"].update(sage1=[1, 1, 1, 1, 1, 1]), "none of its recipes"),
        (lambda d: d["calls"][0]["scores"].clear(), "has no score of sage2_8b"),
        (lambda d: d["recipes"][0].update(run="os.system"), "unknown option 'run'"),
        (lambda d: d["distributions"]["blocks.0.attn"]["q"]["raw"].update(first_bin=190), "no histogram"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    cases.made_up(layers=1, steps=1).save(tmp_path / "o.json")
    document = json.loads((tmp_path / "o.json").read_text())
    damage(document)
    (tmp_path / "o.json").write_text(json.dumps(document))
    with pytest.raises(InvalidArgumentError, match=message):
        Observations.load(tmp_path / "o.json")


def test_files_that_are_none(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no file"):
        Observations.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("not JSON")
    with pytest.raises(InvalidArgumentError, match="is no JSON file"):
        Observations.load(tmp_path / "text.json")


def test_histograms_count_everything_once():
    x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0, 0], x[0, 1, 1] = 1e6, -1e6  # beyond the last edges
    summary = Summary()
    summary.add(x[:1])
    summary.add(x[1:])
    assert sum(summary.counts) == x.numel()
    assert summary.counts[0] == summary.counts[-1] == 1
    ends = torch.tensor(edges())
    wanted = torch.histogram(x.clamp(ends[0] + 1e-3, ends[-1] - 1e-3), ends).hist
    assert torch.equal(torch.tensor(summary.counts).float(), wanted)
    assert summary.channels == pytest.approx(x.abs().amax(dim=(0, 1)).tolist())
    rms = x.square().mean(-1).sqrt()
    assert summary.crest == pytest.approx(float((x.abs().amax(-1) / rms).mean()), rel=1e-5)
    assert len(edges()) == BINS + 1
    assert Summary.from_json(summary.to_json()).counts == summary.counts


def test_smoothing_and_rotation_lower_the_peaks():
    seen = cases.made_up(layers=2, steps=1)
    biased, turned = (seen.distributions[f"blocks.{n}.attn"]["k"] for n in (0, 1))  # qk_bias; behind RoPE
    assert biased["smooth"].crest < 0.8 * biased["raw"].crest
    assert turned["rotated"].crest < 0.9 * turned["smooth"].crest
