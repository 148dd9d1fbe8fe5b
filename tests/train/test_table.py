"""The table: order, averages over seeds, exact keys, and nothing silently skipped."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.schema import Config, DataConfig
from egopatch.train.report.answers import correctness, intervals, load_questions
from egopatch.train.report.table import notices, write_table
from egopatch.train.rundir.results import TableError, gather
from egopatch.train.scores.statistics import accuracy
from tests.extract.datasets.test_released import nextqa
from tests.train.fake_runs import guesses, write_dataset, write_run, write_sweep

ROOT = Path(__file__).parents[2]
NO_ANNOTATIONS = Config(data=DataConfig(root=Path("nowhere")))
KEYS = ["model", "split", "open", "binary", "all", "n", "checkpoint", "log"]


def table_text(folder: Path, config: Config = NO_ANNOTATIONS) -> str:
    write_table(config, folder)
    return (folder / "table.md").read_text()


def test_rows_are_ordered_by_split_then_blind_published_and_ours(tmp_path: Path) -> None:
    for split in ("indirect", "direct"):
        for model in ("psa", "egovlpv2", "majority", "mfas", "question-only", "egovlp"):
            write_run(tmp_path, f"{split}_{model}", model=model, split=split)
    records = write_table(NO_ANNOTATIONS, tmp_path)
    order = ["majority", "question-only", "egovlp", "egovlpv2", "mfas", "psa"]
    assert [(r["split"], r["model"]) for r in records] == [(s, m) for s in ("direct", "indirect") for m in order]
    text = (tmp_path / "table.md").read_text()
    assert text.index("## Direct") < text.index("## Indirect")


def test_custom_data_is_titled_by_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path, "psa", config={"data": {"name": "jsonl", "root": "kitchen"}})
    text = table_text(tmp_path)
    assert "## kitchen\n" in text
    assert "Direct" not in text


def test_local_paths_are_shown_only_if_rows_mix_several_data_sets(tmp_path: Path) -> None:
    mine: dict[str, Any] = {"name": "jsonl", "root": str(tmp_path / "stores"), "questions": "mine.jsonl"}
    write_run(tmp_path, "psa", config={"data": mine})
    write_run(tmp_path, "attention", model="attention", config={"data": mine | {"questions": None}})
    text = table_text(tmp_path)
    assert "## stores/mine.jsonl, stores\n" in text or "## stores, stores/mine.jsonl\n" in text
    (line,) = [line for line in text.splitlines() if "several data sets" in line]
    folder = tmp_path / "stores"
    assert line.endswith(f"with each other: attention: {folder}; psa: {folder}/mine.jsonl.")
    write_run(tmp_path / "one", "psa", config={"data": mine})
    write_table(NO_ANNOTATIONS, tmp_path / "one")
    assert str(tmp_path) not in (tmp_path / "one" / "table.md").read_text()


def test_json_has_exactly_the_published_keys_and_relative_paths(tmp_path: Path) -> None:
    write_run(tmp_path, "a/psa", all_=48.6949, open_=38.951, binary=75.86)
    records = write_table(NO_ANNOTATIONS, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == records
    (record,) = records
    assert list(record) == KEYS
    assert record == {
        "model": "psa", "split": "direct", "open": 38.95, "binary": 75.86, "all": 48.69, "n": 1000,
        "checkpoint": "a/psa/best.safetensors", "log": "a/psa/log.jsonl",
    }  # fmt: skip


def test_markdown_has_the_published_columns_and_two_decimals(tmp_path: Path) -> None:
    write_run(tmp_path, "psa", all_=48.6, open_=39, binary=75.864)
    text = table_text(tmp_path)
    assert "| System | Open | Binary | All | Wrong form | Time to 95% | Checkpoint | Log |" in text
    links = "[best.safetensors](<psa/best.safetensors>) | [log.jsonl](<psa/log.jsonl>)"
    row = f"| psa | 39.00 | 75.86 | 48.60 | – | – | {links} |"
    assert row in text
    assert "n = 1,000 questions: 600 open, 400 binary." in text
    assert "tagged `direct`: psa 49.60" in text


def test_wrong_form_share_and_training_time_are_shown(tmp_path: Path) -> None:
    for seed, (wrong, seconds) in enumerate([(10, 4.0), (20, 30.0), (30, 5.0)]):
        run = write_run(tmp_path, f"psa_{seed}", seed=seed)
        test = json.loads((run / "test.json").read_text()) | {"wrong_form": wrong}
        (run / "test.json").write_text(json.dumps(test))
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps({"event": "converged", "step": 8, "steps": 3, "seconds": seconds}) + "\n")
    assert "| 2.0% | 5 s |" in table_text(tmp_path)


def test_seeds_are_averaged_and_the_seed_best_on_val_is_named(tmp_path: Path) -> None:
    for seed, (all_, val) in enumerate([(50.0, 40.0), (52.0, 45.0), (54.0, 41.0)]):
        write_run(tmp_path, f"psa_{seed}", seed=seed, all_=all_, val=val)
    (record,) = write_table(NO_ANNOTATIONS, tmp_path)
    assert record["all"] == 52.0
    assert record["checkpoint"] == "psa_1/best.safetensors"
    text = (tmp_path / "table.md").read_text()
    assert "| 52.00 |" in text
    assert "over 3 seeds" in text
    assert "no intervals and no examples: data.root is 'nowhere'" in text


def test_cells_show_intervals_over_seeds_and_clips(tmp_path: Path) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    for seed, every in enumerate((2, 3, 4)):
        run = write_run(tmp_path / "runs", f"psa_{seed}", seed=seed, predictions=guesses(every), all_=100 / every)
    (run / "predictions.jsonl").rename(run / "gone")
    text = table_text(tmp_path / "runs", config)
    assert "| 36.11 |" in text
    assert "predictions.jsonl" in text
    (run / "gone").rename(run / "predictions.jsonl")
    write_table(config, tmp_path / "runs")
    (row,) = gather(tmp_path / "runs").rows
    questions = load_questions(config, "direct")
    expected = accuracy(correctness(row, questions).by_seed, questions.clip_ids)
    text = (tmp_path / "runs" / "table.md").read_text()
    assert f"| 36.11 [{expected.low:.1f}, {expected.high:.1f}] |" in text
    assert "In brackets: 95% intervals over seeds and clips" in text


def test_predictions_of_every_seed_must_match_the_recorded_accuracy(tmp_path: Path) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    for seed, val in enumerate((60.0, 50.0, 40.0)):
        recorded = 50.0 if seed != 1 else 75.0
        write_run(tmp_path / "runs", f"psa_{seed}", seed=seed, val=val, predictions=guesses(2), all_=recorded)
    write_table(config, tmp_path / "runs")
    lines = [line for line in (tmp_path / "runs" / "table.md").read_text().splitlines() if "to check" in line]
    assert lines == [
        f"- Left out, or to check: {tmp_path}/runs/psa_1: predictions.jsonl gives 50.00 but test.json has 75.00; the "
        "annotations or the files have changed since; evaluate the run again"
    ]


def test_predictions_for_other_questions_are_not_to_be_edited_by_hand(tmp_path: Path) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    run = write_run(tmp_path / "runs", "psa", predictions=guesses(2), all_=50.0)
    with (run / "predictions.jsonl").open("a") as file:
        file.write('{"question_id": "new", "answer": "red"}\n')
    write_table(config, tmp_path / "runs")
    (line,) = [line for line in (tmp_path / "runs" / "table.md").read_text().splitlines() if "to check" in line]
    assert line.endswith(
        "question_id 'new' is not in the questions file; expected one of its ids; evaluate the run again, or give the "
        "config of these runs"
    )


def test_an_accuracy_that_predictions_contradict_has_no_interval(tmp_path: Path) -> None:
    """Answers that were edited may still give the recorded accuracy over all questions."""
    config = write_dataset(tmp_path / "data", videos=False)
    run = write_run(tmp_path, "psa", predictions=guesses(4), all_=25.0)
    edited = guesses(4) | {"q00": "spoon", "q01": "green"}  # a binary question wrong, an open one right
    lines = [json.dumps({"question_id": name, "answer": answer}) + "\n" for name, answer in edited.items()]
    (run / "predictions.jsonl").write_text("".join(lines))
    text = table_text(tmp_path, config)
    assert re.search(r"\| psa \| 25\.00 \| 25\.00 \| 25\.00 \[\d+\.\d, \d+\.\d\] \|", text)
    assert f"{run}: predictions.jsonl gives 31.25 on open questions but test.json has 25.00; the annotations" in text


def test_runs_on_different_features_or_training_data_get_separate_rows(tmp_path: Path) -> None:
    """For example two imported stores, whose configs differ only in the path, or `train evaluate --from`."""
    for seed in (0, 1):
        write_run(tmp_path, f"a{seed}", seed=seed)
    write_run(tmp_path, "b", seed=0, card={"fingerprint": {"depth": 6, "frames": 4, "imported": "i3d"}})
    for name in ("c", "d"):
        write_run(tmp_path, name, seed=0, card={"trained_on": {"name": "jsonl", "root": name, "split": None}})
    results = gather(tmp_path)
    assert [(row.label, len(row.runs)) for row in results.rows] == [
        ("psa", 2),
        ("psa (fingerprint.imported i3d)", 1),
        ("psa (trained_on.name jsonl, trained_on.root c)", 1),
        ("psa (trained_on.name jsonl, trained_on.root d)", 1),
    ]
    assert not [problem for problem in results.problems if "repeats" in problem]


def test_rows_differing_in_the_same_options_have_unique_labels(tmp_path: Path) -> None:
    """Intervals and answers are looked up by label."""
    config = write_dataset(tmp_path / "data", videos=False)
    half = {"head": {"ratio": 0.5}}
    for seed in (0, 1):
        write_run(tmp_path / "runs", f"a{seed}", seed=seed, predictions=guesses(3), all_=33.33)
    write_run(tmp_path / "runs", "b", config=half, predictions=guesses(2), all_=50.0)
    card = {"fingerprint": {"depth": 8, "frames": 4}}
    write_run(tmp_path / "runs", "c", config=half, card=card, predictions=guesses(4), all_=25.0)
    records = write_table(config, tmp_path / "runs")
    assert [(record["model"], record["all"]) for record in records] == [
        ("psa", 33.33),
        ("psa (head.ratio 0.5)", 50.0),
        ("psa (head.ratio 0.5, fingerprint.depth 8)", 25.0),
    ]
    table = (tmp_path / "runs" / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| psa")]
    assert [re.sub(r"\.\d\]", "]", cells[3]) for cells in rows] == [
        "33.33 [0.0, 87]",
        "50.00 [0.0, 100]",
        "25.00 [0.0, 53]",
    ]


def test_seeds_may_differ_in_tracker_and_in_equivalent_decoders(tmp_path: Path) -> None:
    for seed, decoder in enumerate(("pyav", "decord", "nvdec")):
        run = write_run(tmp_path, f"psa_{seed}", seed=seed, config={"video": {"decoder": decoder}})
        card = json.loads((run / "card.json").read_text())
        card["config"]["run"]["tracker"] = "wandb" if seed == 1 else None
        (run / "card.json").write_text(json.dumps(card))
    assert [(row.label, len(row.runs)) for row in gather(tmp_path).rows] == [
        ("psa", 2),
        ("psa (video.decoder nvdec)", 1),
    ]


def test_multiple_choice_is_also_counted_by_type(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    nextqa(root)
    tags = {"causal": {"accuracy": 100.0, "n": 1}, "CW": {"accuracy": 100.0, "n": 1}}
    for seed, wrong in enumerate(("option 0", "option 2")):
        later = {tag: {"accuracy": 100.0 * seed, "n": 1} for tag in ("temporal", "TN")}
        given = {"100_2": "option 2", "200_2": wrong}
        write_run(
            tmp_path / "runs", f"psa_{seed}", seed=seed, all_=50 + 49 * seed, n=(2, 0), tags=tags | later,
            predictions=given,
        )  # fmt: skip
    config = Config(data=DataConfig(name="nextqa", root=root))
    write_table(config, tmp_path / "runs")
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    start = lines.index("| Type | n | psa |")
    (row,) = gather(tmp_path / "runs").rows
    questions = load_questions(config, "direct")
    found = intervals(row, correctness(row, questions), questions)["tag temporal"]
    assert lines[start + 2 : start + 6][-1] == f"| temporal | 1 | 50.00 [{found.low:.1f}, {found.high:.1f}] |"
    assert [line.split(" | ")[0] for line in lines[start + 2 : start + 6]] == ["| CW", "| TN", "| causal", "| temporal"]


def test_unlike_settings_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "a", all_=50)
    write_run(tmp_path, "b", all_=60, config={"head": {"ratio": 0.5}})
    records = write_table(NO_ANNOTATIONS, tmp_path)
    assert [(r["model"], r["all"]) for r in records] == [("psa", 50.0), ("psa (head.ratio 0.5)", 60.0)]
    assert "psa on direct: several settings were run; psa (head.ratio 0.5) has a separate" in capsys.readouterr().err


def test_a_heads_own_options_distinguish_rows_one_by_one(tmp_path: Path) -> None:
    write_run(tmp_path, "a", all_=50, config={"head": {"options": {"hidden": 64, "layers": 2}}})
    write_run(tmp_path, "b", all_=60, config={"head": {"options": {"hidden": 32, "layers": 2}}})
    records = write_table(NO_ANNOTATIONS, tmp_path)
    assert [record["model"] for record in records] == ["psa", "psa (head.options.hidden 32)"]


def test_messages_name_custom_data_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"data": {"name": "jsonl", "root": "data/mine"}}
    write_run(tmp_path, "a", config=own)
    write_run(tmp_path, "b", config=own | {"head": {"ratio": 0.5}})
    write_table(NO_ANNOTATIONS, tmp_path)
    shown = capsys.readouterr().err
    assert "psa on data/mine: several settings were run" in shown
    assert "data/mine: no intervals and no examples" in shown
    assert "direct" not in shown


def test_a_repeated_seed_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "a", all_=50)
    write_run(tmp_path, "b", all_=60)
    (record,) = write_table(NO_ANNOTATIONS, tmp_path)
    assert record["all"] == 50.0
    assert "b: ignored, because it repeats seed 0 of a" in capsys.readouterr().err


def test_a_trained_run_comes_before_its_evaluation_in_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated, trained = (write_run(tmp_path, name) for name in ("a", "b"))
    for name in ("best.safetensors", "log.jsonl"):
        (evaluated / name).unlink(missing_ok=True)  # as `train evaluate --from` leaves it
        (trained / name).touch()
    write_table(NO_ANNOTATIONS, tmp_path)
    assert "(<b/best.safetensors>)" in (tmp_path / "table.md").read_text()
    assert "a: ignored, because it repeats seed 0 of b" in capsys.readouterr().err


def test_runs_on_different_data_or_questions_are_not_counted_as_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, annotations were edited in place between two seeds."""
    for seed, digest in enumerate("aab"):
        write_run(tmp_path, f"s{seed}", seed=seed, all_=50.0 + seed)
        record = {"answers": {"n": 2, "digest": "c"}, "train questions": {"n": 9, "digest": digest}}
        (tmp_path / f"s{seed}" / "questions.json").write_text(json.dumps(record))
    write_run(tmp_path, "s3", seed=3, all_=90.0, n=(600, 399))
    write_run(tmp_path, "s4", seed=4, all_=54.0)  # of an earlier version, which recorded nothing
    (record,) = write_table(NO_ANNOTATIONS, tmp_path)
    assert record["all"] == round((50 + 51 + 54) / 3, 2)
    shown = capsys.readouterr().err
    assert (
        "table: s2: ignored as a further seed of s0, because it learned from other data (different: train questions); "
        "train one of the two again\n" in shown
    )
    assert "table: s3: ignored as a further seed of s0, because it answers 999 test questions instead of 1,000" in shown


def test_runs_of_a_sweep_are_not_listed_as_rows(tmp_path: Path) -> None:
    write_run(tmp_path, "psa")
    write_sweep(tmp_path)
    write_run(tmp_path, "sweeps/ratio_direct/r0.1_s0", config={"head": {"ratio": 0.1}})
    assert len(write_table(NO_ANNOTATIONS, tmp_path)) == 1


def test_a_form_without_questions_shows_no_number(tmp_path: Path) -> None:
    write_run(tmp_path, "psa", binary=None, n=(600, 0))  # type: ignore[arg-type]
    (record,) = write_table(NO_ANNOTATIONS, tmp_path)
    assert record["binary"] is None
    assert "| psa | 40.00 | – | 50.00 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "test.json").write_text('{"open": '), "bad: test.json is damaged"),
        (
            lambda run: (run / "test.json").write_text("[]"),
            "bad: test.json is damaged (it holds a list; expected an object)",
        ),
        (lambda run: (run / "test.json").write_text("{}"), "bad: test.json is damaged"),
        (lambda run: (run / "test.json").unlink(), "bad: not evaluated (no test.json)"),
        (lambda run: (run / "card.json").unlink(), "bad: card.json is missing"),
        (
            lambda run: [(run / name).unlink() for name in ("card.json", "test.json")],
            "bad: not trained to its end (no card.json); unless it is training, run `egopatch train fit` again",
        ),
        (lambda run: (run / "card.json").write_bytes(b"\xff\xfe"), "bad: card.json is damaged"),
    ],
)
def test_damaged_runs_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str) -> None:
    write_run(tmp_path, "good", model="egovlp")
    damage(write_run(tmp_path, "bad"))
    assert [record["model"] for record in write_table(NO_ANNOTATIONS, tmp_path)] == ["egovlp"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert line.startswith("table: ")
    assert message in (tmp_path / "table.md").read_text()


def test_impossible_accuracy_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "good", model="egovlp")
    write_run(tmp_path, "bad", all_=150.0)
    (problem,) = gather(tmp_path).problems
    assert "150.0; expected a percentage" in problem


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "psa").mkdir()])
def test_a_table_without_runs_names_the_fit_command(tmp_path: Path, make) -> None:
    make(tmp_path)
    with pytest.raises(TableError, match=r"holds no finished run.*a run\.dir below it: egopatch train fit --conf"):
        write_table(NO_ANNOTATIONS, tmp_path)
    assert not (tmp_path / "table.json").exists()


def test_notices_come_from_the_cards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    options = {"encoder": {"checkpoint": "weights/EgoVLPv2.pth"}, "data": {"root": str(data)}}
    write_run(tmp_path, "psa", config=options)
    assert "random stand-ins" not in table_text(tmp_path)
    assert "synthetic" not in (tmp_path / "table.md").read_text()
    (data / "events.jsonl").touch()
    options["encoder"] = {"checkpoint": "weights/egovlp-random.pth"}
    write_run(tmp_path, "egovlp", model="egovlp", config=options)
    text = table_text(tmp_path)
    assert "are random stand-ins" in text
    assert "synthetic (EgoSynth)" in text


def test_a_card_may_state_a_notice(tmp_path: Path) -> None:
    write_run(tmp_path, "psa", card={"notice": "random-weight stand-in encoder; synthetic set EgoSynth"})
    assert len(notices(gather(tmp_path))) == 2


def test_uneven_question_counts_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, "a", model="egovlp", n=(500, 400))
    write_run(tmp_path, "b", n=(600, 400))
    assert "Rows count different questions: egovlp n = 900" in table_text(tmp_path)


def test_model_names_cannot_break_the_table(tmp_path: Path) -> None:
    write_run(tmp_path, "a", model="x|<b>")
    assert "| x\\|&lt;b> |" in table_text(tmp_path)


def test_questions_about_quarantined_clips_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path, "psa")
    assert "quarantined" not in table_text(tmp_path)
    test = json.loads((run / "test.json").read_text())
    for count, line in ((7, "Up to 7 test questions are about"), (1, "Up to 1 test question is about")):
        (run / "test.json").write_text(json.dumps(test | {"unseen": count}))
        assert f"{line} quarantined clips" in table_text(tmp_path)


def test_a_closed_output_pipe_is_not_an_error(tmp_path: Path) -> None:
    for seed in range(200):  # more than a pipe holds
        write_run(tmp_path, f"psa_{seed}", config={"head": {"ratio": 0.001 * (seed + 1)}})
    table = shlex.join([sys.executable, "-m", "train", "table", "--run.table", str(tmp_path)])
    done = subprocess.run(f"{table} | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "# Results\n"
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_the_table_command_does_not_import_torch(tmp_path: Path) -> None:
    """Importing torch takes four times as long as the whole table."""
    write_run(tmp_path, "psa")
    program = (
        "from egopatch.train.__main__ import main; import sys; code = main(sys.argv[1:]); print(code, *sys.modules)"
    )
    command = [sys.executable, "-c", program, "table", "--run.table", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code, *names = out.splitlines()[-1].split()
    assert code == "0"
    assert "egopatch.train.report.table" in names
    assert "torch" not in names
