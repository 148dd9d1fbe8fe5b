"""`--json`: standard output holds one JSON object, the command's result with its documented keys, and nothing else."""

import json
from pathlib import Path

import pytest

from egopatch.__main__ import SHORT
from egopatch.configs.schema import Config
from egopatch.train.__main__ import COMMANDS, main
from egopatch.train.commands import bench
from tests.json_keys import documented_keys
from tests.train.tiny import with_run, written


@pytest.mark.slow
def test_every_command_prints_only_its_json_result(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    file = written(config)
    seen = {"bench"}  # in a test of its own

    def result(name: str, *args: str) -> dict:
        seen.add(name)
        given = () if name == "score" else ("--config", file)
        assert main([name, *args, *given, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "{" not in err
        shown = json.loads(out)
        if name != "sweep":
            assert shown.keys() == documented_keys(name if name in SHORT else f"train {name}"), name
        return shown

    fitted = result("fit")
    assert fitted["run"] == str(config.run.dir)
    assert result("evaluate") == fitted
    table = result("table")
    assert [row["all"] for row in table["rows"]] == [round(fitted["all"]["accuracy"], 2)]
    assert Path(table["file"]).name == "table.md"
    assert Path(result("report")["file"]).name == "report.html"
    questions = tiny.data.root / "qa" / "direct" / "formatted_test_qas_encode.json"
    scored = result("score", "--questions", str(questions), "--predictions", str(config.run.dir / "predictions.jsonl"))
    assert scored["all"] == fitted["all"]
    asked = result("ask", "what colour is the left thing?")
    assert {*asked["clips"][0], "clips", "run", "encoded", "notes", "picture"} == asked.keys()
    sweep = result("sweep", "--ratios", "0.5")
    assert documented_keys("train sweep") | json.loads(Path(sweep["file"]).read_text()).keys() == sweep.keys()
    assert [member["ratio"] for member in sweep["members"]] == [0.5]
    explained = result("explain", "--questions", "4")
    assert explained == {"file": explained["file"], **json.loads(Path(explained["file"]).read_text())}
    upload = result("publish", "--to", str(tmp_path / "upload"), "--terms", "mine: CC BY 4.0")
    assert set(upload["folders"]) == {str(tmp_path / "upload" / name) for name in ("head", "store")}
    assert seen == COMMANDS.keys()


def test_bench_json_contains_the_printed_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fast.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(1)\n")
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    assert main(["bench", "--json", "fast", "--json", "2"]) == 1
    shown = capfd.readouterr()
    result = json.loads(shown.out)
    assert result == {"benchmark": "fast", "exit_code": 1, "printed": ["--json 2"]}
    assert result.keys() == documented_keys("train bench")
    assert shown.err == "--json 2\n"
    assert main(["bench", "fast", "--quick"]) == 1
    assert capfd.readouterr().out == "--quick\n"
