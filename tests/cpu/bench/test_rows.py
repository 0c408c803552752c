"""CSV, commit, table and picture of a run."""

import subprocess
from dataclasses import replace

import pytest
from bench_cases import rows

from lowbit_attention.bench import results
from lowbit_attention.bench.pictures import bars, markdown
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.errors import InvalidArgumentError


def test_csv_grows_and_comes_back(tmp_path):
    path, some = tmp_path / "new" / "speed.csv", rows()
    some[1] = replace(some[1], host_us=1.5, is_causal=True)
    results.append_csv(path, some[:1])
    results.append_csv(path, some[1:])
    assert results.read_csv(path) == some
    assert path.read_text().count("median_us") == 1


def test_a_csv_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("time,colour\n1,red\n")
    for work in (lambda: results.append_csv(path, rows()), lambda: results.read_csv(path)):
        with pytest.raises(InvalidArgumentError, match="has colour"):
            work()
    assert path.read_text() == "time,colour\n1,red\n"
    path.write_text(",".join(reversed(results.COLUMNS)) + "\n")
    with pytest.raises(InvalidArgumentError, match="in another order"):
        results.check_csv(path)
    path.write_text("")
    results.append_csv(path, rows())
    assert len(results.read_csv(path)) == 2
    path.write_text(path.read_text().replace("False", "perhaps"))
    with pytest.raises(InvalidArgumentError, match="line 2: 'perhaps' is neither"):
        results.read_csv(path)


def test_tops():
    assert results.tops(parse_shape("1x24x4608x128"), 296) == pytest.approx(881.5, abs=0.1)


def test_the_commit_of_a_checkout(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    file = tmp_path / "a.py"
    file.write_text("1")
    assert results.commit_of(file) == ""
    git("init", "-q")
    assert results.commit_of(file) == ""  # in a checkout, but not a part of it
    git("add", "a.py")
    git("commit", "-qm", "a")
    commit = results.commit_of(file)
    assert 7 <= len(commit) <= 12
    file.write_text("2")
    assert results.commit_of(file) == commit + "+dirty"


def test_markdown():
    a, b = rows()
    some = [
        replace(a, median_us=434.4, tops=600.7, ratio_to_cudnn=1.0),
        replace(b, median_us=9.5, tops=1003.2, ratio_to_cudnn=2.5),
        replace(a, shape="other", median_us=51.26, tops=3.14159, ratio_to_cudnn=None),
    ]
    head, _, *table = markdown(some).splitlines()
    assert "CPU" in head
    assert table == [
        "| shape | torch_cudnn whole | b kernel |",
        "|---|---:|---:|",
        "| 1x2x64x32 | 434 (601, 1.00×) | 9.50 (1003, 2.50×) |",
        "| other | 51.3 (3.14) | - |",
    ]
    assert "Nothing" in markdown([])


def test_a_plot_is_drawn(tmp_path):
    bars(tmp_path / "a.png", rows())
    assert (tmp_path / "a.png").stat().st_size > 1000
