"""The names that the package has: `egopatch` where it is installed, short ones beside it in a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from egopatch.train.rundir.card import plain
from tests.train.tiny import with_run, write_tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "extract", "features", "train")

SAME = """
import importlib, sys
from features import open_store
from extract.encoders import load_text_encoder, load_video_encoder
from train.heads import load_head
from train.ops.select_attend import select_attend
import features.store.reader, configs.schema
import egopatch

assert egopatch.open_store is open_store
for name in ("features", "features.store.reader", "extract.encoders", "train.heads", "configs.schema"):
    assert sys.modules[name] is importlib.import_module(f"egopatch.{name}"), name
    assert sys.modules[name].__spec__.name == f"egopatch.{name}", name
    assert sys.modules[name].__name__ == f"egopatch.{name}", name
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def test_short_names_of_a_checkout_are_the_same_modules() -> None:
    done = run(sys.executable, "-W", "error", "-c", SAME, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["extract", "features", "train"])
def test_short_names_run_as_commands(package: str) -> None:
    done = run(sys.executable, "-W", "error", "-m", package, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert package in done.stdout.splitlines()[0]


def test_an_unknown_command_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    from egopatch.__main__ import main

    assert main(["fit"]) == 2
    assert "unknown command 'fit'; choose one of extract, features, train" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["train", "fti"]) == 2
    assert "'fti'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree: building in place would leave a folder behind."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS, "egopatch"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    done = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, copy, cwd=out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    done = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_wheel_has_one_top_level_name_and_every_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"egopatch"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"egopatch/{path.relative_to(ROOT)}" in names


@pytest.mark.slow
def test_installed_beside_files_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in ("train.py", "features.py", "extract.py"):
        (tmp_path / name).write_text(f"raise SystemExit('the user\\'s own {name} was run')\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "schema.py").write_text("raise SystemExit('the user\\'s own configs was read')\n")
    config = with_run(write_tiny(tmp_path, clips=24), "run", train_epochs=1)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain(config)))
    egopatch = installed / "bin" / "egopatch"

    looked = run(egopatch, "features", "verify", "store", cwd=tmp_path, path=installed)
    assert looked.returncode == 0, looked.stderr + looked.stdout
    code = "from egopatch import open_store, __file__; print(__file__, len(open_store('store').clip_ids))"
    opened = run(sys.executable, "-c", code, cwd=tmp_path, path=installed)
    assert opened.stdout.split() == [str(installed / "egopatch" / "__init__.py"), "24"], opened.stderr
    trained = run(egopatch, "train", "fit", "--config", "mine.yaml", cwd=tmp_path, path=installed)
    assert trained.returncode == 0, trained.stderr
    assert (config.run.dir / "best.safetensors").is_file()


def test_another_python_than_the_checkouts_is_one_line() -> None:
    done = run(sys.executable, "-S", "-m", "train", "fit", cwd=ROOT)  # without the installed packages
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "without the packages that egopatch needs; use .venv/bin/python, which `make setup` makes" in line


def test_a_misspelled_variable_of_make_is_refused() -> None:
    done = run("make", "-n", "train", "CONIFG=configs/demo/lite.yaml", cwd=ROOT)
    assert done.returncode == 2
    assert "no target uses CONIFG; the variables are CONFIG RATIOS" in done.stderr
    assert run("make", "-n", "ablate", "RATIOS=0.1 0.5", cwd=ROOT).returncode == 0
    assert "CONFIG=configs/x.yaml" in run("make", "help", cwd=ROOT).stdout


def test_setup_looks_at_an_environment_that_is_there(tmp_path: Path) -> None:
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
