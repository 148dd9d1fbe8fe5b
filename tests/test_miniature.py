"""A miniature EgoTaskQA, laid out as released, runs end to end: data, doctor, features, train, evaluate, score, table.

Twenty rendered clips stand for the videos and random-weight networks for the checkpoints. Everything else is as
published: both archives, every file that the published preprocessing leaves in both splits, file names with pipes,
answers with capital letters, and answers that training never saw.
"""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from egopatch.configs.command_line import load_config
from egopatch.extract.__main__ import main as extract
from egopatch.extract.datasets import load_dataset
from egopatch.extract.datasets.egosynth.render import render
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.train.__main__ import main as train
from tests.extract.fetch.loopback import Served, Server, serving

pytestmark = pytest.mark.slow

CLIPS = 20
SIZE = 128  # an even grid, which MFAS needs
SPLITS = ("direct", "indirect")
PARTS = ("train", "val", "test")
Record = dict[str, Any]
ENCODERS = {"egovlpv2": "EgoVLPv2.pth", "egovlp": "EgoVLP.pth"}
# How each store is made: the demo's config, and changes to it. MFAS starts from EgoVLPv2's file.
STORES = {"egovlpv2": ("egovlpv2", []), "egovlp": ("egovlp", []), "mfas": ("egovlpv2", ["--encoder.arch", "mfas"])}
# System to the store that it reads; the blind ones are shown beside EgoVLPv2.
SYSTEMS = {
    "majority": "egovlpv2",
    "question-only": "egovlpv2",
    "egovlp": "egovlp",
    "egovlpv2": "egovlpv2",
    "mfas": "mfas",
    "psa": "egovlpv2",
}


def write_release(root: Path) -> None:
    """`Data/qa`, `Data/qa_ori` and `qa_videos` below `root`, as the two published archives hold them."""
    made = root / "rendered"
    render(made, clips=CLIPS)
    names = {path.stem: f"L{i % 4 + 1}-F{i % 2 + 1}-{i:02d}|P{i % 3 + 1}|{i * 7}|{i * 7 + 95}" for i, path in
             enumerate(sorted((made / "qa_videos").iterdir()))}  # fmt: skip
    (root / "qa_videos").mkdir()
    for old, new in names.items():
        (made / "qa_videos" / f"{old}.mp4").rename(root / "qa_videos" / f"{new}.mp4")
    qas = {split: {part: _rendered(made, split, part, names) for part in PARTS} for split in SPLITS}
    _spoil([qas[split]["test"] for split in SPLITS])
    for split, parts in qas.items():
        folder, raw = root / "Data" / "qa" / split, root / "Data" / "qa_ori" / split
        folder.mkdir(parents=True)
        raw.mkdir(parents=True)
        shutil.copy(made / "qa" / split / "all_reasoning_types.txt", folder)
        _preprocess(folder, parts)
        for part in PARTS:
            shutil.copy(folder / f"{part}_qas.json", raw)


def _rendered(made: Path, split: str, part: str, names: dict[str, str]) -> list[Record]:
    records = json.loads((made / "qa" / split / f"formatted_{part}_qas_encode.json").read_text())
    return [{**record, "interval": names[record["interval"]]} for record in records]


def _spoil(tests: list[list[Record]]) -> None:
    """A capital letter and an answer that training never saw, as the real test questions have, in both splits."""
    open_ids = [{record["question_id"] for record in test if record["structural"] == "query"} for test in tests]
    capital, unknown = sorted(set.intersection(*open_ids))[:2]
    for record in (record for test in tests for record in test):
        if record["question_id"] == capital:
            record["answer"] = record["answer"].title()
        if record["question_id"] == unknown:
            record["answer"] = "watermelon"


def _preprocess(folder: Path, parts: dict[str, list[Record]]) -> None:
    """Every file of the published preprocessing; files that nothing here reads are nearly empty."""
    answers = ["<UNK0>", "<UNK1>", *dict.fromkeys(record["answer"].lower() for record in parts["train"])]
    (folder / "answer_set.txt").write_text("".join(f"{answer}\n" for answer in answers))
    for part, records in parts.items():
        raw = [{key: value for key, value in record.items() if key != "answer_encode"} for record in records]
        encoded = []
        for record in raw:
            answer = record["answer"].lower() if part == "train" else record["answer"]
            label = answers.index(answer) if answer in answers else 1
            encoded.append({**record, "answer_encode": label, "question_encode": [2, 3]})
        digits = [
            {**record, "answer_encode": str(record["answer_encode"]), "question_encode": "2 3"} for record in encoded
        ]
        formatted = [{**record, "question_char_encode": [[0] * 17] * 2} for record in encoded]
        for name, members in (("{}_qas", raw), ("{}_qas_encode", digits), ("formatted_{}_qas_encode", formatted)):
            (folder / f"{name.format(part)}.json").write_text(json.dumps(members))
    for name in ("char_vocab.txt", "vocab.txt", "glove.pt"):
        (folder / name).write_bytes(b"a\n")
    for name in ("lemma-qa_vocab.json", "vid_intervals.json", "tagged_qas.json"):
        (folder / name).write_text("{}")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A folder to work in, and a server that publishes the archives, the networks and their tokenizers."""
    release, root = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("work")
    write_release(release)
    with serving() as server:
        for name, member in (("Data.tgz", "Data"), ("qa_videos.tgz", "qa_videos")):
            with tarfile.open(release / name, "w:gz") as archive:
                archive.add(release / member, member)
            server.files[f"/{name}"] = Served((release / name).read_bytes())
        fields = {"purpose": "made up", "terms": "none", "page": server.link(), "url": server.link()}
        tree: dict[str, Any] = {
            "datasets": {"egotaskqa": {**fields, "files": {"Data.tgz": ["Data/qa"], "qa_videos.tgz": ["qa_videos"]}}},
            "checkpoints": {},
            "tokenizers": {},
        }
        texts = load_dataset(load_config(Path("configs/demo/egovlp.yaml"), ["--data.root", str(release)]).data).texts
        for arch, name in ENCODERS.items():
            depth = 3 if arch == "egovlpv2" else 4
            written = write_standin(arch, release / name, texts=texts, depth=depth, fusion=2, size=SIZE)
            files = {path.name: path.read_bytes() for path in written.tokenizer.iterdir()}
            server.files[f"/{name}"] = Served((release / name).read_bytes())
            server.files |= {f"/{arch}/{file}": Served(content) for file, content in files.items()}
            tree["checkpoints"][arch] = {**fields, "files": [name]}
            tree["tokenizers"][arch] = {**fields, "url": server.link(f"/{arch}"), "files": sorted(files)}
        (root / "sources.yaml").write_text(yaml.safe_dump(tree))
        yield root, server


def options(root: Path, store: str, system: str | None = None, split: str = "direct") -> list[str]:
    run = [] if system is None else ["--head.name", system, "--run.dir", str(root / "runs" / split / system)]
    encoder, changes = STORES[store]
    return [
        *("--config", f"configs/demo/{encoder}.yaml", "--data.root", str(root / "data"), "--data.split", split),
        *("--encoder.checkpoint", str(root / "weights" / ENCODERS[encoder])),
        *("--text.model", str(root / "weights" / encoder), "--store.path", str(root / "stores" / store)),
        *("--video.size", str(SIZE), "--run.table", str(root / "runs"), "--train.epochs", "1", *changes, *run),
    ]


def test_miniature_egotaskqa_runs_from_archives_to_results_table(
    published: tuple[Path, Server], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, server = published
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.files["/qa_videos.tgz"].drops = [10_000]
    for store in STORES:
        assert extract(["data", "--sources", str(root / "sources.yaml"), *options(root, store)]) == 0
    assert "bytes=10000-" in server.ranges
    capsys.readouterr()
    assert extract(["doctor", *options(root, "egovlpv2"), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["counts"]["clips with a video"] == diagnosis["counts"]["clips"] == CLIPS
    found = {finding["what"]: finding["found"] for finding in diagnosis["findings"]}
    assert [len(entries) for what, entries in found.items() if "capital letter" in what] == [1, 1]
    unknown = [entries for what, entries in found.items() if "not in the answer set" in what]
    assert [sum("watermelon" in entry for entry in entries) for entries in unknown] == [1, 1]

    for store in STORES:
        assert extract(["run", *options(root, store)]) == 0
    for split in SPLITS:
        for system, store in SYSTEMS.items():
            assert train(["fit", *options(root, store, system, split)]) == 0
            _evaluated_and_scored_alike(root, store, system, split, capsys)

    assert train(["table", *options(root, "egovlpv2", "psa")]) == 0
    rows = json.loads((root / "runs" / "table.json").read_text())
    assert len(rows) == len(SYSTEMS) * len(SPLITS)
    assert {row["split"] for row in rows} == set(SPLITS)
    for row in rows:
        test = json.loads((root / "data/Data/qa" / row["split"] / "test_qas.json").read_text())
        assert row["n"] == len(test)
        assert all(0 <= row[part] <= 100 for part in ("open", "binary", "all"))


def _evaluated_and_scored_alike(
    root: Path, store: str, system: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` and `score` on the answers that `fit` wrote reproduce the scores of `fit`."""
    run = root / "runs" / split / system
    fitted = json.loads((run / "test.json").read_text())
    assert train(["evaluate", *options(root, store, system, split)]) == 0
    assert json.loads((run / "test.json").read_text()) == fitted
    capsys.readouterr()
    questions = root / "data/Data/qa" / split / "formatted_test_qas_encode.json"
    assert (
        train(["score", "--questions", str(questions), "--predictions", str(run / "predictions.jsonl"), "--json"]) == 0
    )
    scored = json.loads(capsys.readouterr().out)
    assert {key: fitted[key] for key in scored} == scored
    raw = root / "data/Data/qa_ori" / split / "test_qas.json"
    assert train(["score", "--questions", str(raw), "--predictions", str(run / "predictions.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scored
