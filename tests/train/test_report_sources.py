"""What the report reads beside the table: logs, sweeps, selections."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from egopatch.train.report.sources import Selection, SourceError, read_log, read_selection, read_sweep
from tests.train.fake_runs import write_run, write_sweep


def test_read_log_keeps_the_last_repeated_step_and_ignores_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"event": "step", "step": 1, "loss": 3.0, "lr": 1}\n{"event": "start"}\n'
        '{"event": "step", "step": 1, "loss": 2.0, "lr": 1}\n{"event": "step", "step": 2, "loss": NaN}\n'
        '{"event": "val", "epoch": 1, "all": 41.5}\n{"event": "st'
    )
    log = read_log(path)
    assert (log.steps, log.losses, log.epochs, log.val) == ((1,), (2.0,), (1,), (41.5,))


def test_selection_frequency_counts_kept_patches_and_checks_shapes(tmp_path: Path) -> None:
    path = tmp_path / "selection.npz"
    np.savez(path, question_ids=np.array(["a", "b"]), kept=np.array([[[0, 1]], [[1, -1]]], dtype=np.int16))
    np.testing.assert_allclose(read_selection(path).frequency(3), [0.5, 1.0, 0.0])
    np.savez(path, question_ids=np.array(["a"]), kept=np.zeros((2, 1, 1), dtype=np.int16))
    with pytest.raises(SourceError, match=r"kept \(2, 1, 1\) int16 for questions \(1,\); expected \[Q, T, k\] int16"):
        read_selection(path)
    for ids, kept in ((np.array("a"), np.zeros((1, 1, 1), np.int16)), (np.array(["a"]), np.zeros((1, 1, 1)))):
        np.savez(path, question_ids=ids, kept=kept)
        with pytest.raises(SourceError, match=r"expected \[Q, T, k\] int16 for \[Q\]; evaluate the run again"):
            read_selection(path)


def test_shared_is_the_overlap_of_patches_kept_for_one_clip() -> None:
    rows = {"a": 0, "b": 1, "c": 2, "d": 3}
    kept = np.array([[[0, 1]], [[1, 2]], [[0, 1]], [[0, 1]]], dtype=np.int16)
    selection = Selection(rows, kept)
    assert selection.shared({"a": "x", "b": "x", "c": "y", "d": "z"}, 4) == 0.5
    assert selection.shared({"a": "x", "c": "x", "d": "x"}, 4) == 1.0
    assert selection.shared({"a": "x", "b": "x", "c": "x", "d": "w"}, 4) == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert selection.shared({"a": "x", "b": "y"}, 4) is None


def test_pickled_selection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "selection.npz"
    np.savez(path, question_ids=np.array([{"a": 1}], dtype=object), kept=np.zeros((1, 1, 1)))
    with pytest.raises(SourceError, match="damaged"):
        read_selection(path)


def test_a_selection_with_a_damaged_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "selection.npz"
    kept = np.random.default_rng(0).integers(0, 9, (9, 2, 4)).astype(np.int16)
    np.savez_compressed(path, question_ids=np.arange(9).astype(str), kept=kept)
    whole = path.read_bytes()
    damaged = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_selection(path)
        except SourceError:
            damaged += 1
    assert damaged > len(whole) / 2


@pytest.mark.parametrize(
    ("name", "value"), [("ratio", 0), ("ratio", -1), ("ratio", math.nan), ("all", math.inf), ("all", 1e308)]
)
def test_a_sweep_with_an_unplottable_number_is_refused(tmp_path: Path, name: str, value: float) -> None:
    path = write_sweep(tmp_path) / "sweep.json"
    sweep = json.loads(path.read_text())
    sweep["members"][0][name] = value
    path.write_text(json.dumps(sweep))
    with pytest.raises(SourceError, match=r"is not a sweep .* expected a"):
        read_sweep(path)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e308])
def test_read_log_skips_unplottable_numbers(tmp_path: Path, value: float) -> None:
    path = tmp_path / "log.jsonl"
    events = [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate((1.0, value, 2.0))]
    events += [{"event": "val", "epoch": epoch, "all": accuracy} for epoch, accuracy in enumerate((value, 50.0))]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    log = read_log(path)
    assert (log.steps, log.losses, log.epochs, log.val) == ((0, 2), (1.0, 2.0), (1,), (50.0,))


def test_sweep_points_gather_the_seeds(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, seeds=2) / "sweep.json")
    assert sweep.settings == ("",)
    assert [(p.ratio, p.accuracies, p.mean) for p in sweep.curve("")] == [
        (0.1, (41.0, 42.0), 41.5),
        (0.25, (42.5, 43.5), 43.0),
        (1.0, (50.0, 51.0), 50.5),
    ]
    assert sweep.points[0].sd == pytest.approx(0.7071, abs=1e-4)
    assert sweep.points[0].band == (41.0, 42.0)
    assert sweep.varies_ratio


def test_a_sweep_of_an_earlier_version_takes_its_system_from_its_runs(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, seeds=1)
    assert read_sweep(path / "sweep.json").system == "psa"
    write_run(path, "r0.25_s0", model="psa (lite)")
    assert read_sweep(path / "sweep.json").system == "psa (lite)"
    value = json.loads((path / "sweep.json").read_text()) | {"system": "psa (dinov2)"}
    (path / "sweep.json").write_text(json.dumps(value))
    assert read_sweep(path / "sweep.json").system == "psa (dinov2)"


def test_a_custom_head_option_named_ratio_is_a_setting(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, seeds=1) / "sweep.json"
    value = json.loads(path.read_text())
    for run, own in zip(value["members"], (0.1, 0.5, 1.0), strict=True):
        run |= {"ratio": 0.25, "overrides": {"head.options.ratio": own, "head.options.seed": 3, "train.seed": 0}}
    value["points"] = [
        {"setting": {"head.options.ratio": 0.5, "head.options.seed": 3}, "ratio": 0.25, "all": {"low": 40, "high": 50}}
    ]
    path.write_text(json.dumps(value))
    sweep = read_sweep(path)
    assert [(point.setting, point.mean) for point in sweep.points] == [
        ("head.options.ratio 0.1, head.options.seed 3", 41.0),
        ("head.options.ratio 0.5, head.options.seed 3", 42.5),
        ("head.options.ratio 1.0, head.options.seed 3", 50.0),
    ]
    assert [point.interval for point in sweep.points] == [None, (40.0, 50.0), None]
    assert not sweep.varies_ratio
