"""Build the sdist and the wheel into dist/, and check what is in them and that both install.

python tools/dist.py [--out dist]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lowbit_attention"
LARGEST = 576 * 1024
"""Bytes of the wheel. It is 562,000: source text alone, a seventh of it csrc, and a tenth the archive's own records.
The doors to diffusers, transformers and ComfyUI, the alias's quantisers and the cost model are 75,000 of them."""
NEEDED = (
    "py.typed", "backends/cuda/csrc/ptx/mma.cuh",
    "backends/cuda/csrc/hopper/attention.cu", "data/family_errors.json",
    "adaptive/page/report.html", "cli/__init__.py", "compat/alias.py",
)  # fmt: skip
UNWANTED = (
    "__pycache__", ".pyc", "tests/", ".hypothesis", ".cache", "_cache/", ".venv", "studies/", ".safetensors", "/out/",
)  # fmt: skip
SMOKE = """
import sys, lowbit_attention
from importlib import metadata, resources
assert metadata.version("lowbit-attention") == lowbit_attention.__version__
assert resources.files("lowbit_attention").joinpath("py.typed").is_file()
from lowbit_attention.compat import install_as_sageattention
install_as_sageattention()
"""
"""What works without torch, so that it need not be installed to see that an archive installs."""


def problems(files: Mapping[str, int], size: int) -> Iterator[str]:
    """What is wrong with a wheel of these files (name → bytes) that is ``size`` bytes itself."""
    for name in NEEDED:
        if f"{PACKAGE}/{name}" not in files:
            yield f"{PACKAGE}/{name} is missing"
    if not any(".dist-info/" in name and name.endswith("/LICENSE") for name in files):
        yield "the licence is missing"
    for name in files:
        if any(word in name for word in UNWANTED):
            yield f"{name} does not belong there"
        if not name.startswith((f"{PACKAGE}/", f"{PACKAGE}-")):
            yield f"{name} lies outside the package"
    for name in source_files() - set(files):
        yield f"{name} was left out"
    if size > LARGEST:
        biggest = sorted(files, key=lambda name: -files[name])[:5]
        yield f"{size} bytes are more than {LARGEST}; the largest files: {', '.join(biggest)}"


def source_files() -> set[str]:
    """Every file of the package that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", f"src/{PACKAGE}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.removeprefix("src/") for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def metadata_problems(text: bytes) -> Iterator[str]:
    """What is wrong with the core metadata, as an index would see it."""
    try:
        metadata = Metadata.from_email(text, validate=True)
    except Exception as error:  # (an ExceptionGroup, which Python 3.10 has not)
        yield from map(str, getattr(error, "exceptions", [error]))
        return
    if metadata.description_content_type != "text/markdown" or not metadata.description:
        yield "the README is not in the metadata, or not as Markdown"
    if not metadata.license_expression:
        yield "no licence expression"
    if metadata.requires_python is None:
        yield "no Requires-Python"


def check_wheel(path: Path) -> list[str]:
    """Everything wrong with a wheel."""
    with ZipFile(path) as archive:
        files = {info.filename: info.file_size for info in archive.infolist()}
        name = next(name for name in files if name.endswith(".dist-info/METADATA"))
        found = [*problems(files, path.stat().st_size), *metadata_problems(archive.read(name))]
    return [f"{path.name}: {problem}" for problem in found]


def check_sdist(path: Path) -> list[str]:
    """Everything wrong with an sdist."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        links = [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    found = [
        f"{name} is missing" for name in ("pyproject.toml", "README.md", "LICENSE", "PKG-INFO") if name not in names
    ]
    found += [f"src/{name} was left out" for name in source_files() if f"src/{name}" not in names]
    found += [f"{name} does not belong there" for name in names if any(word in name for word in UNWANTED)]
    found += [f"{name} is a link" for name in links]
    return [f"{path.name}: {problem}" for problem in found]


def installs(archive: Path) -> list[str]:
    """Whether an archive installs, without its dependencies, and what needs no torch works."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "env" / "bin" / "python"
        _run(sys.executable, "-m", "venv", str(Path(folder) / "env"))
        _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(archive))
        done = subprocess.run([str(python), "-I", "-c", SMOKE], capture_output=True, text=True)
        return [f"{archive.name}, installed: {done.stderr}"] if done.returncode else []


def _run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=tempfile.gettempdir())


def main() -> int:
    """Build, check, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = parser.parse_args().out.resolve()
    for old in [*out.glob("*.whl"), *out.glob("*.tar.gz")]:
        old.unlink()
    _run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))  # the sdist, and the wheel from the sdist
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    found = [*check_wheel(wheel), *check_sdist(sdist), *installs(wheel), *installs(sdist)]
    print("\n".join(found) or f"{wheel.name} ({wheel.stat().st_size} bytes) and {sdist.name} are as they should be")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
