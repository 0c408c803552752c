"""`integrations.comfyui` against a stub of ComfyUI (`comfy_stub` says what is assumed): every call gets its answer,
what is not for a recipe goes where it would have gone, and everything is said."""

import copy
import itertools
import logging

import comfy_stub as comfy
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lowbit_attention import InvalidArgumentError, InvalidRecipeError, LowbitError, UnsupportedError, compare
from lowbit_attention.adaptive import Fingerprint, Policy, PolicyMismatchError
from lowbit_attention.adaptive.calibrate import POLICY, Rule
from lowbit_attention.adaptive.clock import CallKey
from lowbit_attention.integrations.comfyui import apply, calibrate
from lowbit_attention.integrations.comfyui.calls import LOW_PRECISION
from lowbit_attention.integrations.comfyui.override import EXACT, NOT_OF_THE_MODEL
from lowbit_attention.integrations.comfyui.runs import OUTSIDE
from lowbit_attention.recipes.named import RECIPES

KEY = "optimized_attention_override"
N_CALLS = 12  # of a run: 3 sigmas, 2 blocks, 2 calls each


@pytest.fixture(autouse=True)
def stub(monkeypatch, tmp_path, caplog):
    comfy.install(monkeypatch, tmp_path)
    caplog.set_level(logging.INFO, "lowbit_attention.comfyui")


def model(**options):
    return comfy.ModelPatcher(comfy.DiffusionModel(**options))


def override_of(patcher):
    return patcher.model_options["transformer_options"][KEY]


def emulated(patcher, recipe="sage2_8b", **options):
    return apply(patcher, recipe, emulate=True, **options)


def off(got, want):
    return compare(want, got).l1


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "lowbit_attention.comfyui"]


# ---- a run


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("containers", [True, False])
def test_a_run_by_a_recipe(caplog, containers, together):
    patcher = model(containers=containers)
    want = comfy.sample(patcher, together=together)
    comfy.CALLS.clear()
    got = comfy.sample(emulated(patcher), together=together)
    assert 1e-4 < off(got, want) < 0.05
    assert comfy.CALLS == []  # every call was the recipe's
    n = N_CALLS if together else 2 * N_CALLS
    (line,) = lines(caplog)
    assert line == (
        f"lowbit-attention (sage2_8b): {n} of {n} attention calls ran in low precision ({n} by emulation [sage2_8b])"
    )
    assert caplog.records[-1].levelno == logging.INFO


def test_the_model_itself_is_as_it_was():
    """A node that is bypassed hands the model on: nothing is left of its last run."""
    patcher = model()
    want = comfy.sample(patcher)
    options, wrappers = copy.deepcopy(patcher.model_options), copy.deepcopy(patcher.wrappers)
    comfy.sample(emulated(patcher))
    assert (patcher.model_options, patcher.wrappers) == (options, wrappers)
    assert not patcher.model.diffusion_model._forward_pre_hooks
    assert torch.equal(comfy.sample(patcher), want)


def test_auto_leaves_to_comfyui_what_no_kernel_runs(caplog):
    patcher = model()
    want = comfy.sample(patcher)
    for recipe in ("auto", "sage2_8b"):
        caplog.clear()
        assert torch.equal(comfy.sample(apply(patcher, recipe)), want)
        (line,) = lines(caplog)
        assert line.startswith(f"lowbit-attention ({recipe}): 0 of 12 attention calls ran in low precision; 12 were")
        assert "not on cpu" in line
        assert caplog.records[-1].levelno == logging.WARNING


def test_verbose_logs_the_table(caplog):
    comfy.sample(emulated(model(), verbose=True))
    assert "12 calls of scaled_dot_product_attention" in lines(caplog)[-1]


def test_a_run_that_is_stopped_is_said_and_its_error_goes_on(caplog):
    patcher = emulated(model())
    inside = patcher.get_model_object("diffusion_model").blocks[1]

    class Interrupted(Exception):
        pass

    def interrupt(*args):
        raise Interrupted

    handle = inside.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        comfy.sample(patcher)
    handle.remove()
    assert "stopped early: 2 of 2 attention calls" in lines(caplog)[-1]
    comfy.sample(patcher)
    assert "12 of 12" in lines(caplog)[-1]  # (counted from zero)


def test_a_node_behind_that_takes_the_place_is_found_out(caplog):
    patcher = emulated(model())
    patcher.set_model_optimized_attention(comfy.attention_pytorch)
    comfy.sample(patcher)
    assert "no attention call arrived: a node behind this one" in lines(caplog)[-1]
    assert caplog.records[-1].levelno == logging.WARNING


def test_calls_outside_of_a_run_are_said(caplog):
    patcher = emulated(model())
    q = torch.randn(1, 5, 32)
    options = patcher.model_options["transformer_options"]
    with torch.no_grad():
        comfy.optimized_attention(q, q, q, 2, transformer_options=options)
    comfy.sample(patcher)
    outside, line = lines(caplog)
    assert "outside of a run: 1 of 1" in outside
    assert "12 of 12" in line


def test_a_run_within_a_run_is_one(caplog):
    """ComfyUI merges wrappers, and may run one twice."""
    patcher = emulated(model())
    by_key = patcher.wrappers[comfy.WrappersMP.OUTER_SAMPLE]
    by_key["again"] = list(by_key["lowbit_attention"])
    for _ in range(2):
        caplog.clear()
        comfy.sample(patcher)
        (line,) = lines(caplog)
        assert "12 of 12 attention calls ran" in line


def test_a_clone_of_the_clone_counts_in_the_same_place():
    """Nodes behind this one clone the model, options and all."""
    patcher = emulated(model())
    twin = patcher.clone().clone()
    assert override_of(twin) is override_of(patcher)
    assert off(comfy.sample(twin), comfy.sample(model())) > 1e-4


# ---- one call


SHAPES = list(itertools.product([False, True], [False, True], [False, True], [None, 2, 3, 4]))


@pytest.mark.parametrize(("heads_first", "split", "gqa", "dims"), SHAPES)
@torch.no_grad()
def test_shapes_and_masks(heads_first, split, gqa, dims):
    """As ComfyUI's own function answers, for every shape of input, output and mask."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 20, 16, generator=g)
    k, v = (torch.randn(2, 2 if gqa else 4, 30, 16, generator=g) for _ in range(2))
    mask = {
        None: None,
        2: torch.rand(20, 30, generator=g) > 0.3,
        3: torch.randn(2, 20, 30, generator=g),
        4: torch.randn(2, 1, 20, 30, generator=g),
    }[dims]
    if not heads_first:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    options = {"mask": mask, "skip_reshape": heads_first, "skip_output_reshape": split, "scale": 0.3}
    options |= {"enable_gqa": True} if gqa else {}
    want = comfy.attention_pytorch(q, k, v, 4, **options)
    comfy.CALLS.clear()
    transformer_options = emulated(model()).model_options["transformer_options"]
    got = comfy.attention_pytorch(q, k, v, 4, transformer_options=transformer_options, **options)
    assert comfy.CALLS == []
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert 1e-4 < off(got, want) < 0.06


LEFT = {
    "low precision": ({"low_precision_attention": False}, LOW_PRECISION),
    "an argument of tomorrow": ({"is_causal": True, "window": 3}, "arguments that are not known: is_causal, window"),
    "a mask of five dimensions": ({"mask": torch.ones(1, 1, 1, 5, 5)}, "a mask that has not 2, 3 or 4 dimensions"),
    "a mask that does not fit": ({"mask": torch.ones(3, 7)}, "does not broadcast"),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("containers", [False, True])
@torch.no_grad()
def test_what_is_left_to_others_is_given_on_whole(case, containers):
    """The same arguments, once, to the previous override; its answer comes back, whatever it is."""
    options, reason = LEFT[case]
    given = []

    def previous(function, *args, **kwargs):
        given.append((function, args, kwargs))
        return "theirs"

    base = model()
    base.model_options["transformer_options"][KEY] = previous
    patcher = emulated(base)
    transformer_options = patcher.model_options["transformer_options"]
    q = torch.randn(1, 5, 32)
    qkv = [comfy.Container(q) for _ in range(3)] if containers else [q, q, q]
    out = comfy.optimized_attention(*qkv, 2, transformer_options=transformer_options, **options)
    assert out == "theirs"
    ((_, args, kwargs),) = given
    assert all(a is q for a in args[:3])
    assert {name: kwargs[name] for name in options} == options
    (told,) = override_of(patcher).report.fallbacks
    assert reason in told


@torch.no_grad()
def test_more_arguments_by_position_than_are_known():
    patcher = emulated(model())
    q = torch.randn(1, 5, 32)
    got = override_of(patcher)(lambda *args, **kwargs: len(args), q, q, q, 2, None, None, False, False, "new")
    assert got == 9
    assert "arguments that are not known" in next(iter(override_of(patcher).report.fallbacks))


def test_gradients_are_comfyuis():
    patcher = emulated(model())
    q = torch.randn(1, 5, 32, requires_grad=True)
    comfy.optimized_attention(
        q, q, q, 2, transformer_options=patcher.model_options["transformer_options"]
    ).sum().backward()
    assert q.grad.abs().sum() > 0
    assert "gradients" in next(iter(override_of(patcher).report.fallbacks))


def test_an_error_of_the_others_is_not_swallowed():
    patcher = emulated(model())
    q = torch.randn(1, 5, 32)
    with pytest.raises(RuntimeError):
        comfy.optimized_attention(
            q, torch.randn(1, 5, 30), q, 2, transformer_options=patcher.model_options["transformer_options"]
        )


def test_an_error_of_the_others_is_not_swallowed_by_a_calibration(tmp_path):
    patcher = calibrate(model(), tmp_path / "p")
    options = patcher.model_options["transformer_options"]
    block = patcher.get_model_object("diffusion_model").blocks[0]
    mask = torch.zeros(4, 7)  # (of five queries and three keys)
    with pytest.raises(RuntimeError), torch.no_grad():
        block(torch.randn(1, 5, comfy.WIDTH), torch.randn(1, 3, comfy.TEXT), mask, options)


@torch.no_grad()
def test_containers_are_used_up_once():
    """Ours: emptied. Left to a previous override that takes containers: handed on as they are, and never opened."""
    base = model()
    options = emulated(base).model_options["transformer_options"]
    q = torch.randn(1, 5, 32)
    mine = [comfy.Container(q) for _ in range(3)]
    out = comfy.optimized_attention(*mine, 2, transformer_options=options)
    assert out.shape == q.shape
    for container in mine:
        with pytest.raises(RuntimeError, match="empty"):
            container.peek()

    def previous(*args, **kwargs):
        raise AssertionError("it takes containers")

    previous.container_function = lambda *args, **kwargs: [c.take() for c in args[:3]]
    base.model_options["transformer_options"][KEY] = previous
    options = emulated(base).model_options["transformer_options"]
    theirs = [comfy.Container(q) for _ in range(3)]
    out = comfy.optimized_attention(*theirs, 2, transformer_options=options, low_precision_attention=False)
    assert all(t is q for t in out)
    nobody = [comfy.Container(q) for _ in range(3)]
    options = emulated(model()).model_options["transformer_options"]
    out = comfy.optimized_attention(*nobody, 2, transformer_options=options, low_precision_attention=False)
    assert torch.equal(out, comfy.optimized_attention(q, q, q, 2))


def test_two_nodes_one_behind_the_other(caplog):
    """The later one's window first; outside of it the earlier one runs."""
    patcher = emulated(emulated(model(), "sage2_4b"), "sage2_8b", sigma_start=5)
    comfy.sample(patcher)
    earlier, later = lines(caplog)[::-1]
    assert "4 of 4 attention calls ran in low precision (4 by emulation [sage2_4b])" in earlier
    assert "8 of 12 attention calls ran in low precision (8 by emulation [sage2_8b])" in later


# ---- the window


@pytest.mark.parametrize(("start", "end", "n"), [(10_000, 0, 12), (10, 1, 12), (9.9, 0, 8), (10_000, 2, 8), (5, 2, 4)])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_sigmas(caplog, start, end, n, one_tensor):
    comfy.sample(emulated(model(), sigma_start=start, sigma_end=end), one_tensor=one_tensor)
    (line,) = lines(caplog)
    assert f"{n} of 12 attention calls ran" in line
    assert (f"({12 - n}: {OUTSIDE})" in line) == (n < 12)


@torch.no_grad()
def test_without_a_sigma_a_window_is_shut():
    patcher = emulated(model(), sigma_start=5)
    q = torch.randn(1, 5, 32)
    out = comfy.optimized_attention(q, q, q, 2, transformer_options=patcher.model_options["transformer_options"])
    assert torch.equal(out, comfy.optimized_attention(q, q, q, 2))
    assert "no sigma" in next(iter(override_of(patcher).report.fallbacks))


def test_the_sigma_is_read_once_a_forward(monkeypatch):
    """Reading it waits for the GPU."""
    reads = []
    from lowbit_attention.integrations.comfyui import runs

    monkeypatch.setattr(runs, "sigma_of", lambda sigmas: reads.append(sigmas) or float(sigmas.max()))
    comfy.sample(emulated(model(), sigma_start=5))
    assert len(reads) == 3
    reads.clear()
    comfy.sample(emulated(model()))
    assert reads == []


# ---- policies


def policy_for(patcher, **routes):
    keys = {CallKey(f"blocks.{n}", i, s): routes[f"b{n}"] for n in (0, 1) for i in (0, 1) for s in (10.0, 4.0, 1.0)}
    return Policy(keys, RECIPES, model=Fingerprint.of(patcher.get_model_object("diffusion_model")))


@pytest.mark.parametrize("containers", [False, True])
def test_a_policy_by_layers(caplog, containers):
    patcher = model(containers=containers)
    comfy.sample(emulated(patcher, policy_for(patcher, b0="sage2_4b", b1="exact")))
    (line,) = lines(caplog)
    assert "6 of 12 attention calls ran in low precision (6 by emulation [sage2_4b])" in line
    assert f"(6: {EXACT})" in line


@pytest.mark.parametrize("together", [True, False])
def test_a_policy_by_steps_whoever_batches(caplog, together):
    """A step is a forward: whether both conditions are one forward or two depends on free memory."""
    patcher = model()
    policy = policy_for(patcher, b0="sage2_8b", b1="sage2_8b")
    first = {key: "sage2_4b" if key.timestep == 10 and key.index == 0 else r for key, r in policy.routes.items()}
    policy = Policy(first, RECIPES, model=policy.model)
    comfy.sample(emulated(patcher, policy), sigmas=(9.0, 4.0, 1.2), together=together)  # (the nearest known sigmas)
    n = 1 if together else 2
    assert f"({10 * n} by emulation [sage2_8b], {2 * n} by emulation [sage2_4b])" in lines(caplog)[-1]


def test_a_policy_of_another_model():
    patcher, other = model(), comfy.ModelPatcher(torch.nn.Linear(2, 2))
    with pytest.raises(PolicyMismatchError, match="another model"):
        apply(other, policy_for(patcher, b0="exact", b1="exact"))


@torch.no_grad()
def test_a_policy_and_a_call_from_elsewhere():
    patcher = model()
    patched = emulated(patcher, policy_for(patcher, b0="sage2_8b", b1="sage2_8b"))
    q = torch.randn(1, 5, 32)
    out = comfy.optimized_attention(q, q, q, 2, transformer_options=patched.model_options["transformer_options"])
    assert torch.equal(out, comfy.optimized_attention(q, q, q, 2))
    assert list(override_of(patched).report.fallbacks) == [NOT_OF_THE_MODEL]


# ---- calibration


@pytest.mark.parametrize("containers", [False, True])
def test_calibrate_then_generate(tmp_path, caplog, containers):
    patcher = model(containers=containers)
    want = comfy.sample(patcher)
    folder = tmp_path / "lowbit" / "tiny"
    watched = calibrate(patcher, folder, candidates=["sage2_8b", "sage2_4b"], rule=Rule(budget=0.04, mode="joint"))
    assert torch.equal(comfy.sample(watched), want)  # the picture is the exact one
    assert {p.name for p in folder.iterdir()} == {"policy.json", "report.html", "observations.json", "scores.csv"}
    first = Policy.load(folder / POLICY)
    assert {key.name for key in first.routes} == {"blocks.0", "blocks.1"}
    assert {key.timestep for key in first.routes} == {10.0, 4.0, 1.0}
    emulated_here, line, *_ = lines(caplog)
    assert "no kernel runs sage2_8b, sage2_4b for the model's first call here" in emulated_here
    assert "12 of 12 attention calls were scored" in line
    assert "written after run 1" in lines(caplog)[-1]
    comfy.sample(watched, together=False, seed=1)  # the same calls, in twice as many forwards
    assert "written after run 2" in lines(caplog)[-1]
    assert set(Policy.load(folder / POLICY).routes) == set(first.routes)
    caplog.clear()
    got = comfy.sample(emulated(patcher, Policy.load(folder / POLICY)))
    assert 1e-4 < off(got, want) < 0.05
    assert "12 of 12 attention calls ran in low precision" in lines(caplog)[-1]


def test_calibrate_writes_nothing_of_a_run_that_was_stopped(tmp_path, caplog):
    patcher = calibrate(model(), tmp_path / "p")
    handle = (
        patcher.get_model_object("diffusion_model")
        .blocks[1]
        .register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    )
    with pytest.raises(KeyboardInterrupt):
        comfy.sample(patcher)
    handle.remove()
    assert not (tmp_path / "p" / POLICY).exists()
    assert "a run was not finished; nothing is written" in lines(caplog)[-1]
    comfy.sample(patcher)
    assert (tmp_path / "p" / POLICY).exists()


def test_calibrate_without_a_call(tmp_path):
    patcher = calibrate(model(), tmp_path / "p")
    patcher.set_model_optimized_attention(comfy.attention_pytorch)
    with pytest.raises(LowbitError, match="no attention call of the diffusion model arrived"):
        comfy.sample(patcher)


def test_calibrate_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match="is a file"):
        calibrate(model(), tmp_path / "file")
    with pytest.raises(InvalidRecipeError, match="sage9"):
        calibrate(model(), tmp_path / "p", candidates=["sage9"])
    with pytest.raises(LowbitError, match="CUDA"):
        calibrate(model(), tmp_path / "p", rule=Rule(budget=0.03, cost="this"))
    with pytest.raises(InvalidArgumentError, match="candidates must be different"):
        calibrate(model(), tmp_path / "p", candidates=["exact"])


# ---- torch.compile, errors


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("policy", [False, True])
def test_a_compiled_model(caplog, policy, before):
    torch._dynamo.reset()
    patcher = model()
    recipe = policy_for(patcher, b0="sage2_8b", b1="sage2_4b") if policy else "sage2_8b"
    want = comfy.sample(emulated(patcher, recipe))
    compiled = copy.copy(patcher.model)
    compiled.diffusion_model = torch.compile(patcher.model.diffusion_model, backend="aot_eager")
    if before:
        patcher.model = compiled
    patched = emulated(patcher, recipe)
    patched.model = compiled
    got = comfy.sample(patched)
    assert off(got, want) < 1e-3
    assert "12 of 12 attention calls ran in low precision" in lines(caplog)[-1]


WRONG = [
    ({"recipe": "sage9"}, InvalidRecipeError, "sage9"),
    ({"sigma_start": 1, "sigma_end": 2}, InvalidArgumentError, "sigma_start=1 is below sigma_end=2"),
    ({"sigma_end": float("nan")}, InvalidArgumentError, "sigma_end=nan"),
    ({"sigma_start": "high"}, InvalidArgumentError, "sigma_start='high'"),
    ({"verbose": 1}, InvalidArgumentError, "verbose"),
    ({"emulate": None}, InvalidArgumentError, "emulate"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_wrong_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        apply(model(), **options)


def test_no_model_of_comfyui():
    with pytest.raises(UnsupportedError, match=r"Linear has no clone\(\)"):
        apply(torch.nn.Linear(1, 1))
    patcher = model()
    patcher.model_options["transformer_options"][KEY] = "pytorch"
    with pytest.raises(InvalidArgumentError, match="is a str, not a function"):
        apply(patcher)


def test_the_stub_is_what_it_says():
    """The stub's own attention: a mask of each number of dimensions, against torch's words."""
    q, k, v = (torch.randn(2, 4, n, 16) for n in (5, 7, 7))
    mask = torch.randn(2, 4, 5, 7)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got = comfy.attention_pytorch(q, k, v, 4, mask=mask, skip_reshape=True, skip_output_reshape=True)
    assert torch.equal(got, want)
