"""Deletion and insertion curves, the pointing game, and `train explain` on a trained head."""

import json

import numpy as np
import pytest
import torch

from benchmarks.egosynth import Bench
from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets.egosynth.places import Places
from egopatch.train.__main__ import main
from egopatch.train.data.question_table import plan_batches
from egopatch.train.explanation import agreement
from egopatch.train.explanation.agreement import agreement_of, pointing
from egopatch.train.explanation.curves import area, curves
from egopatch.train.explanation.explain import explain
from egopatch.train.explanation.record import EXPLANATION, ExplanationError, read_explanation
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.heads import PSA, build_head
from egopatch.train.rundir.run_folder import load_weights
from tests.train.tiny import with_run

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def test_deletion_and_insertion_curves_match_a_hand_computed_case() -> None:
    # One frame of four patches, which give 0.4, 0.3, 0.2 and 0.1 of the probability.
    weight = torch.tensor([0.3, 0.1, 0.4, 0.2])
    falling = weight[None, None]
    deletion, insertion = curves(lambda present: (present * weight).sum((2, 3)), falling, QUARTERS)
    torch.testing.assert_close(deletion[:, 0], torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0]))
    torch.testing.assert_close(insertion[:, 0], torch.tensor([0.0, 0.4, 0.7, 0.9, 1.0]))
    # Trapezoids: (1.0/2 + 0.6 + 0.3 + 0.1 + 0.0/2) / 4 and (0.0/2 + 0.4 + 0.7 + 0.9 + 1.0/2) / 4.
    torch.testing.assert_close(area(deletion, QUARTERS), torch.tensor([0.375]))
    torch.testing.assert_close(area(insertion, QUARTERS), torch.tensor([0.625]))
    # The worst order exchanges the two.
    deletion, insertion = curves(lambda present: (present * weight).sum((2, 3)), -falling, QUARTERS)
    torch.testing.assert_close(area(deletion, QUARTERS), torch.tensor([0.625]))
    torch.testing.assert_close(area(insertion, QUARTERS), torch.tensor([0.375]))


def test_each_frame_and_question_is_ranked_alone_lowest_patch_first_on_ties() -> None:
    scores = torch.tensor([[[1.0, 0.0], [5.0, 9.0]], [[2.0, 2.0], [-torch.inf, 0.0]]])
    shown: list[torch.Tensor] = []
    curves(lambda present: shown.extend(present) or torch.zeros(6, 2), scores, (0.0, 0.5, 1.0))
    assert shown[1].tolist() == [[[False, True], [True, False]], [[False, True], [True, False]]]  # half deleted
    assert torch.equal(shown[4], ~shown[1])  # the same half inserted


def test_pointing_and_agreement_match_a_hand_computed_case() -> None:
    places = Places(
        asked=(frozenset({1}), frozenset(), frozenset({2, 3})),
        others=(frozenset({0}), frozenset({0}), frozenset({0, 2})),
    )
    assert pointing([(np.array([1, 0, 0]), places)]) == 50  # of two frames with an object asked about
    assert pointing([(np.array([0, 0, 0]), Places((frozenset(),) * 3, places.others))]) is None
    found = agreement_of([(np.array([[0, 1], [0, 1], [2, 4]]), places)], patches=8)
    assert found is not None
    assert found.asked == pytest.approx(100 * 2 / 3)  # 1 in the first frame, and 2 but not 3 in the last
    assert found.others == pytest.approx(100 * 2 / 3)  # 0 in the first two; in the last 2 is asked about
    assert (found.chance, found.precision) == (25, 50)


@pytest.fixture(scope="module")
def trained(shared_tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    run = tmp_path_factory.mktemp("explained") / "psa"
    config = with_run(shared_tiny, "psa", run_dir=run, train_epochs=10, train_lr=1e-2, head_coarse=False)
    fit(config, "egopatch train fit")
    return config


@pytest.mark.slow
def test_selection_scores_rank_the_patches_that_evaluation_keeps(trained: Config) -> None:
    experiment = open_experiment(trained)
    head = build_head(trained, experiment.sizes).eval()
    assert isinstance(head, PSA)
    head.load_state_dict(
        load_weights(trained.run.dir, json.loads((trained.run.dir / "card.json").read_text())["best_epoch"])
    )
    table = experiment.encoded["test"]
    with np.load(trained.run.dir / "selection.npz") as saved:
        kept = dict(zip(saved["question_ids"].tolist(), saved["kept"], strict=True))
    for batch in experiment.features.stream(table, plan_batches(table, 16, seed=None)):
        scores = head.patch_scores(batch)
        assert list(scores) == ["selection", "question", "saliency", "prior"]
        best = scores["selection"].topk(6, dim=-1).indices.sort().values.detach().numpy()
        for row, patches in zip(batch.rows.tolist(), best, strict=True):
            np.testing.assert_array_equal(patches, kept[table.questions[row].question_id])


@pytest.mark.slow
def test_selected_patches_matter_more_to_answers_than_random_ones(
    trained: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if the clips were EgoSynth's: in each frame patch 5 is asked about.
    known = Places((frozenset({5}),) * 2, (frozenset({0}),) * 2)
    monkeypatch.setattr(agreement, "scene_of", lambda clip: "a scene")
    monkeypatch.setattr(agreement, "places_of", lambda *_: known)
    config = str(trained.run.dir / "config.yaml")
    assert main(["explain", "--config", config, "--questions", "32"]) == 0
    assert "selection     deletion" in capsys.readouterr().out
    found = read_explanation(trained.run.dir)
    assert found is not None
    assert (found.questions, found.k, found.patches) == (32, 6, 12)
    by_name = {one.name: one for one in found.rankings}
    assert list(by_name) == ["selection", "question", "saliency", "prior", "random", "known places"]
    for one in found.rankings:
        assert one.deletion[0] == pytest.approx(one.insertion[-1], abs=1e-3)  # every patch is there
        assert one.deletion[-1] == pytest.approx(one.insertion[0], abs=1e-3)  # none is
    selection, places = by_name["selection"], by_name["known places"]
    assert selection.deletion_gap is not None
    assert selection.insertion_gap is not None
    assert selection.deletion_gap.high < 0 < selection.insertion_gap.low
    assert by_name["random"].deletion_gap is None
    assert (places.pointing, places.agreement and places.agreement.asked) == (100, 100)
    assert selection.pointing is not None
    assert selection.pointing < 50
    rows = Bench(1, [0]).explained({"folders": [trained.run.dir]})
    assert [row["ranked_by"] for row in rows] == list(by_name)
    assert rows[0]["deletion"] == pytest.approx(selection.deletion_area, abs=0.01)
    assert (rows[-1]["pointing"], rows[-1]["recall"]) == (100, 100)


@pytest.mark.slow
def test_explain_takes_heads_without_selection_and_refuses_blind_ones(trained: Config, tiny: Config) -> None:
    pooled = with_run(tiny, "pooled", head_name="pooled", train_epochs=1)
    fit(pooled, "egopatch train fit")
    found = explain(pooled, 8)
    assert [one.name for one in found.rankings] == ["saliency", "random"]
    assert {one.agreement for one in found.rankings} == {None}
    with pytest.raises(ConfigError, match="--questions is 0; expected at least 1"):
        explain(trained, 0)
    blind = with_run(tiny, "question-only", head_name="question-only", train_epochs=1)
    fit(blind, "egopatch train fit")
    with pytest.raises(ConfigError, match="which holds a question-only head; expected one that reads video"):
        explain(blind)


def test_a_damaged_explanation_file_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    assert read_explanation(folder) is None
    for text in ("{", "{}", '{"rankings": [{}], "shares": []}'):
        (folder / EXPLANATION).write_text(text)
        with pytest.raises(ExplanationError, match=r"explanation.json is damaged .*; delete it and run"):
            read_explanation(folder)
