from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from egopatch.configs.command_line import (
    ConfigParser,
    load_config,
    option_names,
    parse_config,
    parse_options,
)
from egopatch.configs.schema import Config, ConfigError, DataConfig, RunConfig, StoreConfig, refusal_of_null
from egopatch.features.formats.interface import CODECS
from egopatch.features.values.spec import Codec

EXPERIMENTS = sorted(Path("configs").rglob("*.yaml"))


def test_schema_codecs_match_those_of_the_store_formats() -> None:
    """Neither package imports the other, so both hold the table of codecs."""
    for name, codecs in CODECS.items():
        for codec in get_args(Codec):
            if codec in codecs:
                assert StoreConfig(format=name, codec=codec).codec == codec
                continue
            with pytest.raises(ValueError, match=f"expected one of {name}'s codecs: {', '.join(codecs)}$"):
                StoreConfig(format=name, codec=codec)


def parse(*args: str) -> Config:
    return parse_options(ConfigParser(prog="test"), args)[0]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_experiment_file_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_command_line_options_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("head: {ratio: 0.5, scores: [question]}\ntrain: {lr: 1e-3}\n")
    config = parse("--config", str(file), "--head.ratio", "0.125")
    assert config.head.ratio == 0.125
    assert config.head.scores == ("question",)
    assert config.train.lr == 1e-3  # PyYAML alone would read this as text
    assert config == parse("--head.ratio", "0.125", "--config", str(file))
    assert config == parse("--head.ratio=0.125", f"--config={file}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--head.ratoi", "0.5"], "did you mean head.ratio?"),
        (["--train.epoch", "3"], "did you mean train.epochs?"),
        (["--head.ratio", "1.5"], "head.ratio is 1.5; expected a share in (0, 1]"),
        (["--head.scores", "[]"], "head.scores is (); expected at least one score, or `all` to keep every patch"),
        (["--head.levels", "[patch, patch]"], "head.levels is ('patch', 'patch'); expected each once"),
        (["--head.width", "0"], "head.width is 0; expected a positive multiple of head.heads, 4"),
        (["--head.width", "-4"], "head.width is -4; expected a positive multiple of head.heads, 4"),
        (["--train.seed", "-1"], "train.seed is -1; expected a number from 0 to 2**63 - 1"),
        (["--train.weight_decay", "-0.1"], "train.weight_decay is -0.1; expected a finite number of at least 0"),
        (["--head.ratio", "many"], "error: head.ratio is 'many'; expected a number\n"),
        (["--store.shard", "1.5"], "error: store.shard is 1.5; expected a whole number\n"),
        (["--train.patience", "x"], "error: train.patience is 'x'; expected a whole number or null\n"),
        (["--engine.workers", "many"], "error: engine.workers is 'many'; expected a whole number or auto\n"),
        (["--run.tracker", "x"], "error: run.tracker is 'x'; expected one of wandb, mlflow or null\n"),
        (["--engine.max_errors", "abc"], "error: engine.max_errors is 'abc'; expected a number\n"),
        (["--config", "{data: {root: [a]}}"], "error: data.root is a list; expected a path\n"),
        (["--config", "{run: {dir: {a: 1}}}"], "error: run.dir is a mapping; expected a path\n"),
        (["--config", "{store: {path: 3}}"], "error: store.path is 3; expected a path, in quotes\n"),
        (["--config", "{head: {scores: [null]}}"], "error: head.scores is null; expected one of question, "),
        (
            ["--encoder", "3"],
            "error: --encoder is '3', but encoder is a section; expected one of its options, such as --encoder.arch "
            "VALUE, or a YAML file with its options\n",
        ),
        (["--head.coarse", "maybe"], "error: head.coarse is 'maybe'; expected true or false\n"),
        (["--config", "{video: {frames: many}}"], "error: video.frames is 'many'; expected a whole number\n"),
        (["configs/demo/lite.yaml"], "did you mean --config configs/demo/lite.yaml?"),
        (["--store.codec", "gzip"], "store.codec is 'gzip'; expected one of zarr's codecs: none, zstd, blosc-zstd"),
        (
            ["--head.scores", "question"],
            "error: head.scores is 'question'; expected a list in brackets: '[question]'\n",
        ),
        (
            ["--head.scores", "[qustion]"],
            "error: head.scores is 'qustion'; expected one of question, saliency, prior, ",
        ),
        (
            ["--head.scores", "question,prior"],
            "head.scores is 'question,prior'; expected a list in brackets: '[question,",
        ),
        (["--config", "{vdeo: {frames: 4}}"], "error: vdeo.frames is not an option; did you mean video.frames?"),
        (["--config", "{bogus: 1}"], "error: bogus is not an option; the sections are data, video,"),
        (
            ["--config", "absent.yaml"],
            "absent.yaml', which does not exist; expected the YAML file of an experiment; examples are in configs/",
        ),
        (
            ["--config", "configs"],
            "configs', which is not a file; expected the YAML file of an experiment",
        ),
        (["--config", "configs/own_video.yaml"], "error: --config is '"),
        (["--config", "configs/own_video.yaml"], "configs/own_videos.yaml?"),
        (
            ["--train.contrast", "0.1"],
            "train.contrast is 0.1, but data.paraphrases is false; set data.paraphrases to true and run",
        ),
        (["--train.contrast", "-1"], "train.contrast is -1.0; expected a finite weight of at least 0"),
        (["--train.lr", ".inf"], "train.lr is inf; expected a positive, finite number"),
        (["--train.weight_decay", ".inf"], "train.weight_decay is inf; expected a finite number of at least 0"),
        (["--train.contrast", ".inf"], "train.contrast is inf; expected a finite weight of at least 0"),
        (["--head.saliency_weight", ".nan"], "head.saliency_weight is nan; expected a finite number"),
        (["--video.timeout_s", ".inf"], "video.timeout_s is inf; expected a positive, finite number of seconds"),
        (["--video.memory_gb", ".inf"], "video.memory_gb is inf; expected a positive number of GiB, at most a million"),
        (["--video.timeout_s", "1:30"], "error: --video.timeout_s is '1:30'; expected a number without a colon\n"),
        (["--head.options", "{x: 1:30}"], "error: --head.options: line 1: 1:30 is 90 in YAML; write 90, or '1:30' in "),
        (["--head.options.x", "1:30"], "error: --head.options.x: line 1: 1:30 is 90 in YAML; write 90, or '1:30' in "),
        (["--head", "{options: {x: 010}}"], "error: --head: line 1: 010 is 8 in YAML; write 8, or '010' in quotes"),
        (
            ["--head.options={x: 1, x: 2}"],
            "error: --head.options: line 1: key 'x' is used twice; expected each key once",
        ),
        (["--text.depth", "0"], "text.depth is 0; expected null or at least 1"),
        (["--text.depth", "-10"], "text.depth is -10; expected null or at least 1"),
        (["--video.size", "100"], "video.size is 100; expected a positive multiple of 16"),
    ],
)
def test_config_mistakes_print_one_line_and_exit_with_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"video: {frames: 4}\nstore:\n  shard: 8\n  shard: 9\n", "x.yaml: line 4: key 'shard' is used twice"),
        (b"video: {frames: 4}\nvideo: {frames: 8}\n", "x.yaml: line 2: key 'video' is used twice"),
        (
            b"head: {ratio: 0.5}\nvideo:\nrun:\n",
            "x.yaml: line 2: section video is empty; expected `video: {OPTION: VALUE}`",
        ),
        (
            b"video: 4\n",
            "x.yaml: line 1: section video holds no options; expected `video: {OPTION: VALUE}`; fill it in, "
            "or delete the line",
        ),
        (b"video: {frames: 4\nhead: {}\n", "x.yaml: line 2, column 5: not valid YAML ("),
        (b"video: {\0}\n", "x.yaml: not valid YAML (unacceptable character #x0000"),
        (b"head: {}\nrun:\n  dir: ''\n", "x.yaml: line 3: run.dir is empty text; give it a value, or delete the line"),
        (b"head: {}\ndata: &a {root: *a}\n", "x.yaml: line 2: this value contains an alias to itself; write it out"),
        (b"head:\n  scores: &a [question, *a]\n", "x.yaml: line 2: this value contains an alias to itself"),
        (b"&a {data: {? *a : b}}\n", "x.yaml: line 1: this value contains an alias to itself"),
        (b"head: {}\nvideo: {timeout_s: 1:30}\n", "x.yaml: line 2: 1:30 is 90 in YAML; write 90, or '1:30' in quotes"),
        (b"train: {epochs: 010}\n", "x.yaml: line 1: 010 is 8 in YAML; write 8, or '010' in quotes for text"),
        (b"run: {dir: off}\n", "run.dir is true or false; expected a path, in quotes"),
        (b"data: {name: 2024}\n", "data.name is 2024; expected text, in quotes"),
        (b"head: {}\nrun: {dir x}\n", "x.yaml: line 2: 'dir x' is not a name; expected `NAME: VALUE`, with a space"),
        (b"head: {name: psa,ratio:0.5}\n", "x.yaml: line 1: 'ratio:0.5' is not a name; expected `NAME: VALUE`"),
        (b"head name: psa\n", "x.yaml: line 1: 'head name' is not a name; expected `NAME: VALUE`"),
        (b"head: {1: psa}\n", "x.yaml: line 1: '1' is not a name; expected `NAME: VALUE`"),
        (b"? [a]\n: b\n", "x.yaml: line 1: a list or mapping is not a name; expected `NAME: VALUE`"),
        (b"# nothing yet\n", "x.yaml: contains no options; expected sections such as `head: {ratio: 0.5}`"),
        (b"- video\n", "x.yaml: line 1: not a mapping; expected sections such as `head: {ratio: 0.5}`"),
        (b"data: {root: a\xff}\n", "x.yaml: not UTF-8 text at byte 14; expected the YAML file of an experiment"),
    ],
)
def test_an_ambiguous_or_invalid_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unambiguous_numbers_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("train: {epochs: 1_0, seed: 07, lr: 1e-3}\ndata: {name: '1:30', root: '010', clips: 1:99}\n")
    config = load_config(file)
    assert (config.train.epochs, config.train.seed, config.train.lr) == (10, 7, 1e-3)
    assert (config.data.name, config.data.root, config.data.clips) == ("1:30", Path("010"), "1:99")


def test_an_alias_to_an_earlier_value_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("run: {dir: &d runs/a, table: *d}\nhead: {scores: [question]}\n")
    assert load_config(file).run.table == Path("runs/a")


def test_a_misspelled_config_path_suggests_a_file_but_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kitchen.yaml").write_text("head: {ratio: 0.5}\n")
    (tmp_path / "dir.yaml").mkdir()
    expected = "expected the YAML file of an experiment; examples are in configs/\n"
    for name, end in {
        "kitchn.yaml": f"did you mean {tmp_path / 'kitchen.yaml'}?\n",
        "n.yaml": expected,
        "dir.yaml": f"which is not a file; {expected}",
        "kitchen.yaml/": f"kitchen.yaml/', which ends in a slash; did you mean {tmp_path / 'kitchen.yaml'}?\n",
    }.items():
        with pytest.raises(SystemExit):
            parse("--config", f"{tmp_path}/{name}")
        assert capsys.readouterr().err.endswith(end)


def test_print_config_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--print_config")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{name.split('.')[1]}:" in shown for name in option_names())


@pytest.mark.parametrize("text", ["{video: {frames: 4, frames: 8}}", "{video: {frames: 4}, video: {size: 64}}"])
def test_a_duplicate_key_on_the_command_line_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        parse("--config", text)
    assert usage.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config: line 1: key '" in line
    assert "is used twice; expected each key once" in line
    assert parse("--config", "{video: {frames: 4}}").video.frames == 4


@pytest.mark.parametrize("args", [[], ["--head.ratio", "0.5"]])
def test_a_missing_config_option_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        parse_config(ConfigParser(prog="train fit"), args)
    assert usage.value.code == 2
    assert capsys.readouterr().err == (
        "train fit: error: no --config; expected --config FILE, the YAML file of an experiment; examples are in "
        "configs/\n"
    )


@pytest.mark.parametrize("args", [["--run.dir", ""], ["--run.dir="], ["--head.ratio", "0.5", "--run.dir", "", "x"]])
def test_an_empty_option_value_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        parse(*args)
    assert usage.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: --run.dir is empty; expected a value")


def nullable(name: str) -> bool:
    section, option = name.split(".")
    return type(None) in get_args(get_type_hints(get_type_hints(Config)[section])[option])


@pytest.mark.parametrize("name", option_names())
def test_null_is_accepted_only_by_nullable_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    section, option = name.split(".")
    for args in (["--config", f"{{{section}: {{{option}: null}}}}"], [f"--{name}", "null"]):
        if nullable(name):
            assert getattr(getattr(parse(*args), section), option) is None
            continue
        with pytest.raises(SystemExit) as usage:
            parse(*args)
        assert usage.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"test: error: {name} is null; expected ")


@pytest.mark.parametrize("args", [["--config", "{run: {dir: }}"], ["--config", "{run: {dir: ~}}"], ["--run.dir=~"]])
def test_an_empty_yaml_value_and_a_tilde_count_as_null(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*args)
    assert capsys.readouterr().err == "test: error: run.dir is null; expected a folder\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("store.path", "a folder"),
        ("run.dir", "a folder"),
        ("data.name", "text"),
        ("data.split", "one of direct, indirect"),
        ("video.sampling", "uniform"),
        ("engine.workers", "a whole number or auto"),
        ("engine.max_errors", "a number"),
        ("head.levels", "a list in brackets, with one of patch, frame, video"),
        ("head.readers", "one of 1, 3"),
    ],
)
def test_the_refusal_of_null_says_what_is_expected(name: str, expected: str) -> None:
    assert refusal_of_null(name) == f"{name} is null; expected {expected}"


def test_null_is_refused_in_a_section_built_in_python() -> None:
    with pytest.raises(ValueError, match=r"^data\.root is null; expected a folder$"):
        DataConfig(root=None)  # type: ignore[arg-type]


def test_help_fits_a_screen_and_help_all_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 50
    assert all(name.partition(".")[2] in shown for name in option_names())
    with pytest.raises(SystemExit) as done:
        parse("--help-all")
    assert done.value.code == 0
    usage, shown = shown.splitlines()[0], capsys.readouterr().out
    assert shown.splitlines()[0] == usage
    assert usage.startswith("usage: egopatch ")
    assert all(f"--{name} " in shown for name in option_names())


def test_custom_data_is_titled_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DataConfig(name="jsonl", root=Path("data/mine")).title == "data/mine"
    assert DataConfig(name="jsonl", root=tmp_path / "kitchen").title == "kitchen"
    assert DataConfig(name="jsonl", root=tmp_path / "stores", questions="b.jsonl").title == "stores/b.jsonl"
    assert DataConfig(split="indirect").title == "indirect"
    (tmp_path / "kitchen" / "runs").mkdir(parents=True)
    for folder, root in (("kitchen", "."), ("kitchen/runs", "..")):
        monkeypatch.chdir(tmp_path / folder)
        assert DataConfig(name="jsonl", root=Path(root)).title == "kitchen"
        assert DataConfig(name="jsonl", root=Path(root), questions="b.jsonl").title == "kitchen/b.jsonl"


@pytest.mark.parametrize("name", ["dir", "table"])
def test_a_url_as_a_results_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.{name} is 's3://bucket/runs', which is a URL; expected a path"):
        RunConfig(**{name: Path("s3://bucket/runs")})  # type: ignore[arg-type]
    assert str(RunConfig(dir=Path("a:b/c")).dir) == "a:b/c"


def test_the_home_folder_is_expanded_in_files_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("data: {root: ~/videos}\nstore: {path: ~/store}\n")
    config = parse("--config", str(file), "--run.dir=~/runs/psa")
    assert (config.data.root, config.store.path) == (tmp_path / "videos", str(tmp_path / "store"))
    assert config.run.dir == tmp_path / "runs/psa"
    assert StoreConfig(path="a/~/b").path == "a/~/b"
