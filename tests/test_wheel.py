"""A wheel, built from the sdist and installed in a new environment outside the checkout, runs every verb."""

import email
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import spectralmoe

ROOT = Path(__file__).parent.parent
VERBS = (
    "compare",
    "train",
    "evaluate",
    "predict",
    "adapt",
    "fewshot",
    "upcycle",
    "finetune",
    "inspect",
    "plan",
    "report",
    "list",
)


def call(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check_sdist(path: Path) -> None:
    """It holds what a package of a distribution is built and tested from."""
    with tarfile.open(path) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/spectralmoe/py.typed", "tests/test_wheel.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "build/"))]


def check_wheel(path: Path) -> None:
    """It holds the package with its types and its licence, and a description that a package index can show."""
    with zipfile.ZipFile(path) as held:
        names = held.namelist()
        inside = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        about = email.message_from_bytes(held.read(f"{inside}/METADATA"))
    assert {"spectralmoe/py.typed", f"{inside}/licenses/LICENSE"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {"spectralmoe", inside}
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert "docs/images/" not in about.get_payload()


@pytest.mark.full
def test_wheel_runs_outside_the_checkout(tmp_path):
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    version = spectralmoe.__version__
    check_sdist(tmp_path / f"spectralmoe-{version}.tar.gz")
    wheel = tmp_path / f"spectralmoe-{version}-py3-none-any.whl"
    check_wheel(wheel)
    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the rest, as installed here
    place = call(python, "-c", "import spectralmoe; print(spectralmoe.__file__)", cwd=tmp_path)
    assert str(own) in place
    tool = tmp_path / "env" / "bin" / "spectralmoe"
    for verb in VERBS:
        assert f"spectralmoe {verb}" in call(tool, verb, "--help", cwd=tmp_path)
    small = (
        "--data",
        "digits",
        "--depths",
        "1",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--trials",
        "2",
        "--routers",
        "sr-moe",
    )
    out = call(tool, "compare", *small, "--out", tmp_path / "out", cwd=tmp_path)
    assert "sr-moe" in out
    assert (tmp_path / "out" / "results.json").exists()
