"""`egopatch demo`: its result and its commands."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from tests.json_keys import documented_keys

ROOT = Path(__file__).resolve().parents[1]


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
    commands = [*recipe.small(), *recipe.features(), *recipe.training("indirect"), *recipe.results()]
    for command in commands:
        assert {word for word in command if word.startswith("--")} <= own | {f"--{name}" for name in option_names()}
        options = dict(itertools.pairwise(command))
        for name in {"--out", "--run.dir"} & options.keys():
            assert Path(options[name]).is_relative_to(recipe.out)
    for file in {Path(word) for command in commands for word in command if word.endswith(".yaml")}:
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
