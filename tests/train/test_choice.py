"""Multiple choice: every head scores the options of its questions."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from egopatch.configs.schema import Config, ConfigError, HeadConfig, TrainConfig
from egopatch.extract.datasets import load_dataset
from egopatch.extract.datasets.records import Part
from egopatch.extract.datasets.registry import _PLUGINS as DATASETS
from egopatch.features import FingerprintMismatch, create_store, open_store
from egopatch.train.data.batch import Batch, Options
from egopatch.train.explanation.explain import explain
from egopatch.train.fitting.answers import Answers, PartScorer, score_part
from egopatch.train.fitting.build_heads import build_stacked_heads
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.fit import test_line as result_line
from egopatch.train.heads.common.blind import QuestionOnly
from egopatch.train.heads.common.choice import ABSENT, Choice, LongestOption
from egopatch.train.heads.common.question import Sizes
from egopatch.train.report.page import write_report
from egopatch.train.report.sources import read_sweep
from egopatch.train.report.table import write_table
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.steps.stacked_heads import StackedHeads
from egopatch.train.sweeps.sweep import run_sweep
from tests.train import tiny as miniature
from tests.train.tiny import COLOURS, FIELDS, PLACES, with_run, write_stores, write_tiny

CLIPS = 60
BAD = "clip|P59|0|60"


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The miniature as a multiple-choice set: four options, each index right equally often, of different lengths."""
    rng = random.Random(1)
    names = [f"clip|P{i}|0|{i + 1}" for i in range(CLIPS)]
    planted = {name: {place: rng.choice(COLOURS) for place in PLACES} for name in names}
    texts = [f"what colour is the {place} thing?" for place in PLACES]
    monkeypatch.setattr(miniature, "questions_texts", lambda: [*texts, *COLOURS])
    write_stores(tmp_path / "store", planted, (BAD,), FIELDS)
    data, lines = tmp_path / "data", []
    data.mkdir()
    for number, name in enumerate(names):
        for place, text in zip(PLACES, texts, strict=True):
            right = len(lines) % len(COLOURS)
            options = [colour for colour in COLOURS if colour != planted[name][place]]
            rng.shuffle(options)
            options.insert(right, planted[name][place])
            part = "train" if number < 40 else ("val", "test")[number % 2]
            question = {"question_id": len(lines), "clip_id": name, "question": text, "part": part, "tags": [place]}
            lines.append(json.dumps({**question, "options": options, "answer_index": right}))
    (data / "questions.jsonl").write_text("\n".join(lines))
    (data / "clips.jsonl").write_text("\n".join(json.dumps({"clip_id": n, "video": "x.mp4"}) for n in names))
    config = write_tiny(tmp_path / "unused")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, name="jsonl", root=data),
        store=dataclasses.replace(config.store, path=tmp_path / "store"),
        run=dataclasses.replace(config.run, dir=tmp_path / "runs" / "psa"),
    )


def result(config: Config) -> dict:
    return json.loads((config.run.dir / "test.json").read_text())


@pytest.mark.slow
def test_psa_beats_the_blind_head_on_multiple_choice(choice: Config) -> None:
    psa = with_run(choice, "psa", train_epochs=12, train_lr=5e-3)
    blind = with_run(psa, "blind", head_name="question-only")
    fit(psa, "x")
    fit(blind, "x")
    assert result(psa)["all"]["accuracy"] > result(blind)["all"]["accuracy"] + 20
    assert result(psa)["tags"].keys() == set(PLACES)
    again = evaluate(psa)
    assert again.all.accuracy == result(psa)["all"]["accuracy"]


@pytest.mark.parametrize("name", ["majority", "longest-option", "question-only", "pooled", "attention", "psa"])
def test_every_head_answers_with_one_of_the_options(name: str, choice: Config) -> None:
    config = with_run(choice, name, head_name=name, train_epochs=1)
    fit(config, "x")
    lines = [json.loads(line) for line in (choice.data.root / "questions.jsonl").read_text().splitlines()]
    options = {str(line["question_id"]): line["options"] for line in lines if line["part"] == "test"}
    answers = {}
    for line in (config.run.dir / "predictions.jsonl").read_text().splitlines():
        record = json.loads(line)
        answers[record["question_id"]] = record["answer"]
        assert record["answer"] in options[record["question_id"]]
    assert answers.keys() == options.keys()
    seen = {q: o for q, o in options.items() if lines[int(q)]["clip_id"] != BAD}
    if name == "longest-option":
        assert all(answers[q] == max(o, key=len) for q, o in seen.items())
    if name == "majority":
        assert len({o.index(answers[q]) for q, o in options.items()}) == 1


def test_quarantined_clips_get_the_most_frequent_correct_index(choice: Config) -> None:
    path = choice.data.root / "questions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["part"] == "train" and line["question_id"] % 5:
            right = line["options"].pop(line["answer_index"])
            line["options"].insert(2, right)
            line["answer_index"] = 2
    path.write_text("\n".join(map(json.dumps, lines)))
    config = with_run(choice, "psa", train_epochs=1)
    fit(config, "x")
    given = [json.loads(line) for line in (config.run.dir / "predictions.jsonl").read_text().splitlines()]
    asked = {str(line["question_id"]): line for line in lines if line["clip_id"] == BAD}
    assert asked
    for record in given:
        if record["question_id"] in asked:
            assert record["answer"] == asked[record["question_id"]]["options"][2]
    assert result(config)["unseen"] == len(asked)


@pytest.mark.slow
def test_stacked_heads_match_a_single_head(choice: Config) -> None:
    config = with_run(choice, "psa", train_epochs=2)
    fit(config, "x")
    path = run_sweep(config, ratios=[0.25, 0.5], seeds=[0])
    stacked = json.loads((path.parent / "ratio-0.5_seed-0" / "test.json").read_text())
    assert stacked["all"] == result(config)["all"]


def withhold(config: Config, monkeypatch: pytest.MonkeyPatch, part: Part, every: int) -> Config:
    """The same set with the answer to every `every`-th question of a part withheld, as benchmarks do."""
    known = load_dataset(config.data)
    questions = tuple(
        question if number % every else dataclasses.replace(question, answer="", written=None)
        for number, question in enumerate(known.questions[part])
    )
    dataset = dataclasses.replace(known, questions={**known.questions, part: questions})
    monkeypatch.setitem(DATASETS._registered, "withheld", lambda data: dataset)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, name="withheld"))


@pytest.mark.parametrize("index", [0, 3])
def test_val_and_test_count_questions_and_options_alike(
    choice: Config, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    experiment = open_experiment(withhold(choice, monkeypatch, "val", 3))
    answers = Answers(torch.full((len(experiment.encoded["val"]),), index), None)
    expected = score_part(experiment, "val", answers)[0]
    assert expected.all.n == sum(number % 3 > 0 for number in range(40))
    found = PartScorer(experiment, "val").accuracies(answers)
    assert found == {"open": expected.open.accuracy, "binary": None, "all": expected.all.accuracy}


def test_a_duplicated_correct_option_counts_at_both_indices(choice: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_dataset(choice.data)
    twice = tuple(
        dataclasses.replace(question, options=(*question.options[:3], question.answer))
        for question in known.questions["val"]
        if question.answer in question.options[:3]
    )
    dataset = dataclasses.replace(known, questions={**known.questions, "val": twice})
    monkeypatch.setitem(DATASETS._registered, "twice", lambda data: dataset)
    config = dataclasses.replace(choice, data=dataclasses.replace(choice.data, name="twice"))
    experiment = open_experiment(config)
    answers = Answers(torch.full((len(experiment.encoded["val"]),), 3), None)
    assert score_part(experiment, "val", answers)[0].all.accuracy == 100
    assert PartScorer(experiment, "val").accuracies(answers)["all"] == 100


def test_a_val_part_without_published_answers_is_refused(choice: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = withhold(choice, monkeypatch, "val", 1)
    message = r"data has 40 val questions, but none has a published answer, so they cannot choose an epoch; use"
    with pytest.raises(RunError, match=message):
        fit(config, "x")


def test_a_sweep_counts_no_question_without_a_published_answer(choice: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_run(withhold(choice, monkeypatch, "test", 2), "psa", train_epochs=1)
    found = json.loads(run_sweep(config, ratios=[0.5], seeds=[0]).read_text())
    (run,), (point,) = found["members"], found["points"]
    assert (point["all"]["n"], point["all"]["mean"]) == (run["n"], pytest.approx(run["all"])) == (20, run["all"])


def test_a_sweep_without_any_published_answer_says_so(
    choice: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_run(withhold(choice, monkeypatch, "test", 1), "psa", train_epochs=1)
    path = run_sweep(config, ratios=[0.5], seeds=[0])
    assert (
        "  none of 40 test questions has a published answer, so there are no accuracies and no plot: the answers "
        "are in the runs' folders, also as submission.json\n"
    ) in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [(run["all"], run["n"], run["dir"]) for run in found["members"]] == [(None, 0, "ratio-0.5_seed-0")]
    assert (found["points"], found["comparisons"], found["seeds_needed"]) == ([], [], None)
    assert len(json.loads((path.parent / "ratio-0.5_seed-0" / "submission.json").read_text())) == 40
    assert not (path.parent / "sweep.png").exists()
    assert read_sweep(path).runs == ()
    fit(with_run(config, "alone"), "x")
    line = result_line(config, evaluate(with_run(config, "alone")))
    assert line.endswith("data test questions: none has a published answer, so there are no accuracies")


def test_a_report_without_any_published_answer_says_so(choice: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = withhold(choice, monkeypatch, "test", 1)
    for name in ("psa", "pooled", "majority"):
        fit(with_run(config, name, head_name=name, train_epochs=1), "x")
    page = write_report(config, config.run.dir.parent).read_text()
    assert '<strong class="big">–</strong>' in page
    assert "No examples; no test question has a published answer." in page
    assert '<script type="application/json" id="data">[]</script>' in page


class _Constant(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.sought = nn.Parameter(torch.randn(width))

    def forward(self, batch: Batch) -> Tensor:
        return self.sought.expand(len(batch), -1)


def batch_of(index: Tensor) -> Batch:
    rows = torch.arange(len(index))
    states, mask = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0)), torch.ones(6, 5, dtype=torch.bool)
    options = Options(states, mask, index, torch.where(index < 0, -1, index + 3))
    none = torch.zeros(len(index), dtype=torch.long)
    return Batch(None, None, none, states[:1], mask[:1], none, none, none, rows, options=options)


def test_scores_follow_the_options() -> None:
    torch.manual_seed(0)
    config = HeadConfig(width=8, heads=2)
    head = Choice(_Constant(8), config, Sizes(1, (1, 1), 1, 16, 16, 8, 4)).eval()
    index = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [4, 5, -1, -1]])
    logits = head(batch_of(index))
    assert torch.allclose(logits[0], logits[1].flip(0))
    assert logits[0].unique().numel() == 4
    assert (logits[2, 2:] == ABSENT).all()
    assert (logits[2, :2] > ABSENT / 2).all()
    assert LongestOption()(batch_of(index)).argmax(dim=1).tolist() == [3, 0, 1]


def test_missing_options_do_not_affect_the_contrast_loss() -> None:
    """The loss is the same with and without them; their logits would make any two questions look alike."""
    config, losses = HeadConfig(width=8, heads=2), []
    for index in (torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 2, -1], [3, 4, 5, -1]])):
        torch.manual_seed(0)
        sizes = Sizes(1, (1, 1), 1, 16, 16, 8, index.shape[1])
        head = Choice(QuestionOnly(config, sizes), config, sizes)
        batch = batch_of(index)
        states = batch.options.states
        others = tuple(dataclasses.replace(batch, states=states[row : row + 1]) for row in (2, 3))
        stack = StackedHeads([head], (0,), TrainConfig(contrast=1.0), 1, torch.device("cpu"))
        varied = dataclasses.replace(batch, variants=others)
        losses.append(stack._contrast(stack.logits(varied, 0)[0], varied, stack.tensors))
    assert torch.allclose(*losses)


def test_settings_unfit_for_multiple_choice_are_refused(choice: Config, tmp_path: Path) -> None:
    lines = (choice.data.root / "questions.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    record["options"] = [record["options"][record["answer_index"]], "another"]
    (choice.data.root / "questions.jsonl").write_text("\n".join([json.dumps(record | {"answer_index": 0}), *lines[1:]]))
    smooth = with_run(choice, "smooth", train_label_smoothing=0.1)
    with pytest.raises(Exception, match="1 question text is missing"):
        fit(smooth, "x")  # `another` was never encoded
    record["options"][1] = next(colour for colour in COLOURS if colour not in record["options"])
    (choice.data.root / "questions.jsonl").write_text("\n".join([json.dumps(record | {"answer_index": 0}), *lines[1:]]))
    experiment = open_experiment(smooth)
    with pytest.raises(
        ConfigError, match=r"label_smoothing is 0\.1, but some questions have fewer than 4 options; use 0"
    ):
        build_stacked_heads([smooth], experiment)
    fit(with_run(choice, "sharp", train_epochs=1), "x")
    assert evaluate(with_run(choice, "sharp", train_label_smoothing=0.1)).all.n  # labels are smoothed in training alone
    other = with_run(write_tiny(tmp_path / "open"), "open", head_name="longest-option")
    with pytest.raises(
        ConfigError, match=r"head\.name is longest-option, but the questions have no options; use majority"
    ):
        fit(other, "x")


def test_a_head_trained_elsewhere_is_evaluated_on_another_data_set(choice: Config, tmp_path: Path) -> None:
    """As on EgoSchema: there is no training part, and most answers are not published."""
    trained = with_run(choice, "trained", train_epochs=1)
    fit(trained, "x")
    root = tmp_path / "egoschema"
    root.mkdir()
    lines = [json.loads(line) for line in (choice.data.root / "questions.jsonl").read_text().splitlines()]
    asked = {line["clip_id"].replace("|", "_"): line for line in lines if line["clip_id"] != BAD}
    records = [
        {
            "q_uid": uid,
            "question": line["question"],
            **{f"option {n}": o for n, o in enumerate([*line["options"], "red"])},
        }
        for uid, line in asked.items()
    ]
    (root / "questions.json").write_text(json.dumps(records))
    (root / "subset_answers.json").write_text(
        json.dumps({uid: line["answer_index"] for uid, line in [*asked.items()][:9]})
    )
    store = open_store(choice.store.path)
    copy = create_store(tmp_path / "store2", store.spec, store.fingerprint, list(asked))
    for work in copy.missing_shards():
        arrays = store.read_arrays([asked[uid]["clip_id"] for uid in work.ids])
        rows = {uid: {name: rows[n] for name, rows in arrays.items()} for n, uid in enumerate(work.ids)}
        copy.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))
    shutil.copytree(tmp_path / "store" / "text", tmp_path / "store2" / "text")
    there = dataclasses.replace(
        with_run(trained, "there"),
        data=dataclasses.replace(trained.data, name="egoschema", root=root),
        store=dataclasses.replace(trained.store, path=tmp_path / "store2"),
    )
    metrics = evaluate(there, "the command", source=trained.run.dir)
    assert metrics.all.n == 9
    assert result(there)["all"]["n"] == 9
    indices = json.loads((there.run.dir / "submission.json").read_text())
    assert indices.keys() == asked.keys()
    assert set(indices.values()) <= set(range(5))
    rows = (there.run.dir / "submission.csv").read_text().splitlines()
    assert rows[0] == "q_uid,answer"
    assert len(rows) == 1 + len(asked)
    card = json.loads((there.run.dir / "card.json").read_text())
    assert card["command"] == "the command"
    assert card["config"]["data"]["root"] == str(root)
    assert card["trained_on"]["root"] == str(choice.data.root)
    assert json.loads((trained.run.dir / "card.json").read_text())["trained_on"] is None
    (root / "events.jsonl").touch()  # as EgoSynth's renderer leaves it; the head learned another set
    evaluate(there, "the command", source=trained.run.dir)
    assert json.loads((there.run.dir / "card.json").read_text())["synthetic"] is True
    (root / "events.jsonl").unlink()
    evaluate(there, "the command", source=trained.run.dir)
    (record,) = write_table(there, there.run.dir)
    assert (record["n"], record["all"]) == (9, round(metrics.all.accuracy or 0.0, 2))
    table = (there.run.dir / "table.md").read_text()
    assert f"| {metrics.all.accuracy:.2f} [" in table  # with its interval
    assert "to check" not in table
    with pytest.raises(RunError, match=r"holds a head that was trained there; use another --run.dir"):
        evaluate(trained, source=there.run.dir)
    begun = with_run(there, "begun")
    begun.run.dir.mkdir()
    (begun.run.dir / "last.pt").touch()  # of a training that was interrupted in its first epoch
    with pytest.raises(RunError, match=r"holds a head that was trained there; use another --run.dir"):
        evaluate(begun, source=trained.run.dir)
    # A refusal names the folder of the head, not the one that its results would go to.
    older = tmp_path / "older"
    shutil.copytree(trained.run.dir, older)
    card = json.loads((older / "card.json").read_text())
    for changed, message in (
        (
            {"fingerprint": card["fingerprint"] | {"depth": 1}},
            r"older was trained on features .* such as .*/older/config",
        ),
        (
            {"answers": ["<UNK0>", "<UNK1>", "cup"]},
            r"older has an answer vocabulary but the questions in .* have options;",
        ),
    ):
        (older / "card.json").write_text(json.dumps(card | changed))
        with pytest.raises((FingerprintMismatch, RunError), match=message):
            evaluate(with_run(there, "refused"), source=older)
    # Its results count neither as a run of a sweep nor as a finished training.
    elsewhere = with_run(trained, "sweeps/seeds/seed-1")
    evaluate(elsewhere, source=trained.run.dir)
    for train in (
        lambda: run_sweep(trained, seeds=[1], name="seeds"),
        lambda: fit(elsewhere, "x"),
    ):
        with pytest.raises(ConfigError, match=r"seed-1 holds results of a head that was trained elsewhere"):
            train()
    with pytest.raises(RunError, match=r"0 train, 0 val, 5[0-9] test questions; expected some of each"):
        fit(with_run(there, "untrained"), "x")


@pytest.mark.slow
def test_explain_works_on_multiple_choice(choice: Config) -> None:
    config = with_run(choice, "explained", train_epochs=1)
    fit(config, "x")
    found = explain(config, 8)
    assert found.questions >= 8
    for one in found.rankings:
        assert one.deletion[0] == pytest.approx(one.insertion[-1], abs=1e-3)
