"""Every command that opens a trained head says what is wrong with its files, and what to do."""

import dataclasses
import errno
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from egopatch.configs.schema import Config
from egopatch.features import StoreError
from egopatch.train.__main__ import main
from egopatch.train.explanation.explain import explain
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.predict import predict_clips
from egopatch.train.rundir import card, run_folder
from egopatch.train.rundir.results import gather, read_run
from egopatch.train.rundir.run_folder import RunError, plain
from tests.train.tiny import with_run


def ask(config: Config) -> object:
    return predict_clips(config, ["clip|P0|0|1"], "what colour is the left thing?")


@pytest.mark.parametrize("command", [evaluate, explain, ask])
def test_missing_or_mismatched_weights_are_refused_with_a_remedy(
    tiny: Config, command: Callable[[Config], object]
) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    fit(config, "x")
    command(config)
    weights = config.run.dir / "best.safetensors"
    tensors = load_file(weights)
    name, tensor = next((name, tensor) for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
    save_file(tensors | {name: tensor[:1].clone()}, weights)
    with pytest.raises(RunError) as refused:
        command(config)
    assert str(refused.value) == (
        f"{weights} does not fit the psa head that card.json beside it describes ({name} is (1, {tensor.shape[1]}), "
        f"expected {tuple(tensor.shape)}); restore both files from the same training and, for a head from "
        "outside, install its package in the version that the card names; or delete the folder and train again"
    )
    weights.unlink()
    with pytest.raises(RunError) as refused:
        command(config)
    assert str(refused.value) == (
        f"{weights}: no such file, but card.json beside it describes a head that was trained: the weights were deleted,"
        " or this folder only holds the results of a head that was trained in another one; restore the file, use the "
        "folder that the head was trained in, or delete this folder and train again"
    )


def test_the_remedy_for_a_missing_card_leads_to_a_trained_head(tiny: Config) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    with pytest.raises(RunError, match=r"card\.json: no such file; train the head first: egopatch train fit"):
        evaluate(config)
    fit(config, "x")
    card = config.run.dir / "card.json"
    card.unlink()
    for command in (lambda: fit(config, "x"), lambda: evaluate(config)):
        with pytest.raises(RunError) as refused:
            command()
        assert str(refused.value) == (
            f"{card}: no such file, but the run has finished (test.json beside it); delete the folder and train again"
        )
    shutil.rmtree(config.run.dir)
    fit(config, "x")
    assert card.exists()


def test_table_and_evaluate_give_the_same_remedy_for_a_damaged_card(tiny: Config) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    fit(config, "x")
    fit(with_run(tiny, "good", train_epochs=1), "x")
    card = config.run.dir / "card.json"
    for damage in (lambda: card.write_text(card.read_text()[:99]), lambda: card.write_text("[]"), card.unlink):
        damage()
        with pytest.raises(RunError, match=r"; delete the folder and train again$"):
            evaluate(config)
        (problem,) = gather(tiny.run.dir.parent).problems
        assert problem.startswith("psa: card.json ")
        assert problem.endswith("; delete the folder and train again")


def test_files_of_a_previously_evaluated_head_are_removed(tiny: Config) -> None:
    there = with_run(tiny, "there")
    for name in ("psa", "pooled"):
        head = with_run(tiny, name, head_name=name, train_epochs=1)
        fit(head, "x")
        evaluate(dataclasses.replace(there, head=head.head), "x", source=head.run.dir)
        assert (there.run.dir / "selection.npz").exists() == (name == "psa")


def test_heads_evaluated_elsewhere_keep_their_options_and_table_rows(tiny: Config) -> None:
    expected = {}
    for ratio, width in ((0.25, 16), (1.0, 64)):
        head = with_run(tiny, f"here/{width}", head_ratio=ratio, head_width=width, train_epochs=1, train_lr=1e-2)
        fit(head, "x")
        there = with_run(tiny, f"there/{width}", train_epochs=9)
        metrics = evaluate(there, "the command", source=head.run.dir)
        card = json.loads((there.run.dir / "card.json").read_text())
        assert (card["config"]["head"], card["config"]["train"]) == (plain(head)["head"], plain(head)["train"])
        assert (card["config"]["run"]["dir"], card["command"]) == (str(there.run.dir), "the command")
        expected[width] = metrics.all.accuracy
    rows = gather(tiny.run.dir.parent / "there").rows
    assert {row.best.options["head.width"]: row.mean("all") for row in rows} == expected


@pytest.mark.parametrize(
    ("name", "called"),
    [("fit", "fitting.fit.fit"), ("evaluate", "fitting.fit.evaluate"), ("sweep", "sweeps.sweep.run_sweep")],
)
def test_the_recorded_command_can_be_run_again(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str, called: str
) -> None:
    given: list[str] = []

    def stop(*arguments: object) -> None:
        given.extend(one for one in arguments if isinstance(one, str))
        raise RunError("enough")

    monkeypatch.setattr(f"egopatch.train.{called}", stop)
    args = [name, "--data.root", str(tiny.data.root / "own videos"), "--head.scores", "[question, prior]"]
    assert main(args) == 1
    assert [shlex.split(command) for command in given] == [["egopatch", "train", *args]]


@pytest.mark.parametrize("written", ["card.json", "test.json"])
def test_results_of_one_head_never_stand_beside_the_card_of_another(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    heads = [with_run(tiny, f"seed-{seed}", train_seed=seed, train_epochs=1) for seed in (0, 1)]
    for head in heads:
        fit(head, "x")
    out = with_run(tiny, "out")
    evaluate(out, source=heads[0].run.dir)

    def full(path: Path, content: object) -> None:
        if path.name == written:
            raise OSError(errno.ENOSPC, "no space left on device")
        write_whole(path, content)

    write_whole = run_folder.write_whole
    monkeypatch.setattr(card, "write_whole", full)
    monkeypatch.setattr(run_folder, "write_whole", full)
    with pytest.raises((OSError, StoreError)):
        evaluate(out, source=heads[1].run.dir)
    with pytest.raises(ValueError, match="not evaluated"):
        read_run(out.run.dir)
