"""Code in the documentation runs as written, its commands are valid, and the messages that it quotes exist."""

import ast
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from egopatch.__main__ import COMMANDS as COMMANDS_OF_EGOPATCH
from egopatch.configs.schema import Config, RunConfig
from egopatch.extract.datasets.egosynth.render import render
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.features import Fingerprint, PatchTokens, StoreSpec, create_store, open_store
from egopatch.features.store.store import Store
from egopatch.features.tools.convert import convert
from egopatch.train.fitting.fit import fit
from egopatch.train.rundir.run_folder import plain
from tests.extract.video.videos import write_video
from tests.features.objects import bucket, environment, server
from tests.snippets import CODE, PAGES, blocks, run_page
from tests.train.tiny import write_tiny

__all__ = ["bucket", "environment", "server"]

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# All pages with code blocks that a test runs.
RUN = {
    ROOT / "README.md",
    DOCS / "egotaskqa.md",
    DOCS / "encoders.md",
    DOCS / "howto.md",
    DOCS / "notebook.md",
    DOCS / "own_loops.md",
    DOCS / "own_videos.md",
    DOCS / "store.md",
    DOCS / "training.md",
    DOCS / "tutorial.md",
    DOCS / "usage.md",
}
LANGUAGES = {*CODE, "text", "yaml", "toml", "bibtex"}
# Each command once, with the first place where it appears.
COMMANDS = {
    command: f"{page.name}:{block.line}: {command}"
    for page in reversed(PAGES)
    for block in reversed(blocks(page))
    if block.language == "bash"
    for command in block.commands()
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_name_their_language_and_run_unless_exempt(page: Path) -> None:
    found = blocks(page)
    assert not re.search(r"^ +```", page.read_text(encoding="utf-8"), re.MULTILINE), "an indented block is not found"
    assert {block.language for block in found} <= LANGUAGES, [
        block for block in found if block.language not in LANGUAGES
    ]
    assert any(block.runs for block in found) == (page in RUN)


@pytest.fixture(scope="module")
def parsers() -> dict:
    return runpy.run_path(str(DOCS / "reference.py"))["command_parsers"]()


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.get)
def test_documented_commands_are_valid(command: str, parsers: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(
        re.sub(r"^(?:srun )?(?:\.venv/bin/)?python -m (?=extract|features|train)", "egopatch ", command)
    )
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+)(?=[a-z -]*:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "egopatch":
        # `egopatch ask` is short for `egopatch train ask`, and so on.
        short = next((stage for stage in parsers if words[1] in parsers[stage]), None)
        assert words[1] in COMMANDS_OF_EGOPATCH
        if short is None and words[1] not in parsers:
            return  # a command of its own, with a parser of its own
        stage, name, *options = words[1:] if short is None else (short, *words[1:])
        # These commands take options of their own before the others are parsed.
        for own in ("--video", "--run", "--encoder"):
            if own in options:
                del options[options.index(own) : options.index(own) + 2]
        # C stands for any config, and some pages make one.
        made = {option for option in options if option == "C" or "$" in option or not option.startswith("configs/")}
        configs = {option for before, option in itertools.pairwise(options) if before == "--config"}
        options = ["configs/demo/lite.yaml" if option in made & configs else option for option in options]
        with contextlib.redirect_stderr(io.StringIO()) as fault:
            try:
                parsers[stage][name].parse_args(options)
            except SystemExit:
                pytest.fail(fault.getvalue())


def _messages() -> list[str]:
    """Every string in the code, with … in place of interpolated values."""
    found = []
    for path in (path for name in ("configs", "extract", "features", "train") for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_messages_exist_in_the_code() -> None:
    messages = _messages()
    rows = re.findall(r"^\| (`.+?`)(?: [a-z ]+)? \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 30
    patterns = {row: ".*".join(map(re.escape, row[1:-1].strip("…").split("…"))) for row in rows}
    assert not [row for row, pattern in patterns.items() if not any(re.search(pattern, one) for one in messages)]


def _store(path: Path, dtype: str = "float16", format: str = "zarr") -> Store:
    names = [f"clip{n}" for n in range(9)]
    spec = StoreSpec.for_patches(2, (3, 4), 8, dtype, 4)
    store = create_store(path, spec, Fingerprint({"made": "up"}), names, format)
    generator = torch.Generator().manual_seed(0)
    for work in store.missing_shards():
        rows = {name: {a.name: torch.randn(a.shape, generator=generator) for a in spec.arrays} for name in work.ids}
        rows.pop("clip5", None)
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "made up"))
    return store


def test_a_store_can_be_read_without_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store(tmp_path / "stores" / "mine")
    store.rewrite_shard(0, ["clip2"])
    _store(tmp_path / "stores" / "mine_hdf5", format="hdf5")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert all(not missing for _, missing in run_page(DOCS / "store.md", {}, names))
    left = [name for name in open_store(store.path).clip_ids if name not in ("clip2", "clip5")]
    assert set(names["tokens"]) == set(left)
    assert set(names["tokens_hdf5"]) == {*left, "clip2"}
    expected = store.read(left).patches.numpy()
    assert all((names["tokens"][name] == row).all() for name, row in zip(left, expected))
    assert all((names["tokens_hdf5"][name] == row).all() for name, row in zip(left, expected))


def test_the_store_page_names_every_array() -> None:
    text = (DOCS / "store.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| `.*", text, re.MULTILINE))
    assert not [field.name for field in dataclasses.fields(PatchTokens) if f"`{field.name}`" not in rows]


def test_readme_example_opens_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _store(tmp_path / "runs" / "demo" / "stores" / "egovlpv2")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert all(not missing for _, missing in run_page(ROOT / "README.md", {"[:8]": "[:4]"}, names))
    assert names["tokens"].patches.shape == (4, 2, 12, 8)


def test_the_networks_answer_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "finetuned.pth"
    standin = write_standin("egovlpv2", file, texts=("what is it?",), frames=3, size=64, answers=7)
    monkeypatch.chdir(tmp_path)
    names: dict = {"pictures": np.random.default_rng(0).random((3, 3, 64, 64), np.float32)}
    smaller = {"num_frames=16": "num_frames=3", "depth=6": "depth=2", "size=224": "size=64"}
    smaller["weights/roberta-base"] = str(standin.tokenizer)
    assert all(not missing for _, missing in run_page(DOCS / "encoders.md", smaller, names))
    assert names["logits"].shape == (1, 7)
    assert names["tokens"].patches.shape[:3] == (1, 3, 16)


def _run_all(page: Path, smaller: dict[str, str]) -> None:
    wrong = [(block.line, missing) for block, missing in run_page(page, smaller, {}) if missing]
    assert not wrong, "the page shows lines that the commands do not print"


# What replaces the experiment on each page.
EXPERIMENTS = {
    "egotaskqa.md": {"configs/egotaskqa_direct.yaml": "small.yaml"},
    "training.md": {"--config C": "--config small.yaml"},
    "usage.md": {
        "configs/demo/egovlpv2.yaml": "small.yaml",
        "configs/demo/lite.yaml": "small.yaml",
        "publish --config C": "publish --config small.yaml --terms 'made up: CC0'",
    },
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An experiment in `small.yaml` of the current folder, with made-up features, one of them quarantined."""
    monkeypatch.chdir(tmp_path)
    demo = Path("runs", "demo")
    config = write_tiny(demo, clips=24, bad=("clip|P0|0|1",))
    config = dataclasses.replace(config, run=RunConfig(demo / "direct" / "psa", table=demo))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    Path("small.yaml").write_text(yaml.safe_dump(plain(config)))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("page", EXPERIMENTS)
def test_page_commands_print_the_documented_output(page: str, small: Config) -> None:
    fit(small, "a test")
    _run_all(DOCS / page, EXPERIMENTS[page])
    assert small.run.table is not None
    assert page == "training.md" or (small.run.table / "report.html").is_file()


@pytest.mark.slow
def test_howto_commands_print_the_documented_output(small: Config, bucket: str) -> None:
    convert(small.store.path, f"{bucket}/x")
    write_video(Path("a.mp4"), frames=4)
    places = {"STORE": "stores/x", "VIDEO": "a.mp4", "--config C": "--config small.yaml"}
    _run_all(
        DOCS / "howto.md", places | {"s3://bucket/features": bucket, "--out frames/": "--out frames --video.frames 2"}
    )
    assert len(open_store("stores/x").clip_ids) == 23
    assert len(list(Path("frames").iterdir())) == 2


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tutorial was run on few clips."""
    folder = tmp_path_factory.mktemp("tutorial")
    with contextlib.chdir(folder):
        # A decoder imports torch, and one is enough for twenty clips.
        smaller = {"--clips 600": "--clips 20", "epochs: 8": "epochs: 1", "epochs 3": "epochs 1"}
        _run_all(DOCS / "tutorial.md", smaller | {"store:   {": "engine:  {decoders: 1}\nstore:   {"})
    return folder


@pytest.mark.slow
def test_tutorial_runs_from_top_to_bottom(tutorial: Path) -> None:
    assert (tutorial / "runs" / "tutorial" / "report.html").is_file()
    assert (tutorial / "runs" / "tutorial" / "ask.jpg").is_file()


PROGRESS = """
from egopatch.features.common.progress import ProgressDisplay
with ProgressDisplay("encode", 2, "clips") as display:
    display._printed = 0
    display.advance(1)
"""


@pytest.mark.slow
def test_notebook_page_runs_in_a_jupyter_kernel(tutorial: Path) -> None:
    # Imported here, because quick tests need neither.
    import nbformat
    from nbclient import NotebookClient

    cells = [block.text for block in blocks(DOCS / "notebook.md") if block.runs]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (*cells, PROGRESS)])
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}):
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tutorial)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert "<th>made by</th><td>arch lite" in outputs[0][0].data["text/html"]
    assert outputs[1][0].data["image/png"]
    assert "".join(one.text for one in outputs[-1]).startswith("\rencode: 1/2 clips")


@pytest.mark.slow
def test_own_videos_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(tmp_path / "made", clips=20)
    (tmp_path / "data" / "mine" / "videos").mkdir(parents=True)
    for video in sorted((tmp_path / "made" / "qa_videos").iterdir())[:6]:
        video.rename(tmp_path / "data" / "mine" / "videos" / video.name)
    monkeypatch.chdir(tmp_path)
    less = "--clip-seconds 10 --video.size 112 --video.frames 4 --engine.decoders 1"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"CLIP_ID": shlex.quote(video.name), "NEW.mp4": shlex.quote(f"data/mine/videos/{video.name}")}
    _run_all(DOCS / "own_videos.md", {"--clip-seconds 10": less, "epochs 2": "epochs 1", **asked})
    assert Path("answer.jpg").is_file()


@pytest.mark.slow
def test_own_loops_page_trains_with_a_custom_loop(tmp_path: Path) -> None:
    names = [f"clip{n}" for n in range(64)]
    labels = {name: n % 3 for n, name in enumerate(names)}
    spec = StoreSpec.for_patches(2, (3, 4), 16, "float16", 8)
    store = create_store(tmp_path / "stores" / "mine", spec, Fingerprint({"made": "up"}), names)
    generator = torch.Generator().manual_seed(0)
    for work in store.missing_shards():
        rows = {}
        for name in work.ids:
            rows[name] = {array.name: torch.randn(array.shape, generator=generator) for array in spec.arrays}
            rows[name]["patches"][..., labels[name]] += 2
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "made up"))
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loops.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 2
    (tmp_path / "page.py").write_text("\n".join(code))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert done.stdout.splitlines()[-1].endswith("torch.Size([2, 360, 640])")
    assert (tmp_path / "some_clips.npz").is_file()
