"""The command line: what it prints, what it writes, and one clear line for wrong input."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lowbit_attention import Recipe, __version__, cli, recipe
from lowbit_attention.evaluation.ablations import ABLATIONS
from lowbit_attention.evaluation.synthetic import CHANNEL_FAMILIES


def run(capsys, *arguments):
    """Exit code, stdout and stderr of ``lowbit`` with these arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


SMALL = ("--length", "128", "--heads", "1", "--head-dim", "32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "no-such-file.pt"], "no file no-such-file.pt"),
        (["evaluate", "-f", "abnormal"], "unknown family 'abnormal'"),
        (["evaluate", "-r", "sage9"], "recipe 'sage9': unknown name"),
        (["evaluate", "-r", "sage2_8b:p_max=1000"], "p_max=1000 is above the largest e4m3 number, 448"),
        (["evaluate", "-t", "nothing"], "unknown table 'nothing'"),
        (["evaluate", "-t", "smoothing", "-r", "sage1"], "give --table or --recipe, not both"),
        (["evaluate", "--metric", "psnr"], "--metric 'psnr' is not one of"),
        (["evaluate", "--length", "0"], "--length"),
        (["evaluate", "--head-dim", "33", "-f", "normal"], "--head-dim 33"),
        (["evaluate", "--like", "sm_1"], "like='sm_1' names no machine"),
        (["demo", "-r", "sage2_8b:colour=red"], "unknown option 'colour'"),
        (["recipes", "sage9"], "unknown name"),
        (["evaluate", "--plot", "a.xyz"], "a plot ends in .png"),
        (["evaluate", "--csv", "."], ". is a folder"),
        (["evaluate", "--csv", "/dev/null/x/a.csv"], "/dev/null"),
        (["evaluate", "--seed", "-1"], "--seed"),
        (["evaluate", "x.pt", "--length", "5", "-f", "sink"], "--family, --length does nothing"),
        (["evaluate", "-f", "normal", "--layout", "NHD"], "--layout NHD"),
        (["evaluate", "-f", "normal", "--query-rows", "0"], "--query-rows"),
        (["evaluate", "-f", "normal", "--dtype", "int8"], "--dtype 'int8' is not one of float32, bfloat16, float16"),
        (["evaluate", "-f", "normal", "--fidelity", "bit"], "--fidelity 'bit' is not one of step, instruction"),
        (["evaluate", "x.pt", "--dtype", "bfloat16"], "--dtype does nothing"),
        (["evaluate", "-r", "sage2_8b:name=x"], "name is no option"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["doctor", "--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["demo", "evaluate", "recipes", "doctor", "layer by layer"]),
        (["demo"], ["three chunks of 512 tokens", "--recipe", "sage2pp_8b", "sm_90a", "About a minute"]),
        (["evaluate"], ["lowbit evaluate -f qk_bias -t smoothing", "prefix.q", "rope_bias", "granularity"]),
        (["recipes"], ["sage2_4b:smooth_q=false", "--json"]),
        (["doctor"], ["why the others cannot", "--json"]),
    ],
)
def test_help_teaches(capsys, command, taught):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    for phrase in taught:
        assert phrase in words


def test_without_a_command_the_help_is_shown(capsys):
    code, out, err = run(capsys)
    assert code == 2
    assert "evaluate" in out
    assert err == ""


def test_output_that_cannot_show_every_character_is_no_failure():
    run = subprocess.run(
        [sys.executable, "-c", "from lowbit_attention.cli import main; main(['recipes'])"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "sage2_8b" in run.stdout


def test_rows_that_see_no_key_do_not_count(capsys, tmp_path):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, generator=g) for n in (256, 64, 64))
    save_file({"q": q, "k": k, "v": v}, tmp_path / "a.safetensors")
    save_file({"q": q[:, :, 192:].clone(), "k": k, "v": v}, tmp_path / "b.safetensors")
    rmse = []
    for name in ("a", "b"):
        files = (str(tmp_path / f"{name}.safetensors"), "--csv", str(tmp_path / f"{name}.csv"))
        assert run(capsys, "evaluate", *files, "-r", "int8_fp16", "--causal")[0] == 0
        (row,) = csv.DictReader((tmp_path / f"{name}.csv").open())
        rmse.append(float(row["rmse"]))
    assert rmse[0] == pytest.approx(rmse[1], rel=0.2)  # (other tiles, other scales); with the 192 rows: half


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert __version__ in out


def test_evaluate_writes_what_it_shows(capsys, tmp_path):
    paths = {ending: tmp_path / "new" / f"out.{ending}" for ending in ("csv", "json", "png")}
    code, out, _ = run(
        capsys, "evaluate", "-f", "normal", "-f", "k_bias", "-r", "sage2_8b", "-r", "int8_fp16", *SMALL,
        "--csv", str(paths["csv"]), "--json", str(paths["json"]), "--plot", str(paths["png"]),
    )  # fmt: skip
    assert code == 0
    rows = list(csv.DictReader(paths["csv"].open()))
    assert [(r["input"], r["recipe"]) for r in rows] == [
        (i, r) for i in ("normal", "k_bias") for r in ("sage2_8b", "int8_fp16")
    ]
    for row in rows:
        assert f"{float(row['l1']):.4f}" in out
        assert 0 < float(row["l1"]) < 0.1
    document = json.loads(paths["json"].read_text())
    assert document["recipes"]["int8_fp16"]["pv_format"] == "fp16"
    assert [float(r["rmse"]) for r in rows] == [r["rmse"] for r in document["rows"]]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_evaluate_a_few_rows_of_a_long_sequence(capsys, tmp_path):
    """In bfloat16 and instruction fidelity a drifting V shows what FP16 sums over 1024 keys lose."""
    common = ("evaluate", "-f", "drift", "-r", "fast_8b:v_tile_means=false", "--length", "4096", "--query-rows", "64",
              "--heads", "2")  # fmt: skip
    found = {}
    for fidelity in ("step", "instruction"):
        options = ("--dtype", "bfloat16", "--like", "sm_90a", "--fidelity", fidelity)
        code, _, _ = run(
            capsys, *common, *options, "--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")
        )
        assert code == 0
        (row,) = csv.DictReader((tmp_path / "a.csv").open())
        assert row["shape"] == "1x2x4096x128"
        found[fidelity] = float(row["l1"])
        (same,) = json.loads((tmp_path / "a.json").read_text())["rows"]
        assert 0 < same["l1_standard_error"] == float(row["l1_standard_error"]) < 0.5 * same["l1"]
    assert found["instruction"] > 1.4 * found["step"]  # measured: .0137 and .0070


def test_evaluate_groups_of_families(capsys, tmp_path):
    arguments = ("-f", "channels", "-f", "sink", "-r", "sage2_8b", *SMALL, "--csv", str(tmp_path / "a.csv"))
    assert run(capsys, "evaluate", *arguments)[0] == 0
    assert [row["input"] for row in csv.DictReader((tmp_path / "a.csv").open())] == list(CHANNEL_FAMILIES)


@pytest.mark.parametrize("table", ABLATIONS)
def test_every_ablation_table_runs(capsys, table):
    code, out, _ = run(capsys, "evaluate", "-f", "qk_bias", "-t", table, *SMALL)
    assert code == 0
    for label in ABLATIONS[table].rows:
        assert label in out


def test_evaluate_reads_files_and_runs_what_api_runs(capsys, tmp_path):
    g = torch.Generator().manual_seed(1)
    tensors = {f"layer.{n}.{name}": torch.randn(1, 64, 2, 32, generator=g) for n in range(2) for name in "qkv"}
    save_file(tensors, tmp_path / "qkv.safetensors")
    code, out, _ = run(
        capsys, "evaluate", str(tmp_path / "qkv.safetensors"), "--layout", "NHD", "-r", "sage2_8b", "--causal",
        "--like", "sm_90a", "--metric", "cos_sim",
    )  # fmt: skip
    assert code == 0
    assert "layer.0" in out
    assert "layer.1" in out
    assert "99." in out


def test_recipes_lists_and_prints_json_that_reads_back(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert "sage2pp_8b" in out
    code, out, _ = run(capsys, "recipes", "fast_8b:v_tile_means=false", "--json")
    assert code == 0
    assert Recipe.from_json(out) == recipe("fast_8b").replace(v_tile_means=False)


def test_doctor_says_what_runs_here_and_why_not_the_rest(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["versions"]["torch"] == torch.__version__
    able = {(a["implementation"], a["recipe"]): a["reasons"] for a in report["abilities"] if a["device"] == "cpu"}
    assert able["emulation", "sage2_4b"] == []
    assert able["torch_sdpa", "exact"] == []
    assert able["torch_sdpa", "sage2_4b"] == ["it does not quantise, and recipe sage2_4b does"]
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "emulation" in out
