"""`lowbit bench`."""

import json

import pytest
import torch
import typer
from bench_cases import TINY, rows

from lowbit_attention.bench import results, run
from lowbit_attention.cli import bench as cli
from lowbit_attention.errors import InvalidArgumentError
from lowbit_attention.evaluation import memory


def lowbit(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command("bench")(cli.command)
    return app(args=list(arguments), standalone_mode=False)


SMALL = ("--device", "cpu", "--shape", "1x2x64x32", "--seconds-per-shape", "0")


def test_the_command_on_a_cpu(capsys, tmp_path):
    files = {name: tmp_path / f"a.{name}" for name in ("csv", "json", "md", "png")}
    options = ["--csv", files["csv"], "--json", files["json"], "--markdown", files["md"], "--plot", files["png"]]
    names = ("-p", "torch_default", "-r", "sage2_8b", "-p", "fa3", "-p", "torch_cudnn", "-s", "1x4/2x32x32:causal")
    assert lowbit(*SMALL, *names, *map(str, options)) in (None, 0)
    out = capsys.readouterr().out
    for words in ("1x4/2x32x32:causal", "ours:sage2_8b", "torch_default", "p20–p80", "not measured: fa3", "appended 4"):
        assert words in " ".join(out.split())
    found = results.read_csv(files["csv"])
    assert {(r.shape, r.series) for r in found} == {
        (shape, series)
        for shape in ("1x2x64x32", "1x4/2x32x32:causal")
        for series in ("torch_default whole", "ours:sage2_8b whole")
    }
    document = json.loads(files["json"].read_text())
    assert len(document["rows"]) == 4
    assert {note["provider"] for note in document["notes"]} == {"fa3", "torch_cudnn"}
    assert "| 1x2x64x32 |" in files["md"].read_text()
    assert files["png"].stat().st_size > 1000
    lowbit(*SMALL, "-p", "torch_default", "--csv", str(files["csv"]))
    assert len(results.read_csv(files["csv"])) == 5


def test_the_command_with_masks(capsys, monkeypatch, tmp_path):
    shapes = ("1x2x64x32", "1x2x64x32:padding", "1x2x64x32:causal:bias")
    arguments = [word for shape in shapes for word in ("-s", shape)]
    lowbit("--device", "cpu", "--seconds-per-shape", "0", *arguments, "-p", "torch_default", "-r", "sage2_8b", "--csv",
           str(tmp_path / "a.csv"))  # fmt: skip
    out = capsys.readouterr().out
    assert all(shape in out for shape in shapes)
    found = results.read_csv(tmp_path / "a.csv")
    assert [r.shape for r in found] == [shape for shape in shapes for _ in range(2)]
    assert {r.shape for r in found if r.is_causal} == {shapes[2]}

    plain, masked = 2 * 4 * 2 * 64 * 32, 2 * 64 * 64
    monkeypatch.setattr(memory, "host_bytes", lambda: plain + masked - 1)
    lowbit("--device", "cpu", "--seconds-per-shape", "0", "-s", "1x2x64x32", "-p", "torch_default")
    with pytest.raises(InvalidArgumentError, match="the mask and the output of 1x2x64x32:bias takes"):
        lowbit("--device", "cpu", "--seconds-per-shape", "0", "-s", "1x2x64x32:bias", "-p", "torch_default")


def test_the_command_with_nothing_to_time(capsys):
    assert lowbit(*SMALL, "-p", "cudnn_fp8") == 1
    assert "not measured: cudnn_fp8: not installed" in " ".join(capsys.readouterr().out.split())


def test_what_was_measured_is_kept_when_the_run_breaks(monkeypatch, tmp_path):
    def breaks(shapes, *others):
        yield run.ShapeResult(TINY, rows())
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(cli, "run", breaks)
    files = ("--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json"))
    with pytest.raises(RuntimeError, match="illegal"):
        lowbit(*SMALL, "-p", "torch_default", *files)
    assert len(results.read_csv(tmp_path / "a.csv")) == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PyTorch sees no CUDA device to time.*--device cpu --shape"),
        (["--device", "cpu"], "on the CPU give a tiny one"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--device", "meta"], "only cuda and cpu"),
        ([*SMALL, "--dtype", "fp64"], "'fp64' is not one of bf16, fp16"),
        ([*SMALL, "--set", "huge"], "unknown set 'huge'"),
        ([*SMALL, "-s", "1x2"], "'1x2' is not batch"),
        ([*SMALL, "-p", "fa9"], "unknown provider 'fa9'"),
        ([*SMALL, "-r", "sage9"], "unknown name"),
        ([*SMALL, "--plot", "a.xyz"], "a plot ends in"),
        ([*SMALL, "--markdown", "."], "is a folder"),
        ([*SMALL, "--csv", __file__], "other columns"),
    ],
)
def test_wrong_input_is_refused_before_the_work(monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgumentError, match=words):
        lowbit(*arguments)


def test_help_teaches(capsys):
    lowbit("--help")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in ("lowbit bench --set models --csv speed.csv", "ours:<recipe>", "take turns", "tiny shapes",
                   "--set masks", "4x32x8192x128:padding", "as if the mask hid none of it"):  # fmt: skip
        assert phrase in words
