"""The report in headless Chromium: it opens without an error, fits a phone, and its controls do what they say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from egopatch.train.explanation.agreement import Agreement
from egopatch.train.explanation.record import Explanation, Ranking
from egopatch.train.report.page import write_report
from egopatch.train.scores.statistics import Interval
from tests.train.browser import CHROMIUM, Browser, browser
from tests.train.fake_runs import COLOURS, guesses, kept_patches, score, write_dataset, write_run, write_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome"),
]

QUESTIONS, SYSTEMS = 20_000, ("majority", "question-only", "egovlpv2", "pooled", "psa")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    config = write_dataset(root / "data")
    for index, system in enumerate(("majority", "question-only", "egovlp", "psa")):
        kept, tags = kept_patches() if system == "psa" else None, {"counterfactual": score(50.0, 12)}
        write_run(root / "runs", system, model=system, predictions=guesses(6 - index), kept=kept, tags=tags)
    sweep = write_sweep(root / "runs")
    for ratio, k in ((0.1, 5), (1.0, 49)):
        write_run(sweep, f"r{ratio}_s0", predictions=guesses(3), kept=kept_patches(k=k))
    fall, rise = (60.0, 45.0, 35.0), (35.0, 50.0, 60.0)
    looks = Agreement(50.0, 40.0, 26.5, 4.0)
    rankings = (
        Ranking("selection", fall, rise, Interval(-9.0, -12.0, -6.0), Interval(8.0, 5.0, 11.0), looks, 14.0),
        Ranking("random", rise[::-1], fall[::-1], None, None, looks, 2.0),
    )
    Explanation(200, 13, 49, (0.0, 0.5, 1.0), rankings).write(root / "runs/psa")
    return write_report(config, root / "runs")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up answers of five systems to 20,000 questions, without pictures."""
    root = tmp_path_factory.mktemp("large")
    config = write_dataset(root / "data", clips=2500, questions=QUESTIONS, videos=False)
    rng = np.random.default_rng(0)
    truth = {f"q{i:02d}": "yes" if i % 3 == 0 else COLOURS[i % 4] for i in range(QUESTIONS)}
    for place, system in enumerate(SYSTEMS):
        right = rng.random(QUESTIONS) < 0.3 + 0.03 * place
        given = {name: answer if hit else COLOURS[place % 4] for (name, answer), hit in zip(truth.items(), right)}
        write_run(root / "runs", system, model=system, predictions=given)
    return write_report(config, root / "runs")


@pytest.fixture(autouse=True)
def faultless(tab: Browser) -> Iterator[None]:
    """Every test ends without a console error, and nothing has left the page."""
    tab.problems.clear()
    tab.requests.clear()
    tab.media()
    yield
    assert tab.problems == []
    assert [url for url in tab.requests if not url.startswith(("file://", "data:"))] == []


def visible(tab: Browser, selector: str) -> int:
    return int(
        tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility()).length")
    )


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window_and_is_readable(
    page: Path, tab: Browser, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    tab.media(scheme=scheme)
    tab.open(page, width=width, height=height)
    assert tab.run("document.documentElement.scrollWidth") == width
    # Whatever is wider than the window scrolls inside its own frame.
    assert (
        tab.run(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, nav, svg, .frames, details')"
            " && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        == []
    )
    assert (
        tab.run("Math.min(...[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect().width))")
        > 300
    )
    # In a desktop's window all columns of the results are within the edge.
    if width == 1280:
        assert tab.run("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
    # No word of a table's first column is cut in two.
    assert tab.run(
        "(() => { const range = document.createRange(); range.selectNodeContents(document.querySelector('.tags td'));"
        " return [range.toString(), range.getClientRects().length]; })()"
    ) == ["counterfactual", 1]
    # The smallest text of a chart, in pixels.
    scale = tab.run(
        "Math.min(...[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect().width / 400))"
    )
    assert 12 * scale >= 9
    # Text differs from its ground by WCAG's ratio for normal text.
    colours = tab.run("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    assert _contrast(*colours) > 7
    picture = tab.screenshot(tmp_path / "page.png")
    with Image.open(picture) as image:
        assert image.width == width
        dark = np.asarray(image.convert("L"))[5, 5] < 128
    assert dark == (scheme == "dark")


def test_print_is_light_and_has_no_controls(page: Path, tab: Browser) -> None:
    tab.media("print", "dark")
    tab.open(page, width=800)
    assert tab.run("getComputedStyle(document.body).backgroundColor") in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert visible(tab, "nav, .controls, .list, #compare") == 0
    assert visible(tab, "article") == 12


def test_filters_narrow_examples_and_questions(page: Path, tab: Browser) -> None:
    tab.open(page)
    assert (visible(tab, "article"), visible(tab, ".questions li")) == (12, 24)

    def choose(name: str, label: str) -> None:
        tab.run(
            f"(() => {{ const s = document.querySelector('.filters [name={name}]');"
            f" s.value = [...s.options].find(o => o.text === {json.dumps(label)}).value;"
            " s.dispatchEvent(new Event('input')); })()"
        )

    choose("tag", "descriptive")
    assert visible(tab, ".questions li") == 12
    choose("system", "psa")
    choose("verdict", "right")
    assert visible(tab, ".questions li") == 4  # psa answers every third question right: 3, 9, 15, 21
    links = "[...document.querySelectorAll('.questions .link')].map(a => a.getAttribute('href').split('/')[2])"
    assert tab.run(links) == ["q03", "q09", "q15", "q21"]
    assert tab.run("document.querySelector('[data-found]').textContent").startswith("4 of 24 questions, ")
    choose("other", "question-only")
    assert visible(tab, ".questions li") == 3  # question-only answers every fifth question right, so 15 is left out
    tab.run("document.querySelector('[name=reset]').click()")
    assert visible(tab, ".questions li") == 24
    field = "document.querySelector('[name=text]')"
    tab.run(f"(() => {{ {field}.value = 'PLACE 7'; {field}.dispatchEvent(new Event('input')); }})()")
    assert visible(tab, ".questions li") == 1


def test_arrows_step_through_and_links_lead_back(page: Path, tab: Browser) -> None:
    tab.open(page)
    tab.press("ArrowRight")
    first = tab.run("document.activeElement.id")
    tab.press("ArrowRight")
    second = tab.run("document.activeElement.id")
    assert first != second
    assert tab.run("location.hash") == "#" + second
    tab.press("ArrowLeft")
    assert tab.run("document.activeElement.id") == first
    tab.open(page, "#" + second)
    assert tab.run("document.activeElement.id") == second
    shown = set(tab.run("[...document.querySelectorAll('article')].map(a => a.dataset.question)"))
    other = next(name for name in (f"q{i:02d}" for i in range(24)) if name not in shown)
    tab.open(page, f"#q/direct/{other}")
    assert tab.run("document.activeElement.id") == f"list/q/direct/{other}"


def test_a_click_on_a_heading_sorts(page: Path, tab: Browser) -> None:
    tab.open(page)
    column = "[...document.querySelector('table.sortable').tBodies[0].rows].map(r => r.cells[0].textContent.trim())"
    assert tab.run(column) == ["majority", "question-only", "egovlp", "psa"]
    tab.run("document.querySelector('table.sortable th button').click()")
    assert tab.run(column) == ["egovlp", "majority", "psa", "question-only"]
    tab.run("document.querySelectorAll('table.tags th button')[2].click()")
    counts = tab.run(
        "[...document.querySelector('table.tags').tBodies[0].rows].map(r => +r.cells[2].textContent.replace(',', ''))"
    )
    assert counts == sorted(counts, reverse=True)


def test_two_systems_are_compared(page: Path, tab: Browser) -> None:
    tab.open(page)
    text = tab.run("document.getElementById('compared').textContent")
    # psa answers 8 of 24 right and egovlp 6, both of them 2.
    assert text.startswith("+8.33 points on all questions")
    assert re.search(r"both right2show.*only psa right6show.*only egovlp right4show.*both wrong12show", text)
    tab.run("(() => { const [a, b] = ['first', 'second'].map(n => document.querySelector(`#comparison [name=${n}]`));"
            " [a.value, b.value] = [b.value, a.value]; a.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert tab.run("document.getElementById('compared').textContent").startswith("−8.33 points on all questions")
    tab.run("document.querySelectorAll('#compared button')[1].click()")
    assert visible(tab, ".questions li") == 4  # only egovlp right


def test_the_page_is_complete_without_javascript(page: Path, tab: Browser) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page)
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert visible(tab, "article") == 12
    assert visible(tab, "[data-script], th button") == 0


def test_20_000_questions_open_within_three_seconds_and_25_megabytes(large: Path, tab: Browser) -> None:
    assert large.stat().st_size < 25e6
    seconds = min(tab.open(large) for _ in range(3))
    assert seconds < 3
    assert tab.run("document.querySelector('[data-found]').textContent").startswith("20,000 of 20,000 questions")
    assert tab.run("document.querySelector('[data-page]').textContent") == "page 1 of 800"
    tab.open(large, "#q/direct/q19999")
    assert tab.run("document.activeElement.id") == "list/q/direct/q19999"


def _contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours such as `rgb(1, 2, 3)`."""

    def luminance(colour: str) -> float:
        channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)
