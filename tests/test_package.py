"""The names of the package: `egopatch` when installed, and short names as well in a checkout."""

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from egopatch import __version__ as version
from egopatch.environment import require_environment
from egopatch.train.rundir.run_folder import plain
from tests.json_keys import documented_keys
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


def test_help_and_option_errors_do_not_import_slow_libraries() -> None:
    """Torch alone takes two seconds to import."""
    done = run(sys.executable, "-c", HELP_AND_TYPOS, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["extract", "features", "train"])
def test_short_names_run_as_commands(package: str) -> None:
    done = run(sys.executable, "-W", "error", "-m", package, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert package in done.stdout.splitlines()[0]


def test_an_unknown_command_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    from egopatch.__main__ import main

    assert main(["fit"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'fit'; choose one of ask, demo, doctor, extract, features, train" in error
    assert error.endswith("; did you mean train fit?\n")
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


@pytest.mark.slow
def test_every_help_text_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    from egopatch.__main__ import COMMANDS, STAGES, main

    calls = [[name] for name in COMMANDS]
    calls += [[stage, name] for stage in STAGES for name in import_module(f"egopatch.{stage}.__main__").COMMANDS]
    for call in calls:
        with contextlib.suppress(SystemExit):
            main([*call, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert 0 < len(lines) <= 50, (call, len(lines))
        assert max(map(len, lines)) <= 140, call
        assert lines[0].startswith(f"usage: egopatch {' '.join(call)} ")  # as it was typed, a short name included


@pytest.mark.parametrize(
    ("command", "usage", "shown", "needed"),
    [
        ("extract frames", "VIDEO --out FILE.npz|FOLDER [options]", "--video.frames FRAMES", "VIDEO, --out"),
        (
            "train score",
            "--questions FILE --predictions FILE [options]",
            "--text ",
            "--questions, --predictions",
        ),
        (
            "extract synth",
            "--out FOLDER [options]",
            "--clips CLIPS         number of clips, two seconds each (default",
            "--out",
        ),
    ],
)
def test_commands_without_a_config_document_their_arguments(
    capsys: pytest.CaptureFixture[str], command: str, usage: str, shown: str, needed: str
) -> None:
    from egopatch.__main__ import main

    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"usage: egopatch {command} {usage}"
    assert any(line.startswith(f"  {shown}") for line in lines)
    assert not any("config" in line.lower() or "--help-all" in line or "--head" in line for line in lines)
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert capsys.readouterr().err == f"{command}: error: missing {needed}; `egopatch {command} --help` describes it\n"


@pytest.mark.parametrize(
    "command",
    [
        "extract checkpoint convert a --out",
        "extract frames a.mp4 --out",
        "extract synth --out",
        "extract transcode --config configs/demo/lite.yaml --out",
        "features export runs/a --to npy --out",
        "train publish --config configs/demo/lite.yaml --to",
    ],
)
def test_output_url_is_refused_and_creates_no_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from egopatch.__main__ import main

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "s3://bucket/a"])
    assert "'s3://bucket/a' is a URL; expected a path on this machine" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


@pytest.mark.slow
def test_every_stage_command_has_a_json_option() -> None:
    from egopatch.__main__ import STAGES
    from egopatch.completion import _commands_of

    without = [f"{stage} {name}" for stage in STAGES for name, words in _commands_of(stage) if "--json" not in words]
    assert without == []


@pytest.mark.slow
def test_shell_completion_offers_commands_and_options() -> None:
    from egopatch.completion import script

    def complete(*words: str) -> list[str]:
        line = f'COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _egopatch; echo "${{COMPREPLY[@]}}"'
        done = run("bash", "-c", f"{text}\n{line}", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    text = script()
    assert complete("egopatch", "tr") == ["train"]
    assert complete("egopatch", "extract", "vi") == ["videos"]
    assert complete("egopatch", "extract", "run", "--video.fr") == ["--video.frames"]
    assert complete("egopatch", "ask", "--vid")[0] == "--video"
    assert complete("egopatch", "features", "verify", "--so") == ["--sources"]
    assert complete("egopatch", "train", "table", "--print") == ["--print_config"]  # not jsonargparse's --print_shtab
    assert complete("egopatch", "completion", "") == ["bash", "zsh"]
    for words in (("features", "info", ""), ("train", "fit", "--config", ""), ("ask", "--video", "")):
        assert complete("egopatch", *words) == []  # so that bash offers files


def test_demo_prints_its_results_when_it_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from egopatch import demo

    def run_here(commands: list[tuple[str, ...]]) -> int:
        print(f"$ {len(commands)} commands")
        (tmp_path / "table.json").write_text('[{"model": "psa (lite)"}]')
        return 0

    monkeypatch.setattr(demo, "_run_here", run_here)
    args = ["--small", "--out", str(tmp_path)]
    assert demo.main([*args, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result.keys() == documented_keys("demo")
    assert (result["rows"], result["report"]) == ([{"model": "psa (lite)"}], None)
    assert shown.err == "$ 5 commands\n"
    assert demo.main(args) == 0
    assert f"--run {result['run']}" in capsys.readouterr().out
    monkeypatch.setattr(demo, "_run_here", lambda commands: 130)
    assert demo.main([*args, "--json"]) == 130
    assert capsys.readouterr().out == ""


def test_demo_commands_use_known_options_and_write_to_one_folder(tmp_path: Path) -> None:
    from egopatch.configs.command_line import load_config, option_names
    from egopatch.demo import FULL, Recipe

    recipe, own = Recipe(tmp_path / "else where"), {"--out", "--clips", "--config", "--ratios", "--questions"}
    recipe.write_configs()
    for command in [*recipe.small(), *recipe.features(), *recipe.training("indirect"), *recipe.results()]:
        assert {word for word in command if word.startswith("--")} <= own | {f"--{name}" for name in option_names()}
        options = dict(itertools.pairwise(command))
        for name in {"--out", "--run.dir"} & options.keys():
            assert Path(options[name]).is_relative_to(recipe.out)
        for file in [Path(word) for word in command if word.endswith(".yaml")]:
            moved, packaged = load_config(file, []), load_config(ROOT / "configs" / "demo" / file.name, [])
            here = json.dumps(dataclasses.asdict(moved), default=str)
            assert str(FULL) not in here
            assert here.replace(str(recipe.out), str(FULL)) == json.dumps(dataclasses.asdict(packaged), default=str)
    names = {
        Path(command[command.index("--run.dir") + 1]).name
        for command in recipe.training("indirect")
        if "fit" in command
    }
    assert names == {"majority", "question-only", "psa", "egovlpv2", "egovlp", "pooled-lite", "psa-lite"}


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
