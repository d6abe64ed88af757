"""A built wheel, installed in a new environment outside the checkout, runs every verb."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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


@pytest.mark.full
def test_wheel_runs_outside_the_checkout(tmp_path):
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("spectralmoe-*.whl")
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
