"""The list of published files, and where its lock file is kept."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.__main__ import main
from egopatch.extract.fetch.required import required_files
from egopatch.extract.fetch.sources import DEFAULT_SOURCES, load_sources
from tests.extract.fetch.published import Published


def test_a_source_that_is_listed_twice_is_refused(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    sources = published.root / "twice.yaml"
    sources.write_text("datasets: {}\ncheckpoints: {a: {files: [x]}, a: {files: [y]}}\ntokenizers: {}\n")
    assert main([*published.args, "--sources", str(sources)]) == 2
    assert f"sources file {sources}: line 2: key 'a' is used twice; expected each key once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": None}, "expected one of the two"),
        ({"url": "ftp://x"}, "expected an http or https link"),
        ({"files": ["../x"]}, "expected names without"),
        ({"files": []}, "expected files"),
        ({"files": 5}, "files has 5; expected a list of names"),
        ({"files": "a.zip"}, "files has 'a.zip'; expected a list of names"),
        ({"files": {"a.zip": "qa"}}, "files has 'qa'; expected a list of names"),
        ({"terms": None}, "terms is None; expected a line of text"),
        ({"surprise": 1}, "has files, page, purpose, surprise, terms, url; expected files"),
    ],
)
def test_malformed_sources_are_refused(published: Published, change: dict[str, Any], message: str) -> None:
    published.write_sources(**change)
    with pytest.raises(ConfigError, match=message):
        load_sources(published.root / "sources.yaml")


def test_every_shipped_config_has_published_sources() -> None:
    """Everything that a shipped config needs is published, over https or with a manual step."""
    sources = load_sources(DEFAULT_SOURCES)
    every = [*sources.datasets.values(), *sources.checkpoints.values(), *sources.tokenizers.values()]
    assert all(source.by_hand or str(source.url).startswith("https://") for source in every)
    configs = sorted(Path("configs").glob("egotaskqa*.yaml"))
    assert len(configs) >= 4
    for path in configs:
        config = load_config(path)
        # With two slashes it cannot be a name on the hub, where anybody could publish under it.
        assert config.text.model.count("/") == 2, path
        wanted = required_files(config, sources)
        assert all(need.source is not None for need in wanted), path
        assert {need.file.name for need in wanted} >= {"Data.tgz", "qa_videos.tgz", "tokenizer.json"}, path


def test_packaged_sources_keep_their_lock_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own folder may be read-only."""
    monkeypatch.chdir(DEFAULT_SOURCES.parent)
    for path in (DEFAULT_SOURCES, Path("data_sources.yaml")):
        assert load_sources(path).lock_path == Path("data_sources.lock.json")
    own = tmp_path / "own.yaml"
    shutil.copy(DEFAULT_SOURCES, own)
    assert load_sources(own).lock_path == tmp_path / "own.lock.json"
