"""Plugin names: which package registers them, and the one-line error that names a broken package."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from egopatch.configs.plugins import Plugins, traceback_kept
from egopatch.configs.schema import Config, ConfigError, DataConfig, EncoderConfig, HeadConfig
from egopatch.extract.datasets import PARTS, Clip, Dataset, DatasetError, Question, load_dataset, register_dataset
from egopatch.extract.datasets.records import answer_vocabulary
from egopatch.extract.datasets.registry import _PLUGINS as DATASETS
from egopatch.extract.encoders import Checkpoint, find_network, input_transform, load_video_encoder, register_encoder
from egopatch.extract.encoders.networks import lite
from egopatch.extract.run import extract_together
from egopatch.train.heads import Head, check_head, register_head
from egopatch.train.heads.registry import _PLUGINS as HEADS

GROUP = "egopatch.tests"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package as pip does: a module and its metadata."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(package: str, module: str, code: str, group: str = GROUP, **points: str) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {module}:{value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))

    return installed


@pytest.fixture
def plugins() -> Plugins[str]:
    def fault(_: str, plugin: object) -> str | None:
        return None if isinstance(plugin, str) else f"is of type {type(plugin).__name__}; expected a str"

    return Plugins("thing.name", GROUP, ("own",), fault)


def test_a_package_is_imported_only_when_its_name_is_used(plugins: Plugins[str], install: Install) -> None:
    install("pkg-a", "pkg_a", "A = 'of a'", first="A")
    install("pkg-b", "pkg_b", "B = 'of b'", second="B")
    assert plugins.find("second") == "of b"
    assert plugins.package_of("second") == "pkg-b 1.2"
    assert "pkg_a" not in sys.modules
    assert plugins.find("own") is None
    assert plugins.package_of("own") is None


def test_an_unknown_name_lists_the_choices_and_the_nearest(plugins: Plugins[str], install: Install) -> None:
    install("pkg-c", "pkg_c", "C = 'of c'", third="C")
    plugins.register("called", "by a call")
    with pytest.raises(ConfigError, match=r"thing\.name is 'thrid'; expected one of called, own, third; did you mean"):
        plugins.find("thrid")
    register = r"expected one of .*; if a script registers it, start the command from that script; a package offers it"
    with pytest.raises(ConfigError, match=register):
        plugins.find("of a script")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('no GPU,\\nno work')", r"cannot be imported \(RuntimeError: no GPU, no work\)"),
        ("import missing_module", r"cannot be imported \(ModuleNotFoundError: No module named 'missing_module'\)"),
        ("import sys; sys.exit('bye')", r"cannot be imported \(SystemExit: bye\)"),
        ("D = 5", "is of type int; expected a str"),
        ("", r"cannot be imported \(AttributeError: "),
    ],
)
def test_a_broken_package_gives_a_one_line_error_naming_it(
    code: str, why: str, plugins: Plugins[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pkg-d", "pkg_d", code, fourth="D")
    monkeypatch.delitem(sys.modules, "pkg_d", raising=False)
    with pytest.raises(ConfigError, match=f"thing.name is 'fourth', but .*pkg-d 1.2.*{why}") as caught:
        plugins.find("fourth")
    assert "\n" not in str(caught.value)


def test_taken_names_are_refused(plugins: Plugins[str], install: Install) -> None:
    install("pkg-e", "pkg_e", "E = 'of e'", own="E", fifth="E", sixth="E")
    install("pkg-f", "pkg_f", "F = 'of f'", sixth="F")
    with pytest.raises(ConfigError, match=r"'own' is registered by egopatch and by pkg-e 1\.2; uninstall one"):
        plugins.find("own")
    with pytest.raises(ConfigError, match=r"'sixth' is registered by pkg-. 1.2 and by pkg-. 1.2"):
        plugins.find("sixth")
    with pytest.raises(ConfigError, match="'own' is already registered by egopatch; use another name"):
        plugins.register("own", "mine")
    with pytest.raises(ConfigError, match=r"'fifth' is already registered by pkg-e 1\.2; use another name"):
        plugins.register("fifth", "mine", replace=True)
    plugins.register("seventh", "first")
    with pytest.raises(ConfigError, match=r"'seventh' is already registered by an earlier call; .* replace=True"):
        plugins.register("seventh", "second")
    plugins.register("seventh", "second", replace=True)
    assert plugins.find("seventh") == "second"
    with pytest.raises(ConfigError, match="'eighth' cannot be registered: it is of type int; expected a str"):
        plugins.register("eighth", 8)  # type: ignore[arg-type]


def test_built_in_names_cannot_be_registered_again() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.arch 'lite' is already registered by egopatch"):
        register_encoder(lite.NETWORK)
    with pytest.raises(ConfigError, match=r"data\.name 'jsonl' is already registered by egopatch"):
        register_dataset("jsonl", lambda _: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("wrong", [3, Head, "mine", None, [lite.NETWORK]])
def test_registering_an_object_of_the_wrong_type_is_refused(wrong: object) -> None:
    kind = type(wrong).__name__
    with pytest.raises(ConfigError) as refused:
        register_encoder(wrong)  # type: ignore[arg-type]
    assert str(refused.value) == (
        f"register_encoder was given {wrong!r}, which is of type {kind}; expected an extract.encoders.Network"
    )
    with pytest.raises(ConfigError) as refused:
        register_head(wrong)  # type: ignore[arg-type]
    assert str(refused.value) == (
        f"register_head was given {wrong!r}, which is of type {kind}; expected a train.heads.Head"
    )


@pytest.mark.parametrize("name", ["", 5, None])
def test_a_plugin_without_a_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=rf"^the name to register as head\.name is {name!r}; expected text, such as"):
        register_head(Head(name, lambda options, sizes: nn.Identity()))  # type: ignore[arg-type]
    assert name not in HEADS._registered


def test_registering_a_data_set_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.name 'mine' cannot be registered: it is of type int; expected a func"
    ):
        register_dataset("mine", 3)  # type: ignore[arg-type]


def test_swapped_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"expected text, such as 'mine': the arguments are swapped, give 'squares'"):
        register_dataset(lambda _: GOOD, "squares")  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["reads_video", "stacks", "captures"])
def test_a_flag_of_a_head_that_is_no_truth_value_is_refused(flag: str) -> None:
    head = replace(Head("mine", lambda _, __: nn.Identity()), **{flag: "no"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"it is a Head whose {flag} is 'no'; expected True or False"):
        register_head(head)


def test_a_function_that_takes_other_arguments_is_refused_in_one_line() -> None:
    """Called, each would raise a TypeError whose traceback shows none of its own lines."""
    with pytest.raises(ConfigError, match=r"it is a Head whose build takes \(_\); expected a function of \(options, s"):
        register_head(Head("mine", lambda _: nn.Identity()))  # type: ignore[arg-type, misc]
    with pytest.raises(ConfigError, match=r"cannot be registered: it takes \(\); expected a function of \(data\)"):
        register_dataset("mine", lambda: None)  # type: ignore[arg-type, misc]
    wrong = {"build_video": lambda checkpoint: None, "transform": None, "build_text": 3, "locate": lambda: None}
    for name, function in wrong.items():
        network = replace(lite.NETWORK, name="mine", **{name: function})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"it is a Network whose {name} .*; expected a function of") as refused:
            register_encoder(network)
        assert str(refused.value).endswith("or a Transform") == (name == "transform")


def test_a_network_records_the_version_of_its_package(install: Install) -> None:
    code = "import dataclasses\nfrom egopatch.extract.encoders.networks import lite\n"
    code += "N = dataclasses.replace(lite.NETWORK, name='light')"
    install("pkg-g", "pkg_g", code, "egopatch.encoders", light="N", other="N")
    assert find_network("light").plugin == "pkg-g 1.2"
    assert find_network("lite").plugin is None
    with pytest.raises(ConfigError, match=r"pkg_g:N in the package pkg-g 1\.2 is a Network called 'light'"):
        find_network("other")


def test_a_data_set_function_returning_the_wrong_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: [1, 2])
    with pytest.raises(ConfigError, match=r"data\.name is 'mine', but the function that .* returns a list; expected"):
        load_dataset(DataConfig(name="mine"))


@dataclass(frozen=True)
class Options:
    hidden: int = 16
    kind: str = "a"

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; expected at least 1")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"hiden": 3}, "head.options.hiden is not an option; its options: hidden, kind$"),
        ({"hidden": "many"}, "head.options.hidden is 'many'; expected a whole number; its options: hidden, kind$"),
        ({"hidden": 0}, "hidden is 0; expected at least 1"),
    ],
)
def test_head_options_are_type_checked(options: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS._registered, "mine", Head("mine", lambda _, __: nn.Identity(), Options))
    check_head(HeadConfig(name="mine", options={"hidden": 3}))
    with pytest.raises(ConfigError, match=f"head.options of the head mine: .*{why}") as caught:
        check_head(HeadConfig(name="mine", options=options))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"head\.options is .*, but psa is a built-in head"):
        check_head(HeadConfig(name="psa", options=options))


CLIP, QUESTION = Clip("a", Path("a.mp4")), Question("1", "a", "what?", "a cup", "open", ())
ASKED = dict.fromkeys(PARTS, (QUESTION,))
GOOD = Dataset((CLIP,), ASKED, answer_vocabulary(["a cup"]), ("what?",), "mine")


def asked(**changed: object) -> dict[str, object]:
    """Questions with one wrong field."""
    return {"questions": dict.fromkeys(PARTS, (replace(QUESTION, **changed),))}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"clips": ()}, "clips is empty; expected at least one Clip"),
        ({"clips": (clip for clip in (CLIP,))}, "clips is of type generator; expected a tuple"),
        ({"texts": "what?"}, "texts is of type str; expected a tuple"),
        ({"clips": (CLIP, CLIP)}, "clip_id 'a' appears twice; expected each once"),
        ({"clips": (replace(CLIP, video="a.mp4"),)}, "clip 'a': video is 'a.mp4'; expected a pathlib.Path"),
        ({"clips": (replace(CLIP, clip_id=7),)}, "clip 7: clip_id is 7; expected a text"),
        ({"clips": (replace(CLIP, start_s=float("nan")),)}, "clip 'a': start_s is nan; expected seconds as an int or"),
        (
            {"clips": (replace(CLIP, end_s=np.int64(7)),)},
            r"end_s is np.int64\(7\); expected seconds as an int or a float",
        ),
        ({"clips": (replace(CLIP, start_s="1"),)}, "clip 'a': start_s is '1'; expected seconds as an int or a float"),
        ({"clips": (replace(CLIP, end_s=True),)}, "clip 'a': end_s is True; expected seconds as an int or a float"),
        ({"split": None}, "split is None; expected a text, such as data.split"),
        ({"free_answers": "no"}, "free_answers is 'no'; expected True or False"),
        (asked(options="ab"), "question '1': options is 'ab'; expected a tuple of texts"),
        (asked(options=(1, 2)), r"question '1': options is \(1, 2\); expected a tuple of texts"),
        ({"clips": ({"clip_id": "a"},)}, "clips contains {'clip_id': 'a'}; expected a Clip"),
        ({"clips": (replace(CLIP, clip_id="b"),)}, "question '1': clip_id 'a' is not in clips; add it there"),
        (
            {"questions": {"train": (QUESTION,)}},
            r"questions has the parts \['train'\]; expected \['train', 'val', 'test'\]",
        ),
        (
            {"questions": {**ASKED, "val": (QUESTION, QUESTION)}},
            "val question_id '1' appears twice; expected each once",
        ),
        ({"texts": ("who?",)}, "texts lacks 'what\\?'; make it with texts_of"),
        ({"texts": ()}, "texts lacks 'what\\?'; make it with texts_of"),
        (asked(text=" "), "question '1': text is ' '; expected the"),
        (asked(answer=""), "question '1': answer is ''; expected an answer, or options"),
        (asked(question_id=7), "train question 7: question_id is 7; expected a text"),
        (asked(answer="A cup"), "question '1': answer is 'A cup'; expected a text in lower case"),
        (asked(form="opne"), "question '1': form is 'opne'; expected open or binary"),
        (asked(tags=None), "question '1': tags is None; expected a tuple of texts"),
        (asked(tags="time"), "question '1': tags is 'time'; expected a tuple of texts"),
        (asked(tags=(3,)), r"question '1': tags is \(3,\); expected a tuple of texts"),
        (asked(variants=("who?",)), r"question '1': variants is \('who\?',\); expected a paraphrase and"),
        (asked(clip_id=None), "question '1': clip_id is None; expected the clip_id of a Clip"),
        ({"texts": ("what?", "what?")}, r"text 'what\?' appears twice; expected each once"),
        ({"texts": ("what?", 3)}, "texts contains 3; expected a text"),
        ({"answers": (*GOOD.answers, "a cup")}, "answer 'a cup' appears twice; expected each once"),
        ({"answers": (*GOOD.answers, "A hat")}, "answers contains 'A hat'; expected a text in lower case"),
        (
            {"texts": (), "questions": {**ASKED, "val": (replace(QUESTION, text="where?"),)}},
            "texts lacks 'what\\?' and 1 more; make it",
        ),
        ({"answers": ("a cup",)}, "answers lacks <UNK1>; make it with answer_vocabulary"),
        (asked(question_id="\udce9"), r"question_id is '\\udce9'; expected text without NUL or lone surrogates"),
        (asked(answer="a\0cup"), r"question '1': answer is 'a\\x00cup'; expected text without NUL or lone surrogates"),
        (asked(tags=("caf\udce9",)), r"question '1': tags is \('caf\\udce9',\); expected text without NUL or lone"),
        ({"answers": (*GOOD.answers, "\udce9")}, r"answers contains '\\udce9'; expected text without NUL or lone"),
        (
            {**asked(options=("a cup", "a hat")), "texts": ("a cup", "a hat", "what?")},
            r"answers contains 'a cup', but the questions have options; make it with answer_vocabulary\(\[\]\)",
        ),
    ],
)
def test_an_inconsistent_data_set_is_refused(
    changed: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: replace(GOOD, **changed))  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=f"data.name mine: .*{why}"):
        load_dataset(DataConfig(name="mine"))
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: GOOD)
    assert load_dataset(DataConfig(name="mine")) == GOOD


def test_lists_in_a_data_set_become_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {name: list(getattr(GOOD, name)) for name in ("clips", "answers", "texts")}
    listed = replace(GOOD, questions={part: [QUESTION] for part in reversed(PARTS)}, **lists)  # type: ignore[arg-type]
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: listed)
    assert load_dataset(DataConfig(name="mine")) == GOOD  # a list would never equal the answers of a trained head


@pytest.mark.parametrize(
    ("questions", "why"),
    [
        ([QUESTION], "^questions is of type list; expected a dict by part$"),
        ({**ASKED, "val": None}, r"^questions\['val'\] is of type NoneType; expected a tuple$"),
        ({**ASKED, "val": ({"question_id": "1"},)}, r"^questions\['val'\] contains {'question_id': '1'}; expected a Q"),
    ],
)
def test_questions_of_the_wrong_type_are_refused(questions: object, why: str) -> None:
    with pytest.raises(DatasetError, match=why):
        replace(GOOD, questions=questions)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_in_a_data_set_function_keeps_its_traceback(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: DataConfig) -> Dataset:
        raise error("at my line")

    monkeypatch.setitem(DATASETS._registered, "mine", load)
    # Raised unchanged, either error would become one line of `train fit`, without a traceback.
    with pytest.raises(RuntimeError, match=f"^the data set mine raises {error.__name__}: at my line$") as caught:
        load_dataset(DataConfig(name="mine"))
    assert "in load\n" in "".join(traceback.format_exception(caught.value))


def test_extracting_imported_features_without_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replace(GOOD, questions=dict.fromkeys(PARTS, ()), texts=())
    monkeypatch.setitem(DATASETS._registered, "mine", lambda _: silent)
    config = Config(data=DataConfig(name="mine"), encoder=EncoderConfig(arch="imported"))
    with pytest.raises(
        ConfigError, match="imported, and data set mine has no texts, so there is nothing to encode; gi"
    ):
        extract_together([config])


def test_dataset_error_accepts_a_single_string() -> None:
    assert DatasetError("no clips").problems == ("no clips",)


def test_head_options_must_be_a_dataclass_type() -> None:
    with pytest.raises(ConfigError, match="expected a dataclass, not an instance of one, or None"):
        register_head(Head("mine", lambda _, __: nn.Identity(), GOOD))  # type: ignore[arg-type]


def test_a_network_that_builds_the_wrong_type_is_refused(tmp_path: Path) -> None:
    network = replace(lite.NETWORK, build_video=lambda _, __: nn.Identity())  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="'lite', but its build_video returns a Identity; expected an extract"):
        load_video_encoder(network, Checkpoint(tmp_path, "bare", {}), size=64)


def test_a_transform_function_that_returns_the_wrong_type_is_refused(tmp_path: Path) -> None:
    network = replace(lite.NETWORK, transform=lambda path, size: "whole")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"'lite', but its transform returns a str; expected an extract\.video"):
        input_transform(network, tmp_path, 64)


def test_a_broken_pipe_in_plugin_code_is_passed_through() -> None:
    with pytest.raises(BrokenPipeError), traceback_kept("the head mine"):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("code", [0, 3, "no GPU here"])
def test_an_exit_in_plugin_code_is_an_error_of_that_code(code: int | str) -> None:
    # An exit code of 0 would call the work done, and 3 says that other processes hold its shards.
    with (
        pytest.raises(RuntimeError, match=f"^the head mine raises SystemExit: {code}$"),
        traceback_kept("the head mine"),
    ):
        sys.exit(code)
