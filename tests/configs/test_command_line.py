"""Options of a command line: errors that name them, values that are refused, and the experiment among them."""

import os
from pathlib import Path

import pytest
from jsonargparse.typing import PositiveFloat, PositiveInt

from egopatch.configs.command_line import ConfigParser, parse_options
from egopatch.configs.experiment_line import experiment_in


def test_a_command_without_config_names_its_own_options_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ConfigParser(prog="demo")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--most-clips", type=PositiveInt | None, default=None)
    parser.add_argument("--clip-seconds", type=PositiveFloat | None, default=None)
    parser.add_argument("file", metavar="VIDEO", type=Path)
    for wrong, expected in (
        (["a.mp4", "--smal"], "unrecognized arguments: --smal; did you mean --small?"),
        (["--", "-a.mp4", "--small"], "unrecognized arguments: --small; options stand before --"),
        (["a.mp4", "--zzz"], "the options are --help, --small, --most-clips, --clip-seconds"),
        (["a.mp4", "--clip-seconds", "ten"], "--clip-seconds is 'ten'; expected a number above 0 or null"),
        (["a.mp4", "--clip-seconds", "-1"], "--clip-seconds is -1; expected a number above 0 or null"),
        (["a.mp4", "--most-clips", "0"], "--most-clips is 0; expected a whole number above 0 or null"),
        ([], "missing VIDEO; `egopatch demo --help` describes it"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("demo: error: ")
        assert line.endswith(expected)


def test_a_list_option_without_brackets_is_refused_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ConfigParser(prog="demo")
    parser.add_argument("--seeds", type=list[int], default=[0])
    for value, example in (("a", "[a]"), ("a,b", "[a,b]"), ("a b", "[a,b]")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--seeds", value])
        expected = f"demo: error: --seeds is '{value}'; expected a list in brackets: '{example}'\n"
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize("value", ["0.1,0.5", "0.1 0.5", "[0.1, 0.5]"])
def test_several_values_in_one_are_refused_with_an_example(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ConfigParser(prog="demo")
    parser.add_argument("--ratios", type=float, nargs="+", default=None)
    for args in (["--ratios", value], [f"--ratios={value}"], ["--ratios", "1", value]):
        with pytest.raises(SystemExit):
            parser.parse_args(args)
        expected = f"demo: error: --ratios is '{value}'; several values are separated by spaces: --ratios 0.1 0.5\n"
        assert capsys.readouterr().err == expected


def test_a_value_with_a_colon_is_refused_as_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    """YAML reads 1:30 as 90, which jsonargparse would accept silently."""
    parser = ConfigParser(prog="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--start", type=float | None, default=None)
    parser.add_argument("--clip", type=str | None, default=None)
    for wrong in (["--seeds", "3", "1:30"], ["--start=1:30"], ["--start", "1:30.5"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(wrong)
        option, value = wrong[0].partition("=")[0], wrong[-1].rpartition("=")[2]
        assert capsys.readouterr().err == f"demo: error: {option} is '{value}'; expected a number without a colon\n"
    assert parser.parse_args(["--seeds", "3", "--clip", "1:30"]).clip == "1:30"
    assert parse_options(ConfigParser(prog="demo"), ["--data.root", "1:30"])[0].data.root == Path("1:30")


def test_the_experiment_in_a_command_line_has_the_options_of_a_head() -> None:
    experiment = ["--config", "a.yaml", "--head.ratio", "0.5", "--head.options.x", "3", "--head.options.y=4"]
    assert experiment_in(["--json", *experiment, "--top", "3"]) == experiment


def test_a_pipe_as_config_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"head: {ratio: 0.5}\n")
    os.close(writer)
    with os.fdopen(reader), pytest.raises(SystemExit):
        parse_options(ConfigParser(prog="demo"), ["--config", f"/dev/fd/{reader}"])
    expected = (
        f"demo: error: --config /dev/fd/{reader}: is a pipe, and a config is read several times; expected a YAML file\n"
    )
    assert capsys.readouterr().err == expected
