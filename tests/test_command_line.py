"""Help, JSON, completion and refusals of all commands."""

import contextlib
import os
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.running import run

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize(("stage", "command"), [("extract", "run"), ("train", "fit")])
@pytest.mark.parametrize("given", [None, "0"])
def test_torch_gets_huge_pages_unless_the_environment_decides(
    given: str | None, stage: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    seen: list[str | None] = []

    def load(_: str) -> SimpleNamespace:  # the first step that may import torch
        seen.append(os.environ.get("THP_MEM_ALLOC_ENABLE"))
        return SimpleNamespace(main=lambda *_: 0)

    module = import_module(f"egopatch.{stage}.__main__")
    monkeypatch.setattr(module, "load_command", load)
    assert module.main([command]) == 0
    assert seen == [given or "1"]
