"""The page: data are never trusted, nothing is loaded from outside, and unreadable files are reported."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from egopatch.configs.schema import Config
from egopatch.extract.encoders.networks.lite import TRANSFORM as LITE_TRANSFORM
from egopatch.train.report import analysis as report_analysis
from egopatch.train.report import examples as report_examples
from egopatch.train.report.page import write_report
from egopatch.train.rundir.results import TableError, gather
from tests.train.fake_runs import EVIL, guesses, kept_patches, write_dataset, write_run, write_sweep

SYSTEMS = ("majority", "question-only", "egovlp", "egovlpv2", "psa")


class Page(HTMLParser):
    """Elements of a page and what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._in = tag if tag in self.texts else ""

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.texts[self._in].append(data)

    def all(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for element, attrs in self.elements if element == tag and name in attrs]


def fill(folder: Path, config: Config) -> None:
    """Five systems, and one sweep whose runs have selections."""
    folder.mkdir()
    for index, system in enumerate(SYSTEMS):
        every = 6 - index
        write_run(
            folder,
            system,
            model=system,
            all_=100 * len(range(0, 24, every)) / 24,
            n=(16, 8),
            predictions=guesses(every),
            kept=kept_patches() if system == "psa" else None,
            config={"store": {"path": str(config.store.path)}},
        )
    sweep = write_sweep(folder)
    for ratio, k in ((0.1, 5), (1.0, 49)):
        write_run(sweep, f"r{ratio}_s0", predictions=guesses(3), kept=kept_patches(k=k))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    root = tmp_path_factory.mktemp("report")
    config = write_dataset(root / "data")
    fill(root / "runs", config)
    return config, write_report(config, root / "runs")


@pytest.fixture(scope="module")
def text(made: tuple[Config, Path]) -> str:
    return made[1].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture
def copy(made: tuple[Config, Path], tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(made[1].parent, tmp_path / "runs")
    return tmp_path / "runs"


def test_text_of_the_data_is_escaped(text: str, page: Page) -> None:
    assert EVIL not in text
    assert "is &lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    data, script = page.texts["script"]
    assert not set("<>&") & set(data)
    assert json.loads(data)[0]["texts"][0] == EVIL
    assert "alert" not in script


def test_custom_data_is_titled_by_its_folder(tmp_path: Path) -> None:
    config = write_dataset(tmp_path / "kitchen", videos=False)
    data = {"data": {"name": "jsonl", "root": "kitchen", "split": "direct"}}
    write_run(tmp_path / "runs", "psa", config=data, predictions=guesses(3))
    write_sweep(tmp_path / "runs")
    text = write_report(config, tmp_path / "runs").read_text()
    assert text.count('<td class="left">kitchen</td>') == 3 + 1  # points of the sweep, and runs
    assert '<td class="left">direct</td>' not in text
    assert "<summary>psa, kitchen, seed 0</summary>" in text
    assert '"title":"kitchen"' in text


@pytest.mark.usefixtures("no_decoding")
def test_one_system_is_not_compared(tmp_path: Path, text: str) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    write_run(tmp_path / "runs", "psa", predictions=guesses(3))
    alone = write_report(config, tmp_path / "runs").read_text()
    for part in ('href="#compare"', 'id="comparison"'):
        assert part in text
        assert part not in alone


@pytest.mark.usefixtures("no_decoding")
def test_the_tag_section_is_omitted_without_tags(tmp_path: Path, text: str) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    run = write_run(tmp_path / "runs", "psa", predictions=guesses(3))
    test = json.loads((run / "test.json").read_text()) | {"tags": {}}
    (run / "test.json").write_text(json.dumps(test))
    without = write_report(config, tmp_path / "runs").read_text()
    for part in ('href="#tags"', "By reasoning tag", 'class="tags'):
        assert part in text
        assert part not in without


def test_policy_allows_only_the_pages_own_style_and_script(page: Page) -> None:
    ((_, meta),) = [e for e in page.elements if e[1].get("http-equiv") == "Content-Security-Policy"]
    policy = dict(part.strip().split(" ", 1) for part in meta["content"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        *_, content = page.texts[tag]  # data in a script element never runs, so they need no permission
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"


def test_nothing_is_loaded_from_outside(text: str, page: Page) -> None:
    assert not re.search(r"https?://|@import|url\(", text)
    sources = page.all("img", "src")
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert all(href.startswith(("#", "data:,")) for tag in ("a", "link") for href in page.all(tag, "href"))
    assert not page.all("script", "src")


def test_no_inline_style_or_handler_that_the_policy_would_drop(page: Page) -> None:
    assert not [(tag, name) for tag, attrs in page.elements for name in attrs if name == "style" or name[:2] == "on"]


def test_every_section_with_data_has_its_charts(page: Page) -> None:
    labels = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "chart"]
    said = (
        "majority 16.67",
        "share of patches kept",
        "training loss",
        "accuracy on val",
        "how often each of 7 × 7 patches",
    )
    assert len(labels) == len(said)
    assert all(words in label for label, words in zip(labels, said))


def test_at_least_a_dozen_examples_with_frames_overlays_and_answers(text: str, page: Page) -> None:
    assert text.count('<article class="example"') == 12
    assert [text.count(f"<h4 data-kind>{kind}</h4>") for kind in ("Wins", "Losses", "Random questions")] == [1, 1, 1]
    frames = [source for source in page.all("img", "src") if source.startswith("data:image/jpeg")]
    assert len(frames) == 12 * 4
    with Image.open(io.BytesIO(base64.b64decode(frames[0].split(",")[1]))) as image:
        assert image.size == (224, 224)
    overlays = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("viewbox") == "0 0 7 7"]
    assert len(overlays) == 12 * 4 * 3  # three ratios
    assert {attrs["data-ratio"] for attrs in overlays if "class" not in attrs} == {"0.25"}


def test_the_slider_offers_the_ratios_that_were_recorded(page: Page) -> None:
    (labels,) = page.all("input", "data-labels")
    assert labels == '["0.1", "0.25", "1"]'


def test_the_page_shows_the_headline_numbers(text: str) -> None:
    assert "50.00%" in text
    assert "<b>+29.17</b> points over question-only" in text
    assert "95% interval" in text
    assert "n = 24 questions: 16 open, 8 binary." in text
    assert "egopatch train fit --config configs/demo.yaml --head.name psa\n" in text
    assert "torch <code>2.13.0</code>" in text


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips decoding pictures, which takes seconds."""
    monkeypatch.setattr(report_examples, "pictures", lambda clips, *_: [((), "not decoded here")] * len(clips))


@pytest.mark.usefixtures("no_decoding")
def test_complete_reads_and_differing_recounts_are_reported(
    made: tuple[Config, Path], text: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "None: every run and sweep below this folder was read." in text
    lines = (copy / "psa/predictions.jsonl").read_text().splitlines()
    lines[0] = '{"question_id": "q00", "answer": "no"}'
    (copy / "psa/predictions.jsonl").write_text("\n".join(lines))
    write_report(made[0], copy)
    assert "predictions.jsonl gives 45.83 but test.json has 50.00" in capsys.readouterr().err


def test_a_missing_store_is_reported(text: str, made: tuple[Config, Path]) -> None:
    assert f"no store at {made[0].store.path}" in text


@pytest.mark.usefixtures("no_decoding")
def test_commands_on_the_page_quote_paths_with_spaces(copy: Path, made: tuple[Config, Path]) -> None:
    folder = copy.rename(copy.parent / "my runs")
    text = html.unescape(write_report(made[0], folder).read_text())
    assert f"egopatch train explain --config '{folder}/psa/config.yaml'" in text


@pytest.mark.slow
def test_the_page_repeats_byte_for_byte(made: tuple[Config, Path], text: str) -> None:
    assert write_report(made[0], made[1].parent).read_text(encoding="utf-8") == text


def test_a_missing_video_is_named_in_place_of_its_picture(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_dataset(tmp_path / "data", videos=False)
    page = write_report(config, copy).read_text()
    assert page.count('<div class="gone">No picture: ') == 12
    assert re.search(r"video \S+/clip\d\.mp4 does not exist", page)
    assert "report: no picture: video" in capsys.readouterr().err


def test_missing_annotations_leave_a_report_without_examples(
    copy: Path, tmp_path: Path, made: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(data=made[0].data.__class__(name="jsonl", root=tmp_path / "nowhere"))
    page = write_report(config, copy).read_text()
    assert "No examples; the files that could not be read are listed below." in page
    assert "points over" not in page
    assert "direct: no intervals and no examples: data.root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("psa/selection.npz", b"PK\x03\x04 torn", "selection.npz is damaged"),
        (
            "psa/predictions.jsonl",
            b'{"question_id": "q99", "answer": "a"}\n',
            "1 of 1 answer belongs to other questions",
        ),
        ("psa/log.jsonl", b"not json\n{}\n", "log.jsonl:1 is not a log event"),
        ("sweeps/ratio_direct/sweep.json", b"{}", "sweep.json is not a sweep"),
        ("egovlp/test.json", b"{", "egovlp: test.json is damaged"),
    ],
)
@pytest.mark.usefixtures("no_decoding")
def test_damage_is_named_and_the_rest_is_shown(
    copy: Path, made: tuple[Config, Path], capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str
) -> None:
    (copy / file).write_bytes(content)
    page = write_report(made[0], copy).read_text()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert line.startswith("report: ")
    assert "None: every run and sweep below this folder was read." not in page
    assert "50.00%" in page


def test_a_report_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="egopatch train fit"):
        write_report(Config(), tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("no_decoding")
def test_without_psa_the_page_is_about_the_best_head_on_val(tmp_path: Path, made: tuple[Config, Path]) -> None:
    for name, val, every in (("egovlp", 40.0, 3), ("pooled", 45.0, 2), ("question-only", 60.0, 5)):
        all_ = 100 * len(range(0, 24, every)) / 24
        write_run(tmp_path, name, model=name, val=val, all_=all_, predictions=guesses(every))
    page = write_report(made[0], tmp_path).read_text()
    assert "pooled, all questions" in page
    assert "selection.npz" not in page  # these heads have none
    assert page.count('<article class="example"') >= 8


ENCODERS = {
    "psa": {"arch": "egovlpv2", "checkpoint": "weights/egovlpv2-random.pth"},
    "psa (lite)": {"arch": "lite", "checkpoint": None},
}


@pytest.mark.parametrize("systems", [("psa", "psa (lite)"), ("psa (lite)",)])
def test_the_headline_matches_by_head_and_prefers_real_weights(
    tmp_path: Path, made: tuple[Config, Path], systems: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for system in systems:
        config = {"head": {"name": "psa"}, "encoder": ENCODERS[system], "video": {"frames": 2}}
        # The row on random weights is the better one on val.
        val = 90.0 if system == "psa" else 10.0
        write_run(
            tmp_path, system, model=system, val=val, predictions=guesses(2), kept=kept_patches(frames=2), config=config
        )
    write_run(tmp_path, "question-only", model="question-only", predictions=guesses(6))
    asked = []
    monkeypatch.setattr(report_analysis, "input_transform", lambda *args: asked.append(args) or LITE_TRANSFORM)

    def drawn(clips: list, video: object, transform: object, read: list[int]) -> list[tuple[tuple[str, ...], str]]:
        return [(("data:image/jpeg;base64,",) * len(read), "")] * len(clips)

    monkeypatch.setattr(report_examples, "pictures", drawn)
    write_sweep(tmp_path)  # of psa, which is not the system of the headline
    text = write_report(made[0], tmp_path).read_text()
    assert "psa (lite), all questions</span>" in text
    assert "points over question-only" in text
    assert not re.search("points over psa|No psa|random encoder weights", text)
    assert asked == [("lite", None, 112)]
    overlays = [attrs for tag, attrs in Page(text).elements if tag == "svg" and attrs.get("viewbox") == "0 0 7 7"]
    examples = text.count('<article class="example"')
    assert examples >= 8
    assert len(overlays) == 2 * examples  # the frames of the run's own card, and its own selection
    (colour,) = set(re.findall(r'<path class="line (k\d+)" [^>]*><title>psa</title>', text))  # in all charts
    assert colour != "k0"


def test_a_system_with_only_random_weights_is_labelled_so(
    tmp_path: Path, made: tuple[Config, Path], no_decoding: None
) -> None:
    write_run(tmp_path, "psa", predictions=guesses(2), config={"encoder": ENCODERS["psa"]})
    assert "psa, all questions, on random encoder weights" in write_report(made[0], tmp_path).read_text()


def test_missing_pictures_of_an_unknown_encoder_state_the_reason(tmp_path: Path, made: tuple[Config, Path]) -> None:
    write_run(tmp_path, "psa (mine)", predictions=guesses(2), config={"encoder": {"arch": "mine"}})
    assert write_report(made[0], tmp_path).read_text().count("No picture: encoder.arch is &#39;mine&#39;") == 4


@pytest.mark.usefixtures("no_decoding")
def test_examples_show_only_the_frames_the_head_reads(tmp_path: Path, made: tuple[Config, Path]) -> None:
    config = {"head": {"name": "psa", "frames": 2}, "video": {"frames": 8}}
    write_run(tmp_path, "psa", predictions=guesses(2), config=config)
    (row,) = gather(tmp_path).rows
    assert report_analysis.frames_read(row, report_analysis.config_of(row, made[0])) == [2, 6]


@pytest.mark.slow
def test_reading_results_never_imports_the_decoder() -> None:
    code = "import sys, egopatch.train.report.page, egopatch.train.report.table; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("no_decoding")
def test_a_sweep_of_other_options_is_a_table_without_a_plot(copy: Path, made: tuple[Config, Path]) -> None:
    member = {"ratio": 0.25, "seed": 0, "open": 1.0, "binary": 2.0, "all": 33.125, "n": 24, "dir": "none"}
    members = [member | {"overrides": {"head.coarse": coarse, "train.seed": 0}} for coarse in (True, False)]
    sweep = {"name": "parts", "split": "direct", "model": "psa", "members": members}
    (copy / "sweeps/ratio_direct/sweep.json").write_text(json.dumps(sweep))
    page = write_report(made[0], copy).read_text()
    assert "Accuracy against the selection ratio" not in page
    assert re.search(r"head.coarse False</td><td>0.25</td><td>1</td><td>33.1[23]</td><td>24</td>", page)
