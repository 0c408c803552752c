"""`lowbit tune`: from timed calls to what ``auto`` knows, with a timer that follows a rule."""

import json

import pytest
import torch
import typer

from lowbit_attention.backends.cuda import speeds
from lowbit_attention.backends.cuda.hopper import HopperAttention
from lowbit_attention.backends.cuda.mma import MmaAttention
from lowbit_attention.bench.cost_fit import sizes_of
from lowbit_attention.bench.sampling import SampleRow, TimedCall
from lowbit_attention.cli import tune
from lowbit_attention.errors import InvalidArgumentError, UnsupportedError

CARD = "NVIDIA GeForce RTX 9999"


def lowbit(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command("tune")(tune.command)
    return app(args=list(arguments), standalone_mode=False)


def rule(shape, provider):
    """Microseconds: torch's are 2 a key tile and multiprocessor, ours 1 and 25 for a call."""
    rows = 128 if provider == "torch_default" else {64: 256, 128: 192}[shape.head_dim]
    tiles = speeds.features(sizes_of(shape), rows, 100)[3]
    return 5 + 2 * tiles if provider == "torch_default" else 25 + tiles


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A card whose kernels follow the rule."""
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "cache"))
    speeds._tuned.cache_clear()
    kernel = HopperAttention()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    properties = type("Properties", (), {"multi_processor_count": 100})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tune, "device_name", lambda device: CARD)
    monkeypatch.setattr(tune, "tunable", lambda device: {"fast_8b": kernel})
    monkeypatch.setattr(tune, "_compile", lambda kernels, device: None)

    def sample(shapes, providers, settings):
        assert [p.name for p in providers] == ["torch_default", "ours:fast_8b"]
        for shape in shapes:
            rows = [SampleRow(CARD, "", "2", "", "bf16", shape.label, p.name, rule(shape, p.name)) for p in providers]
            yield TimedCall(shape, rows, [])

    monkeypatch.setattr(tune, "sample", sample)
    yield
    speeds._tuned.cache_clear()


def test_what_is_timed_is_known_afterwards(gpu, capsys, tmp_path):
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "png")}
    lowbit("--calls", "150", "--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["png"]))
    told = " ".join(capsys.readouterr().out.split())
    assert f"150 calls on {CARD}" in told
    assert "100.0% of the calls are within 3 %" in told
    assert "kept in" in told
    model = speeds._tuned(CARD)
    assert model.kernels == {"fast_8b": "attention_wgmma"}
    for length in (300, 4096, 50_000):
        call = speeds.Sizes(1, 24, 24, length, length, 128, 128)
        for name, rows, us in (("torch", 128, (5, 2)), ("fast_8b", 192, (25, 1))):
            expected = us[0] + us[1] * speeds.features(call, rows, 100)[3]
            assert model.microseconds(call, name) == pytest.approx(expected, rel=0.02)
    assert len(files["csv"].read_text().splitlines()) == 301
    document = json.loads(files["json"].read_text())
    assert document["model"]["about"]["calls"] == 150
    assert len(document["rows"]) == 300
    assert files["png"].stat().st_size > 1000
    # some 20 tiles a multiprocessor are where both are equal: 2000 in all, of 24 heads
    assert tune._pays_from(model, ("fast_8b",), 24, 128, False).startswith("2048 (")

    lowbit("--forget")
    assert "removed" in capsys.readouterr().out
    assert speeds._tuned(CARD) is None
    lowbit("--forget")
    assert f"nothing was kept for {CARD}" in capsys.readouterr().out


def test_no_keep_keeps_nothing(gpu, capsys):
    lowbit("--calls", "60", "--no-keep")
    assert "kept in" not in capsys.readouterr().out
    assert speeds._tuned(CARD) is None


def test_too_few_calls_are_no_model(gpu, monkeypatch):
    monkeypatch.setattr(tune, "sample", lambda *arguments: iter(()))
    with pytest.raises(UnsupportedError, match=r"0 calls.*60 are the least.*--seconds"):
        lowbit()
    assert speeds._tuned(CARD) is None


def test_pays_from_says_never_and_not_timed():
    flat = lambda us: {"64": {"False": (us, *[0.0] * 7)}}  # noqa: E731
    model = speeds.CardModel(
        {}, 100, {}, {"torch": {"64": 128}, "fast_8b": {"64": 128}}, {"torch": flat(1.0), "fast_8b": flat(2.0)}
    )
    assert tune._pays_from(model, ("fast_8b",), 24, 64, False) == "never"
    assert tune._pays_from(model, ("fast_8b",), 24, 128, False) == "not timed"
    assert tune._pays_from(model, ("fast_8b",), 24, 64, True) == "not timed"


def test_recipes_are_those_that_auto_may_run(monkeypatch):
    device = torch.device("cuda", 0)
    hopper, other = HopperAttention(), MmaAttention()
    monkeypatch.setattr("lowbit_attention.backends.cuda.hopper._device_reasons", lambda device: ())
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._arch", lambda device: "sm_90")
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._device_reasons", lambda device: ())
    found = tune.tunable(device, [hopper, other])
    assert found == {recipe.name: hopper for recipe in hopper.auto_recipes}
    monkeypatch.setattr("lowbit_attention.backends.cuda.hopper._device_reasons", lambda device: ("no Hopper",))
    monkeypatch.setattr(tune, "device_name", lambda device: CARD)
    with pytest.raises(UnsupportedError, match="nothing to tune") as refused:
        tune.tunable(device, [hopper, other])
    assert "no Hopper" in str(refused.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_refused(device):
    with pytest.raises(InvalidArgumentError, match="a GPU: cuda"):
        lowbit("--device", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UnsupportedError, match="finds none here"):
        lowbit()
