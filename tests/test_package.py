"""The names of the package: `egopatch` when installed, and short names as well in a checkout."""

import ast
import json
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from egopatch import __version__ as version
from egopatch.environment import require_environment
from egopatch.train.rundir.run_folder import plain
from tests.running import run
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


@pytest.mark.slow
def test_short_names_in_a_checkout_import_the_same_modules() -> None:
    done = run(sys.executable, "-W", "error", "-c", SAME, cwd=ROOT)
    assert done.returncode == 0, done.stderr


INTERRUPTED_IMPORT = """
import runpy, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == sys.argv[2]:
            exec("raise KeyboardInterrupt")  # as within the making of a dataclass

sys.meta_path.insert(0, Interrupting())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("egopatch", "egopatch.features.common.command_line"),
        ("extract", "egopatch.configs.command_line"),
        ("features", "egopatch.features.common.command_line"),
        ("train", "egopatch.configs.command_line"),
    ],
)
def test_interrupt_during_imports_prints_one_line(program: str, module: str) -> None:
    done = run(sys.executable, "-c", INTERRUPTED_IMPORT, program, module, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, f"{program}: interrupted; run the same command again to resume\n")


@pytest.mark.parametrize("program", ["egopatch", "train"])
def test_an_interrupt_that_an_import_drops_ends_the_program(program: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import contextlib, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'egopatch.features.common.command_line':\n"
        "            with contextlib.suppress(BaseException):\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    done = run(sys.executable, "-m", program, "--help", cwd=ROOT, path=tmp_path)
    assert (done.returncode, done.stderr) == (130, f"{program}: interrupted; run the same command again to resume\n")


@pytest.mark.parametrize(
    ("program", "command", "code"),
    [
        ("egopatch", ("extract", "run"), 75),
        ("extract", ("retry",), 75),
        ("train", ("sweep",), 75),
        ("extract", ("plan",), -signal.SIGUSR1),
        ("egopatch", ("train", "table"), -signal.SIGUSR1),
    ],
)
def test_a_schedulers_signal_during_imports_requests_a_requeue_of_jobs(
    program: str, command: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    """The exit code stays the same if the signal comes again while the program ends."""
    module = "egopatch.features.common.command_line"
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, contextlib, os, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGUSR1)\n"
        "class Signalling:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            with contextlib.suppress(BaseException):  # as some compiled libraries do\n"
        "                os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Signalling())\n"
    )
    done = run(sys.executable, "-m", program, *command, "--config", "a.yaml", cwd=ROOT, path=tmp_path)
    line = f"{program}: interrupted by SIGUSR1; run the same command again to resume\n"
    assert (done.returncode, done.stderr) == (code, line if code == 75 else "")


@pytest.mark.parametrize("program", ["egopatch", "extract"])
def test_a_schedulers_signal_at_the_end_of_a_job_keeps_its_exit_code(program: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
    )
    command = ("extract", "run") if program == "egopatch" else ("run",)
    done = run(sys.executable, "-m", program, *command, "--help", cwd=ROOT, path=tmp_path)
    assert done.returncode == 0


# Python imports it before everything else.
INTERRUPTING_SITE = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == sys.orig_argv[2] + ".__main__":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("program", ["egopatch", "extract", "features", "train"])
def test_an_interrupt_before_the_imports_is_silent(program: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING_SITE)
    done = run(sys.executable, "-m", program, cwd=ROOT, path=tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_importing_the_package_keeps_signal_handlers(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import egopatch")
    show = "import signal; raise SystemExit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    (tmp_path / "mine" / "__main__.py").write_text(show)
    for args in (("-m", "mine"), ("-c", f"import egopatch; {show}"), ("mine/__main__.py",)):
        assert run(sys.executable, *args, cwd=tmp_path).returncode == 0


def test_command_line_startup_does_not_import_numpy() -> None:
    code = "import sys, egopatch.__main__, features.common.command_line; sys.exit('numpy' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).returncode == 0


HELP_AND_TYPOS = """
import contextlib, importlib, sys
from egopatch.__main__ import STAGES, main

for stage in STAGES:
    for command in importlib.import_module(f"egopatch.{stage}.__main__").COMMANDS:
        for option in ("--help", "--typo"):
            with contextlib.suppress(SystemExit):
                main([stage, command, option])
            if slow := {"h5py", "matplotlib", "torch", "transformers", "zarr"} & sys.modules.keys():
                sys.exit(f"{stage} {command} {option} imports {slow}")
"""


@pytest.mark.slow
def test_help_and_option_errors_do_not_import_slow_libraries() -> None:
    """Torch alone takes two seconds to import."""
    done = run(sys.executable, "-c", HELP_AND_TYPOS, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["extract", "features", "train"])
def test_short_names_run_as_commands(package: str) -> None:
    done = run(sys.executable, "-W", "error", "-m", package, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert package in done.stdout.splitlines()[0]


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
def test_wheel_contains_every_file_under_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"egopatch"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"egopatch/{path.relative_to(ROOT)}" in names


@pytest.mark.slow
def test_installed_package_ignores_user_files_with_the_same_names(installed: Path, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and this one's packages from where they are."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    done = run(*install, cwd=folder)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    present = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "present.pth").write_text("".join(f"{path}\n" for path in present))
    return folder


@pytest.mark.slow
def test_installed_wheel_answers_questions_about_new_videos(environment: Path, tmp_path: Path) -> None:
    egopatch = environment / "bin" / "egopatch"

    def succeed(*args: str) -> str:
        done = run(egopatch, *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    assert succeed("--version") == f"egopatch {version}\n"
    machine = json.loads(succeed("doctor", "--json"))["machine"]
    assert not [check for check in machine if check["state"] == "error"]
    assert "next: egopatch ask --video FILE" in succeed("demo", "--small")
    (video, *_) = (tmp_path / "runs" / "demo-small" / "data" / "qa_videos").iterdir()
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(video, videos / "kitchen.mp4")
    (videos / "bad.mp4").write_bytes(b"no video")
    ask = ("ask", "--video", "videos", "what does the zebra pick up?", "--clip-seconds", "1", "--cache", "cache")
    answer = json.loads(succeed(*ask, "--json"))
    assert answer["encoded"] == 2
    assert answer["run"] == "runs/demo-small/direct/psa-lite"
    assert sorted(clip["clip_id"] for clip in answer["clips"]) == ["kitchen.mp4@0s", "kitchen.mp4@1s"]
    assert [clip["times_s"][0] >= 1 for clip in answer["clips"]] == ["1s" in c["clip_id"] for c in answer["clips"]]
    notes = "\n".join(answer["notes"])
    for expected in ("EgoSynth's rendered videos", "the words 'zebra'", "cannot be decoded, such as bad.mp4"):
        assert expected in notes
    assert (tmp_path / answer["picture"]).stat().st_size > 1000
    listed = {path.name for path in tmp_path.iterdir()}
    assert listed == {"cache", "runs", "videos"}
    second = json.loads(succeed("ask", "--video", "videos", "what is open?", *ask[4:], "--json"))
    assert second["encoded"] == 0
    assert [clip["clip_id"] for clip in second["clips"]] != []


@pytest.mark.parametrize("start", [("-m", "train", "fit"), ("-m", "egopatch"), ("-c", "from features import Store")])
def test_python_without_the_dependencies_fails_with_one_line(start: tuple[str, ...]) -> None:
    done = run(sys.executable, "-S", *start, cwd=ROOT)  # without the installed packages
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "without the packages that egopatch needs; use .venv/bin/python, which `make setup` makes" in line


def test_unsupported_python_version_fails_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [ROOT / "egopatch" / name for name in ("__init__.py", "environment.py")]
    first += [ROOT / name / "__init__.py" for name in ("configs", "extract", "train")]
    for path in first:
        ast.parse(path.read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"is Python 3\.10; expected Python 3\.11 or newer: use \.venv/bin/python, "):
        require_environment()
