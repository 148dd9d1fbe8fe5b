"""The documentation builds as a site: every link and anchor holds, and nothing in it comes from another host."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a browser loads by itself; links that a reader follows are not among it.
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*\shref=[\"']?(?:https?:)?//"
)
IN_CSS = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imported here, because quick tests do not need them.
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with mock.patch.dict(os.environ, {"NO_MKDOCS_2_WARNING": "1"}):
        # In this process, which has imported torch already; the config makes any warning an error.
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.mark.slow
def test_site_is_complete_and_loads_no_external_resources(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not IN_CSS.search(sheet.read_text(encoding="utf-8")), sheet
    # Every page of docs/ is there, and so is every option and command.
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    assert "head.ratio" in (site / "reference" / "config.html").read_text(encoding="utf-8")
    assert 'id="egopatch-train-fit"' in (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "select_attend" in (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))
