"""The Makefile: misspelled variables and the environment that it makes."""

import shutil
from pathlib import Path

from tests.running import run

ROOT = Path(__file__).resolve().parents[1]


def test_make_refuses_a_misspelled_variable() -> None:
    done = run("make", "-n", "train", "CONIFG=configs/demo/lite.yaml", cwd=ROOT)
    assert done.returncode == 2
    assert "no target uses CONIFG; the variables are CONFIG RATIOS" in done.stderr
    assert run("make", "-n", "ablate", "RATIOS=0.1 0.5", cwd=ROOT).returncode == 0
    assert "CONFIG=configs/x.yaml" in run("make", "help", cwd=ROOT).stdout


def test_make_setup_detects_a_damaged_environment(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    kept = tmp_path / "damaged" / "kept"
    kept.parent.mkdir()
    kept.touch()
    (tmp_path / "damaged" / ".installed").touch()  # and no Python
    done = run("make", "setup", "VENV=damaged", "PYTHON=false", cwd=tmp_path)
    assert done.returncode == 2
    assert not (tmp_path / "damaged" / ".installed").exists()  # so that it would be installed again
    assert kept.exists()


def test_make_setup_reuses_an_existing_environment(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "made" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(shutil.which("true") or "")  # every check and installation succeeds
    assert run("make", "setup", "VENV=made", "PYTHON=false", cwd=tmp_path).returncode == 0
    assert run("make", "setup", "VENV=other", "PYTHON=false", cwd=tmp_path).returncode == 2
