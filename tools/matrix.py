"""Install the built wheel into fresh environments, from the oldest declared dependencies to the newest, and use it.

python tools/matrix.py --pypi               every row that this machine has a Python for; writes docs/versions.md
python tools/matrix.py --rows lowest,newest --no-table --jobs 2     (as CI does)

An environment takes up to 9 GB, lies in --work, and goes when its row is done. What runs in it is `matrix_probe`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("matrix_probe.py")
PAGE = ROOT / "docs" / "versions.md"
JSON = ROOT / "docs" / "versions.json"
BEGIN, END = "<!-- made by tools/matrix.py -->\n", "<!-- end -->\n"
INSTALL_LIMIT, PROBE_LIMIT = 1500, 900
"""Seconds, times ``MATRIX_PATIENCE``: a CUDA build of torch is some 3 GB, and a probe takes two minutes of a core."""
OURS = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PYTHONDONTWRITEBYTECODE")
"""What an environment must not inherit. (Without its bytecode every start compiles torch's modules again: 8 s each.)"""
STEERING = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_PRE")
"""Settings of pip that change which versions there are."""
LISTED = (
    "import json; from importlib import metadata; "
    "print(json.dumps({d.metadata['Name'].replace('_', '-').lower(): d.version for d in metadata.distributions()}))"
)
SHOWN = ("torch", "numpy", "typer", "click", "rich", "packaging", "filelock", "platformdirs", "safetensors",
         "typing_extensions", "cuda-core", "nvidia-cuda-nvrtc")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One environment.

    python: ``"3.12"``, or ``""`` for this one. torch: a version, ``"lowest"`` or ``""`` for the newest that pip takes.
    lowest: every declared dependency at its floor; what those depend on is the newest that fits. cuda12: whether pip
    can resolve that extra beside this torch, ``None`` to leave it open.
    """

    name: str
    python: str = ""
    torch: str = ""
    lowest: bool = False
    extras: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    cuda12: bool | None = None


_LEFT_TO_PIP = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
"""With these at their floors pip tries every CUDA toolkit there is, for ten minutes, before it finds one that fits."""

ROWS = (
    Row("lowest", torch="lowest", lowest=True, cuda12=False),
    Row("lowest-cuda13", torch="lowest", lowest=True, extras=("cuda13",)),  # (cuda-core brings numpy)
    Row("lowest-3.10", python="3.10", torch="lowest", lowest=True),
    Row("torch-2.8", torch="2.8.0", cuda12=True),
    Row("torch-2.11", torch="2.11.0", cuda12=False),
    Row("newest", also=("numpy",)),  # ([cuda12] left open: pip would take an older torch for its sake)
    Row("newest-cuda13", extras=("cuda13", "plot"), also=("numpy",)),  # (pip may take an older torch for cuda13's sake)
    Row("newest-3.10", python="3.10"),
    Row("newest-3.12", python="3.12"),
    Row("newest-3.13", python="3.13"),
)


@dataclass
class Result:
    """What a row gave; ``skipped`` says why it did not run.

    wheel: what is in the wheel, as `digest` says it. phases: the seconds of each part.
    """

    row: str
    python: str = ""
    wheel: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[dict[str, str | bool | float]] = field(default_factory=list)
    cuda12: bool | None = None
    skipped: str = ""
    failed: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether everything did what it should."""
        return not self.failed and not self.skipped and bool(self.steps) and all(step["passed"] for step in self.steps)


class StepError(Exception):
    """A row cannot go on; the text says why."""


def find_python(version: str) -> str | None:
    """An interpreter of this minor version that runs: this one, one on PATH, or one that pyenv keeps."""
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable] if version in ("", mine) else _candidates(version)
    for candidate in candidates:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == (version or mine):
            return candidate
    return None


def _candidates(version: str) -> list[str]:
    found = [path] if (path := shutil.which(f"python{version}")) else []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted((pyenv / "versions").glob(f"{version}.*/bin/python{version}"))
    return found + [str(path) for path in kept]


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], 300)
    return next(folder.glob("*.whl"))


def digest(wheel: Path) -> str:
    """What is in a wheel, in twelve letters: its RECORD has a checksum of every file."""
    with ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/RECORD"))
        return hashlib.sha256(archive.read(name)).hexdigest()[:12]


def floors(wheel: Path, extras: Sequence[str]) -> dict[str, str]:
    """The lowest version of each dependency that the wheel declares, with these extras."""
    with ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = {}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                found[requirement.name] = specifier.version
    return found


def requirements(row: Row, wheel: Path) -> list[str]:
    """What pip is asked for."""
    extras = f"[{','.join(row.extras)}]" if row.extras else ""
    lowest = floors(wheel, row.extras)
    pins = {name: version for name, version in lowest.items() if row.lowest and name not in ("torch", *_LEFT_TO_PIP)}
    if row.torch:
        pins["torch"] = lowest["torch"] if row.torch == "lowest" else row.torch
    return [f"{wheel}{extras}", *(f"{name}=={version}" for name, version in pins.items()), *row.also]


def run_row(row: Row, wheel: Path, work: Path) -> Result:
    """Make the environment, use it, and take it away."""
    result = Result(row.name, wheel=digest(wheel))
    interpreter = find_python(row.python)
    if interpreter is None:
        result.skipped = f"no Python {row.python} here"
        return result
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{row.name}-", dir=work, ignore_cleanup_errors=True) as folder:
        try:
            _use(row, wheel, interpreter, Path(folder), result)
        except (StepError, ValueError, OSError) as error:  # (one row's trouble is not another's)
            result.failed = str(error)
    result.seconds = round(time.perf_counter() - began)
    return result


def _use(row: Row, wheel: Path, interpreter: str, folder: Path, result: Result) -> None:
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(python), "-m", "pip", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    with _timed(row, result, "environment"):
        _run([interpreter, "-m", "venv", str(folder / "env")], 120)
        _run([*pip, "install", "--upgrade", "pip>=24"], 120)  # (older ones download what --dry-run looks at)
    if row.cuda12 is not None:
        with _timed(row, result, "resolve"):
            result.cuda12 = _resolves(pip, requirements(row, wheel), wheel)
    with _timed(row, result, "install"):
        _run([*pip, "install", "--no-compile", *requirements(row, wheel)], INSTALL_LIMIT)
        _run([*pip, "check"], 120)
    found = json.loads(_run([str(python), "-c", LISTED], 120))
    names = {name.replace("_", "-").lower(): name for name in SHOWN}
    result.versions = {name: found[key] for key, name in names.items() if key in found}
    result.python = _run([str(python), "-c", "import platform; print(platform.python_version())"], 60).strip()
    with _timed(row, result, "use"):
        text = _run([str(python), *(["-P"] if _safe(result.python) else []), str(PROBE)], PROBE_LIMIT)
    result.steps = [json.loads(line) for line in text.splitlines()]
    if row.cuda12 is not None and result.cuda12 != row.cuda12:
        result.failed = f"[cuda12] {'resolves' if result.cuda12 else 'does not resolve'}: docs/versions.md says not so"


@contextmanager
def _timed(row: Row, result: Result, phase: str) -> Iterator[None]:
    print(f"{time.strftime('%H:%M:%S')} {row.name}: {phase}", flush=True)
    began = time.perf_counter()
    try:
        yield
    finally:
        result.phases[phase] = round(time.perf_counter() - began, 1)


def _safe(python: str) -> bool:
    """Whether it knows ``-P``: the script's own folder stays off the path."""
    return int(python.split(".")[1]) >= 11


def _resolves(pip: list[str], wanted: list[str], wheel: Path) -> bool:
    """Whether pip finds versions for the extra cuda12 beside the torch of ``wanted``; nothing is downloaded."""
    torch = [text for text in wanted if text.startswith("torch==")]
    try:
        _run([*pip, "install", "--dry-run", "--ignore-installed", f"{wheel}[cuda12]", *torch], 600)
    except StepError as error:
        if "ResolutionImpossible" in str(error) or "conflicting dependencies" in str(error):
            return False
        raise
    return True


def _run(command: list[str], limit: float) -> str:
    """The output of a command, or why it failed."""
    env = {name: value for name, value in os.environ.items() if name not in OURS}
    env["OMP_NUM_THREADS"] = "1"
    patience = float(env.get("MATRIX_PATIENCE", "1"))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit * patience, cwd=tempfile.gettempdir(), env=env
        )
    except subprocess.TimeoutExpired:
        raise StepError(f"{Path(command[0]).name} {' '.join(command[1:5])} took over {limit * patience:g} s") from None
    if done.returncode:
        raise StepError(f"{' '.join(command[1:6])} gave {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def table(results: Sequence[Result]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| row | Python | torch | numpy | typer, click, rich | CUDA compiler | `[cuda12]` resolves | steps | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in results:
        if r.skipped:
            yield f"| {r.row} | | | | | | | | not run: {r.skipped} |"
            continue
        v = r.versions
        front = ", ".join(v.get(name, "-") for name in ("typer", "click", "rich"))
        compiler = f"NVRTC {v['nvidia-cuda-nvrtc']}, cuda-core {v['cuda-core']}" if "cuda-core" in v else "-"
        resolves = {None: "", True: "yes", False: "no"}[r.cuda12]
        done = f"{sum(bool(step['passed']) for step in r.steps)} of {len(r.steps)}"
        verdict = "passed" if r.passed else "**failed**"
        yield (
            f"| {r.row} | {r.python} | {v.get('torch', '-')} | {v.get('numpy', '-')} | {front} | {compiler} "
            f"| {resolves} | {done} | {verdict} |"
        )


def write(results: Sequence[Result]) -> None:
    """Put the table into its page, between its marks, and everything into the JSON file beside it."""
    made = {r.row: r for r in results}
    results = [made.get(row.name, Result(row.name, skipped="the last run did not come to it")) for row in ROWS]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n".join(table(results)) + "\n" + END + after, encoding="utf-8")
    JSON.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run the rows asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help=f"of {', '.join(row.name for row in ROWS)}; all if empty")
    parser.add_argument("--work", type=Path, default=None, help="where the environments lie (the temporary folder)")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--no-table", action="store_true", help="write no files")
    parser.add_argument("--keep", action="store_true", help="take rows that are not run from the last table")
    parser.add_argument("--no-resolve", action="store_true", help="do not try which extras resolve")
    parser.add_argument("--pypi", action="store_true", help="from PyPI alone, whatever pip is set to on this machine")
    options = parser.parse_args()
    wanted = [name for name in options.rows.split(",") if name]
    if unknown := set(wanted) - {row.name for row in ROWS}:
        parser.error(f"no rows {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if not wanted or row.name in wanted]
    if options.no_resolve:
        rows = [Row(**{**asdict(row), "cuda12": None}) for row in rows]
    if options.pypi:
        _only_pypi()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder, ThreadPoolExecutor(options.jobs) as pool:
        wheel = build(Path(folder))
        for future in as_completed([pool.submit(run_row, row, wheel, Path(folder)) for row in rows]):
            results.append(future.result())
            _print(results[-1])
            if not options.no_table:  # (after each, so that an interrupted run leaves what it has)
                write(_with_earlier(results) if options.keep else results)
    return int(any(not r.passed and not r.skipped for r in results) or not any(r.passed for r in results))


def _only_pypi() -> None:
    """Leave mirrors, local wheels and version caps of this machine aside: the rows are what anybody gets."""
    for name in STEERING:
        os.environ.pop(name, None)
    os.environ["PIP_CONFIG_FILE"] = os.devnull


def _with_earlier(results: list[Result]) -> list[Result]:
    earlier = {r["row"]: Result(**r) for r in json.loads(JSON.read_text(encoding="utf-8"))} if JSON.exists() else {}
    return list((earlier | {r.row: r for r in results if not r.skipped}).values())


def _print(r: Result) -> None:
    verdict = f"skipped ({r.skipped})" if r.skipped else "passed" if r.passed else "FAILED"
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in r.phases.items())
    print(f"{r.row}: {verdict}, {r.seconds:g} s ({phases}); Python {r.python}, {r.versions}", flush=True)
    if r.failed:
        print(f"  {r.failed}")
    for step in r.steps:
        print(f"  {'ok  ' if step['passed'] else 'FAIL'} {step['seconds']:>6} s  {step['step']}: {step['note']}")


if __name__ == "__main__":
    sys.exit(main())
