"""`--json`: standard output holds one JSON object, the command's result, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml

from egopatch.configs.schema import Config
from egopatch.train.__main__ import main
from egopatch.train.rundir.card import plain
from tests.train.tiny import with_run


def test_stage_two_prints_its_results_alone(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(plain(config)))

    def result(*args: str) -> dict:
        assert main([*args, "--config", str(file), "--json"]) == 0
        out, err = capsys.readouterr()
        assert "{" not in err
        return json.loads(out)

    fitted = result("fit")
    assert fitted["run"] == str(config.run.dir)
    assert fitted.keys() == {"run", "open", "binary", "all", "split_tag", "tags"}
    assert result("evaluate") == fitted
    table = result("table")
    assert [row["all"] for row in table["rows"]] == [round(fitted["all"]["accuracy"], 2)]
    assert Path(table["file"]).name == "table.md"
    sweep = result("sweep", "--ratios", "0.5")
    assert Path(sweep["file"]).is_file()
    assert [member["ratio"] for member in sweep["members"]] == [0.5]
    explained = result("explain", "--questions", "4")
    assert explained == {"file": explained["file"], **json.loads(Path(explained["file"]).read_text())}
