"""Charts are SVG with the right numbers, no text breaks out of the page's data, and the commands are in order."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from egopatch.extract.datasets import Question
from egopatch.train.report.answers import Correctness, Questions
from egopatch.train.report.sections import repeat
from egopatch.train.report.sections.charts import Bar, Line, bar_chart, heat_map, line_chart
from egopatch.train.report.sections.question_list import anchor, as_script, pairs, question_list
from egopatch.train.report.sources import Sweep
from egopatch.train.rundir.results import gather
from tests.train.fake_runs import write_run


def test_a_line_goes_through_its_points_and_ticks_are_round() -> None:
    line = Line("<b>", 0, (0, 5, 10), (20.0, 40.0, 30.0), ([18.0, 38.0, 28.0], [22.0, 42.0, 32.0]))
    level = Line("level", 1, (), [25.0], level=True)
    svg = str(line_chart("title", [line, level], "step", "loss").svg)
    path, flat = re.findall(r'<path class="line k\d" d="M([^"]*)"', svg)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    xs, ys = zip(*points)
    assert xs == (54.0, 221.0, 388.0)
    assert ys[0] > ys[2] > ys[1]  # up the page is down
    # Every point is where the scale of the ticks has its value.
    ticks = {float(text): float(y) for y, text in re.findall(r'y="([\d.]+)" dy="4" text-anchor="end">([\d.]+)<', svg)}
    low, high = min(ticks), max(ticks)
    for y, value in zip(ys, line.ys):
        expected = ticks[low] + (ticks[high] - ticks[low]) * (value - low) / (high - low)
        assert y == pytest.approx(expected, abs=0.1)
    assert low <= 18
    assert high >= 42
    first, last = (point.split() for point in flat.split("L"))
    assert (first[0], last[0], first[1]) == ("54.0", "388.0", last[1])
    assert "<b>" not in svg
    assert "&lt;b&gt;" in svg
    assert re.findall(r'text-anchor="middle">(\d+)</text>', svg) == ["0", "2", "4", "6", "8", "10"]


def test_steps_and_epochs_have_integer_ticks() -> None:
    svg = str(line_chart("t", [Line("a", 0, (0, 1, 2), (0.0, 1.0, 2.0))], "epoch", "y").svg)
    assert re.findall(r'text-anchor="middle">([\d.]+)</text>', svg) == ["0", "1", "2"]


def test_doubling_ratios_are_evenly_spaced() -> None:
    svg = str(line_chart("t", [Line("a", 0, (0.25, 0.5, 1.0), (1.0, 2.0, 3.0))], "ratio", "y", (0.25, 0.5, 1.0)).svg)
    xs = [float(x) for x in re.findall(r'<circle class="k0" cx="([\d.]+)"', svg)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])


def test_a_line_of_a_single_point_is_drawn() -> None:
    assert "nan" not in str(line_chart("t", [Line("a", 0, (3,), (5.0,))], "x", "y").svg)


@pytest.mark.parametrize(
    ("ys", "ticks"),
    [
        ((75.0, 75.0), ["73.5", "74", "74.5", "75"]),
        ((99.9, 100.0), ["98", "98.5", "99", "99.5", "100"]),
        ((0.0, 0.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((20.0, 40.0), ["20", "25", "30", "35", "40"]),
    ],
)
def test_the_axis_of_a_flat_line_spans_a_fiftieth_of_its_values(ys: tuple[float, ...], ticks: list[str]) -> None:
    svg = str(line_chart("t", [Line("a", 0, (1, 2), ys)], "epoch", "accuracy (%)").svg)
    assert re.findall(r'text-anchor="end">([\d.]+)</text>', svg) == ticks


def test_long_bar_labels_are_shortened_in_the_middle() -> None:
    labels = [f"psa (head.coarse False, train.lr 0.00{number})" for number in range(3)]
    svg = str(bar_chart("t", [Bar(label, 0, 1.0, None, []) for label in labels], "x").svg)
    shown = re.findall(r'text-anchor="end">([^<]*)<title>', svg)
    assert shown == [f"psa (head.co…ain.lr 0.00{number})" for number in range(3)]


def test_levels_of_neighbouring_colours_differ_in_their_dashes() -> None:
    assert len({Line("a", colour, (), [1.0], level=True).dashes for colour in range(2, 6)}) == 4


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 0, 20.0, None, []), Bar("b", 1, 40.0, (30.0, 50.0), [38.0, 42.0]), Bar("c", 2, 0.0, None, [])]
    svg = str(bar_chart("t", bars, "accuracy").svg)
    widths = [float(width) for width in re.findall(r'class="bar k\d" [^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.1)
    assert widths[2] == 0
    assert svg.count("whisker") == 1
    assert svg.count('class="dot"') == 2


def test_the_heat_map_orients_rows_and_columns_and_marks_chance() -> None:
    svg = str(heat_map("t", np.array([[0.0, 0.1], [0.2, 0.4]]), 0.25).svg)
    cells = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*fill-opacity="([\d.]+)"><title>row (\d), column (\d)', svg)
    assert [(row, column, opacity) for _, _, opacity, row, column in cells] == [
        ("1", "1", "0.000"), ("1", "2", "0.250"), ("2", "1", "0.500"), ("2", "2", "1.000")
    ]  # fmt: skip
    assert float(cells[1][0]) > float(cells[0][0])
    assert float(cells[2][1]) > float(cells[0][1])
    assert 'd="M237.5 ' in svg  # 50 + 300 * 0.25 / 0.4


EVIL = "</script><script>alert(1)</script> \u2028 & <!--"


def made_up() -> tuple[Questions, dict[str, Correctness]]:
    asked = [
        Question("a", "x", EVIL, "yes", "binary", ("t", "u")),
        Question("b", "x", "what?", "cup", "open", ("t",)),
        Question("c", "y", "what?", "box", "open", ()),
    ]
    by_id = {question.question_id: question for question in asked}

    def answers(*given: str) -> Correctness:
        right = {name: by_id[name].answer == answer for name, answer in zip("abc", given)}
        return Correctness(np.array([list(right.values())]), right, dict(zip("abc", given)))

    return Questions(by_id, {}), {"psa": answers("yes", "cup", "cup"), "egovlp": answers("no", "cup", "box")}


def test_question_list_holds_every_question_and_answer() -> None:
    data = question_list(*made_up())
    assert (data["systems"], data["form"], data["right"]) == (["psa", "egovlp"], "boo", ["110", "011"])
    assert [data["texts"][number] for number in data["text"]] == [EVIL, "what?", "what?"]
    assert len(data["texts"]) == len(data["clips"]) == 2
    assert [[data["answers"][number] for number in row] for row in data["given"]] == [
        ["yes", "cup", "cup"], ["no", "cup", "box"]
    ]  # fmt: skip
    assert [data["tag_sets"][number] for number in data["tags"]] == [("t", "u"), ("t",), ()]
    (pair,) = pairs(*made_up())
    assert (pair["first"], pair["second"]) == (0, 1)
    assert (pair["all"][0], pair["open"][0], pair["binary"][0]) == (0.0, -50.0, 100.0)


def test_data_cannot_close_its_script_element() -> None:
    text = as_script([question_list(*made_up())])
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text)[0]["texts"][0] == EVIL


def test_anchors_match_those_of_the_pages_script() -> None:
    # encodeURIComponent leaves A-Z a-z 0-9 - _ . ! ~ * ' ( ) as they are.
    assert anchor("direct", "a/b c|d'(1)!é") == "q/direct/a%2Fb%20c%7Cd'(1)!%C3%A9"


def test_the_recipe_encodes_each_store_once_and_has_every_command(tmp_path: Path) -> None:
    stores = {"majority": "stores/a", "psa": "stores/a", "pooled (lite)": "stores/b c"}
    for system, store in stores.items():
        card = {"fingerprint": None} if system == "majority" else {}
        write_run(tmp_path, system, model=system, config={"store": {"path": store}}, card=card)
    sweep = Sweep("ratios", "psa", "direct", (), command="egopatch train sweep --ratios 0.1")
    found = repeat.recipe(gather(tmp_path), [sweep], {tmp_path / "psa": 65})
    fit = "egopatch train fit --config configs/demo.yaml --head.name"
    assert [line.replace(str(tmp_path), "RUNS") for line in found.commands if not line.startswith("#")] == [
        "egopatch extract run --config 'RUNS/pooled (lite)/config.yaml'",
        "egopatch extract run --config RUNS/psa/config.yaml",
        f"{fit} majority",
        f"{fit} pooled (lite)",
        f"{fit} psa",
        "egopatch train sweep --ratios 0.1",
        "egopatch train explain --config RUNS/psa/config.yaml --questions 65",
        "egopatch train table --config RUNS/majority/config.yaml --run.table RUNS",
        "egopatch train report --config RUNS/majority/config.yaml --run.table RUNS",
    ]
    assert [name for name, _ in found.configs] == [f"{name}, direct, seed 0" for name in sorted(stores)]
    assert "ratio: 0.25" in found.configs[0][1]


def test_the_digest_depends_on_the_questions() -> None:
    questions, _ = made_up()
    other = Questions({"a": questions.by_id["a"], "b": questions.by_id["b"]}, {})
    assert repeat.digest(questions) == repeat.digest(made_up()[0]) != repeat.digest(other)
