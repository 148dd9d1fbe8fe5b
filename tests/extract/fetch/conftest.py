import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from egopatch.extract.fetch import download
from tests.extract.fetch.loopback import Served, serving
from tests.extract.fetch.published import TOKENIZER, Published
from tests.extract.fetch.test_archives import tar


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    with serving() as server:
        made = tmp_path / "made"
        made.mkdir()
        contents = {
            "/Data.tgz": tar(made / "a", {"Data/qa/direct/answer_set.txt": b"<UNK0>\n<UNK1>\n"}).read_bytes(),
            "/qa_videos.tgz": tar(made / "b", {"qa_videos/k1|P1|10|95.mp4": b"video" * 9999}).read_bytes(),
            "/Net.pth": os.urandom(300_000),
            **{f"/{file}": b'{"a": 1}' for file in TOKENIZER},
        }
        server.files = {path: Served(content) for path, content in contents.items()}
        one = Published(tmp_path, server, contents)
        one.write_sources()
        yield one
