"""`egopatch extract doctor` on made-up files: a valid data set, and one with each fault."""

import json
from pathlib import Path
from typing import Any

import pytest

from egopatch.extract.__main__ import main
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.extract.planning import machine
from egopatch.extract.planning.machine import Check
from tests.extract.datasets.test_released import egoschema, nextqa, qaego4d

ANSWERS = "<UNK0>\n<UNK1>\ncup\nyes\nno\n"
SPLITS = ("direct", "indirect")
PARTS = ("train", "val", "test")

TOKENIZER = ("--text.model", MINILM.name)

Records = dict[str, dict[str, list[dict[str, Any]]]]


def record(number: int, answer: str = "cup", **changes: Any) -> dict[str, Any]:
    lines = ANSWERS.split()
    return {
        "question": f"What is number {number}?",
        "answer": answer,
        "answer_encode": lines.index(answer) if answer in lines else 1,
        "question_id": number,
        "interval": f"L{number}-F1|P1|10|95",
        "structural": "query",
        "reasoning_type": "world$descriptive$object$query$direct",
        **changes,
    }


@pytest.fixture
def records() -> Records:
    """Both splits of the same six questions, as released: an id means the same question in both."""
    members = [
        record(n, ("cup", "yes", "no")[n % 3], structural=("query", "verify", "verify")[n % 3]) for n in range(6)
    ]
    return {split: {part: members[i * 2 : i * 2 + 2] for i, part in enumerate(PARTS)} for split in SPLITS}


def write(root: Path, records: Records, folder: str = "qa") -> Path:
    (root / "qa_videos").mkdir(exist_ok=True)
    for split, parts in records.items():
        (root / folder / split).mkdir(parents=True, exist_ok=True)
        (root / folder / split / "answer_set.txt").write_text(ANSWERS)
        for part, members in parts.items():
            (root / folder / split / f"formatted_{part}_qas_encode.json").write_text(json.dumps(members))
            for one in (one for one in members if "/" not in one.get("interval", "/")):
                (root / "qa_videos" / f"{one['interval']}.mp4").write_bytes(b"video")
    return root


def doctor(
    root: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, int], dict[str, tuple[str, list[str]]]]:
    """Exit code, counts, and what was found: severity and entries by words."""
    capsys.readouterr()
    code = main(["doctor", "--data.root", str(root), "--encoder.dtype", "float32", *TOKENIZER, "--json", *more])
    diagnosis = json.loads(capsys.readouterr().out)
    assert all(finding["count"] == len(finding["found"]) for finding in diagnosis["findings"])
    return code, diagnosis["counts"], {f["what"]: (f["severity"], f["found"]) for f in diagnosis["findings"]}


def test_valid_data_set_has_no_findings(tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    code, counts, findings = doctor(write(tmp_path, records), capsys)
    assert (code, findings) == (0, {})
    assert (counts["clips"], counts["clips with a video"], counts["question texts"]) == (6, 6, 6)
    assert [counts[f"indirect {part} questions"] for part in PARTS] == [2, 2, 2]
    assert (counts["direct train open"], counts["direct train binary"], counts["direct answers"]) == (1, 1, 5)
    assert main(["doctor", "--data.root", str(tmp_path), *TOKENIZER]) == 0
    out = capsys.readouterr().out
    assert "no faults found" in out
    assert f"{'direct answers':<26} 5, unknown ones included" in out.splitlines()


def test_the_disk_of_the_store_is_checked_and_an_error_of_the_machine_ends_the_report(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_disk(folder: Path) -> Check:
        return Check("disk", "error", f"{folder} cannot be written to", "set store.path to another disk")

    write(tmp_path, records)
    monkeypatch.setattr(machine, "check_disk", no_disk)
    stores = tmp_path / "stores"
    stores.mkdir()
    args = ["doctor", "--data.root", str(tmp_path), "--store.path", str(stores / "new" / "x"), *TOKENIZER]
    assert main(args) == 1
    out = capsys.readouterr().out
    assert f"disk: {stores} cannot be written to" in out
    assert out.splitlines()[-1] == "1 error of the machine, see above: disk"


FAULTS = {
    "video gone": "clips without a video file",
    "video empty": "clips with an empty video file",
    "id twice": "direct: question ids in more than one part",
    "asked twice": "direct: val and test questions that are also in train, with the same clip",
    "verify": "direct: verify questions whose answer is neither yes nor no",
    "class": "direct: questions whose answer_encode is the class of another answer",
    "split": "question ids that belong to different questions in the two splits",
    "folder": "splits whose parts come from different folders",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    direct = {part: list(members) for part, members in records["direct"].items()}
    test = direct["test"][0]
    changed = {
        "id twice": {"question_id": 0},
        "asked twice": {"question": direct["train"][0]["question"].upper(), "interval": direct["train"][0]["interval"]},
        "verify": {"structural": "verify", "answer": "cup", "answer_encode": 2},
        "class": {"answer_encode": 4},
    }
    direct["test"][0] = {**test, **changed.get(fault, {})}
    if fault == "split":
        records["indirect"]["test"] = [{**test, "question": "Why?"}, records["indirect"]["test"][1]]
    else:
        records = {"direct": direct}
    write(tmp_path, records)
    video = tmp_path / "qa_videos" / "L4-F1|P1|10|95.mp4"
    if fault == "video gone":
        video.unlink()
    if fault == "video empty":
        video.write_bytes(b"")
    if fault == "folder":
        moved = tmp_path / "qa_ori/direct/formatted_test_qas_encode.json"
        moved.parent.mkdir(parents=True)
        (tmp_path / "qa/direct/formatted_test_qas_encode.json").rename(moved)
    code, _, findings = doctor(tmp_path, capsys)
    what = FAULTS[fault] if fault in ("split",) else FAULTS[fault].removeprefix("direct: ")
    assert code == 1
    severity, found = findings[what]
    assert severity == "fault"
    assert len(found) == 1
    if fault.startswith("video"):
        assert found == [f"L4-F1|P1|10|95: {video}"]
    elif fault != "folder":
        assert found[0].startswith({"id twice": "0: train and test"}.get(fault, "4"))
    assert main(["doctor", "--data.root", str(tmp_path), *TOKENIZER]) == 1
    assert f"1 fault: {what}" in capsys.readouterr().out


def test_notes_do_not_count_as_faults(tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    del records["indirect"]["test"]
    records["direct"] = {**records["direct"], "test": [record(10, "Cup"), record(11, "melon")]}
    write(tmp_path, records)
    (tmp_path / "qa_videos" / "other.mp4").write_bytes(b"video")
    code, _, findings = doctor(tmp_path, capsys)
    assert code == 0
    assert {severity for severity, _ in findings.values()} == {"note"}
    found = {what: entries for what, (_, entries) in findings.items()}
    capital = "questions that the released files encode as unknown because of a capital letter; here they count"
    unknown = "val and test questions whose answer is not in the answer set, so that no system can answer them"
    assert found[capital] == ["10 in test: 'Cup'"]
    assert found[unknown] == ["11 in test: 'melon'"]
    assert found["missing parts of a split that is not configured"] == ["indirect test"]
    assert found["video files without a question"] == [str(tmp_path / "qa_videos/other.mp4")]
    assert main(["doctor", "--data.root", str(tmp_path), *TOKENIZER]) == 0
    assert "no faults found" in capsys.readouterr().out


def test_truncated_texts_are_noted(tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    for parts in records.values():
        parts["test"][0]["question"] = "What is number 4 of very many?"
    code, _, findings = doctor(write(tmp_path, records), capsys, "--text.max_length", "8")
    assert code == 0
    cut = "question texts of 8 tokens (text.max_length) or more; only the first 8 are read"
    assert findings[cut] == ("note", ["What is number 4 of very many?"])


def test_more_tokens_than_the_text_network_takes_are_a_fault(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--encoder.arch", "lite", "--text.max_length", "600")
    code, _, findings = doctor(write(tmp_path, records), capsys, *more)
    severity, (line,) = findings["text network that cannot be used"]
    assert (code, severity) == (1, "fault")
    assert line.startswith("text.max_length is 600, and the text network of ")


def test_clip_used_only_by_the_other_split_is_noted(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    records["indirect"]["test"] = [record(20)]
    code, _, findings = doctor(write(tmp_path, records), capsys)
    assert (code, findings) == (0, {"clips without a direct question": ("note", ["L20-F1|P1|10|95"])})


def test_unusable_annotations_are_reported(
    tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    records["direct"]["val"] = [{"question_id": 1}, record(3, interval="a/b")]
    write(tmp_path, records)
    (tmp_path / "qa/direct/formatted_test_qas_encode.json").unlink()
    code, counts, findings = doctor(tmp_path, capsys)
    assert (code, counts) == (1, {})
    severity, found = findings["annotations that are missing or cannot be used"]
    assert severity == "fault"
    assert [line.split(": ")[0].removeprefix(str(tmp_path)) for line in found] == [
        "/qa/direct/formatted_val_qas_encode.json:record 1",
        "/qa/direct/formatted_val_qas_encode.json:record 2",
        "/qa/direct/formatted_test_qas_encode.json",
    ]


def test_missing_data_root_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--data.root", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data.root is '{tmp_path / 'nowhere'}', which does not exist; set --data.root" in line


def test_data_root_that_is_a_file_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.jsonl").touch()
    assert main(["doctor", "--data.root", str(tmp_path / "clips.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data.root is '{tmp_path / 'clips.jsonl'}', which is not a folder; set --data.root" in line


def test_custom_jsonl_data_set_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.jsonl").write_text('{"clip_id": "a", "video": "a.mp4"}\n{"clip_id": "b", "video": "b.mp4"}\n')
    asked = [
        {"question_id": 1, "clip_id": "a", "question": "What?", "answer": "cup", "part": "train"},
        {"question_id": 2, "clip_id": "a", "question": "Open?", "answer": "maybe", "part": "test", "form": "binary"},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (tmp_path / "a.mp4").write_bytes(b"video")
    code, counts, findings = doctor(tmp_path, capsys, "--data.name", "jsonl")
    assert code == 1
    assert findings["clips without a video file"] == ("fault", [f"b: {tmp_path / 'b.mp4'}"])
    assert findings["verify questions whose answer is neither yes nor no"] == ("fault", ["2 in test: 'maybe'"])
    without = "parts without a question; training needs all three parts, `train evaluate --from` only test"
    assert findings[without] == ("note", ["val"])
    assert findings["clips without a question"] == ("note", ["b"])
    assert (counts["clips"], counts["train questions"], counts["test binary"]) == (2, 1, 1)
    (tmp_path / "b.mp4").write_bytes(b"video")
    asked[1]["answer"] = "no"
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    assert doctor(tmp_path, capsys, "--data.name", "jsonl")[0] == 0


def test_a_missing_video_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")
    clips = [json.dumps({"clip_id": name[0], "video": name}) + "\n" for name in names]
    (tmp_path / "clips.jsonl").write_text("".join(clips))
    (tmp_path / "A.MP4").write_bytes(b"video")
    (tmp_path / "b.mp4").symlink_to("annexed")
    (tmp_path / "c.mp4").mkdir()
    (tmp_path / "e.mp4").symlink_to("e.mp4")
    _, _, findings = doctor(tmp_path, capsys, "--data.name", "jsonl", "--data.questions", "null")
    assert findings["clips without a video file"][1] == [
        f"a: {tmp_path / 'a.mp4'} does not exist, but 'A.MP4' is there; use one spelling in both places",
        f"b: {tmp_path / 'b.mp4'} is a link to annexed, which does not exist; fetch that file (with git-annex: "
        "`git annex get`), or correct the link",
        f"c: {tmp_path / 'c.mp4'}",
        f"d: {tmp_path / 'd.mp4'}",
        f"e: {tmp_path / 'e.mp4'} is a link that leads back to itself; make it a link to a video",
    ]


def test_json_lists_all_faults_and_text_only_the_first_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.jsonl").write_text("{}\n" * 8)
    code, _, findings = doctor(tmp_path, capsys, "--data.name", "jsonl", "--data.questions", "null")
    (found,) = (lines for _, lines in findings.values())
    assert (code, len(found)) == (1, 8)
    assert main(["doctor", "--data.root", str(tmp_path), "--data.name", "jsonl", "--data.questions", "null"]) == 1
    assert "    and 3 more; --json lists all of them" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["qaego4d", "qaego4d-close", "nextqa", "egoschema"])
def test_released_data_sets_are_checked(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    {"qaego4d": qaego4d, "nextqa": nextqa, "egoschema": egoschema}[name.removesuffix("-close")](tmp_path)
    code, counts, findings = doctor(tmp_path, capsys, "--data.name", name)
    assert code == 1
    assert findings.keys() - {"clips without a video file"} == (
        {
            "parts without a question; training needs all three parts, `train evaluate --from` only test",
            "test questions whose right option is not published; they are not counted",
        }
        if name == "egoschema"
        else set()
    )
    for line in findings["clips without a video file"][1]:
        video = Path(line.partition(": ")[2])
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_bytes(b"video")
    assert counts["clips"] == (2 if name == "nextqa" else 3)
    assert doctor(tmp_path, capsys, "--data.name", name)[0] == 0


def test_questions_with_options_have_no_line_of_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    egoschema(tmp_path)
    assert doctor(tmp_path, capsys, "--data.name", "egoschema")[1]["answers"] == 2
    main(["doctor", "--data.root", str(tmp_path), "--data.name", "egoschema", *TOKENIZER])
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("answers")]


def test_unusable_checkpoint_is_reported(tmp_path: Path, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"no checkpoint")
    code, _, findings = doctor(write(tmp_path, records), capsys, "--encoder.checkpoint", str(file))
    assert code == 1
    severity, (line,) = findings["checkpoint that cannot be used"]
    assert severity == "fault"
    assert str(file) in line
