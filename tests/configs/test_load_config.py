"""Configs that Python code loads, as in a notebook."""

from pathlib import Path

import pytest

from egopatch.configs.command_line import ConfigParser, load_config, parse_options
from egopatch.configs.schema import ConfigError


def test_mistakes_in_python_raise_the_same_line_and_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("head: {ratio: 0.5}\n")
    for text, path, overrides in (
        ("store: {shrad: 8}\n", file, []),
        ("head: {ratio: 2}\n", file, []),
        ("head: {}\nrun:\n", file, []),
        ("head: {ratio: many}\n", file, []),
        ("head: {}\n", file, ["--head.ratoi", "0.5"]),
        ("head: {}\n", file, ["--video.timeout_s", "1:30"]),
        ("head: {}\n", file, ["--run.dir", "null"]),
        ("head: {}\n", tmp_path / "y.yaml", []),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_config(path, overrides)
        assert capsys.readouterr() == ("", "")
        with pytest.raises(SystemExit, match="2"):
            parse_options(ConfigParser(prog="test"), ["--config", str(path), *overrides])
        assert capsys.readouterr().err == f"test: error: {refused.value}\n"


def test_an_error_about_an_option_names_the_file_and_the_line_that_set_it(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for text, overrides, expected in (
        ("head: {ratoi: 0.5}", [], "line 1: head.ratoi is not an option; did you mean head.ratio?"),
        ("haed:\n  ratio: 0.5", [], "line 2: haed.ratio is not an option; did you mean head.ratio?"),
        ("head: {}\nbogus: 1", [], "line 2: bogus is not an option; the sections are data, video, "),
        ("head:\n  width: 64\n  ratio: 3", [], "line 3: head.ratio is 3.0; expected a share in (0, 1]"),
        ("head: {}\ntrain: {epochs: many}", [], "line 2: train.epochs is 'many'; expected a whole number"),
        ("store: {path: 's3://key@bucket/x'}", [], "line 1: store.path holds a user, "),
        # The command line sets the option.
        ("head: {ratio: 3}", ["--head.ratio", 2], "head.ratio is 2.0; expected a share in (0, 1]"),
        ("head: {width: 64}", ["--head.ratio", 2], "head.ratio is 2.0; expected a share in (0, 1]"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_config(file, overrides)
        assert str(refused.value).startswith(expected if overrides else f"--config {file}: {expected}")


def test_overrides_in_python_are_a_list_of_any_values(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("head: {}\n")
    config = load_config(file, ["--head.ratio", 0.5, "--run.dir", tmp_path])
    assert (config.head.ratio, config.run.dir) == (0.5, tmp_path)
    with pytest.raises(ConfigError, match=r"^overrides is '--head\.ratio 0\.5'; expected a list such as \["):
        load_config(file, "--head.ratio 0.5")
    with pytest.raises(ConfigError, match=r"^overrides is \{'head\.ratio': 0\.5\}; expected a list such as \["):
        load_config(file, {"head.ratio": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^path is None; expected the YAML file of an experiment"):
        load_config(None)  # type: ignore[arg-type]


def test_options_of_a_head_keep_their_types(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("head: {options: {a: '1:30', b: '010', c: 'on', d: 1e-3, e: [1], f: null}}\n")
    kept = {"a": "1:30", "b": "010", "c": "on", "d": 0.001, "e": [1], "f": None}
    assert load_config(file).head.options == kept
    assert load_config(
        file, ["--head.options.c", "off", "--head.options.g='2'", "--head.options.h", "a b"]
    ).head.options == {**kept, "c": False, "g": "2", "h": "a b"}
    assert load_config(file, ["--head.options", "{a: '2', c: 'on'}", "--head.options.d", "1e-3"]).head.options == {
        "a": "2",
        "c": "on",
        "d": 0.001,
    }
