"""One file over HTTP: resumed, checked, refused. The server listens on loopback and misbehaves as told."""

import gzip
import hashlib
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from egopatch.extract.fetch import download
from egopatch.extract.fetch.download import DownloadError, fetch, part_of, remote_size
from tests.extract.fetch.loopback import Served, Server, serving

CONTENT = random.Random(0).randbytes(1_000_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    with serving() as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "a.bin"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def interrupted(server: Server, file: Path, etag: str | None = '"one"') -> None:
    """Begin to download /a, and give up after 600,000 bytes."""
    server.files["/a"] = Served(CONTENT, drops=[600_000, 0, 0, 0], etag=etag)
    with pytest.raises(DownloadError, match=r"interrupted after 600000 bytes; run the same command again to resume"):
        fetch(server.link("/a"), file, None)


def test_file_is_downloaded_and_verified(server: Server, file: Path) -> None:
    server.files["/a"] = Served(CONTENT)
    shown: list[tuple[int, int | None]] = []
    fetch(server.link("/a"), file, sha256(CONTENT), lambda *seen: shown.append(seen))
    assert file.read_bytes() == CONTENT
    assert left_in(file.parent) == ["a.bin"]
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert remote_size(server.link("/a")) == len(CONTENT)


def test_a_dropped_connection_is_resumed_with_a_range(server: Server, file: Path) -> None:
    server.files["/a"] = Served(CONTENT, drops=[500_000, 200_000])
    fetch(server.link("/a"), file, None)
    assert file.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=500000-", "bytes=700000-"]
    assert [asked.if_range for asked in server.asked] == [None, '"one"', '"one"']


def test_later_run_resumes_an_interrupted_download(server: Server, file: Path) -> None:
    interrupted(server, file)
    assert not file.exists()
    assert part_of(file).read_bytes() == CONTENT[:600_000]
    fetch(server.link("/a"), file, None)
    assert file.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=600000-"
    assert left_in(file.parent) == ["a.bin"]


def test_download_restarts_if_the_server_ignores_ranges(server: Server, file: Path) -> None:
    server.files["/a"] = Served(CONTENT, drops=[500_000], ranges=False)
    fetch(server.link("/a"), file, None)
    assert file.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=500000-"]


@pytest.mark.parametrize("etag", ['"two"', None])
def test_download_restarts_if_the_file_changed_on_the_server(server: Server, file: Path, etag: str | None) -> None:
    interrupted(server, file, etag and '"one"')
    server.files["/a"] = Served(CONTENT[::-1] + b"more", etag=etag)
    fetch(server.link("/a"), file, None)
    assert file.read_bytes() == CONTENT[::-1] + b"more"


def test_partial_download_of_another_link_is_not_resumed(server: Server, file: Path) -> None:
    interrupted(server, file, etag=None)
    server.files["/b"] = Served(CONTENT[::-1], etag=None)
    fetch(server.link("/b"), file, None)
    assert file.read_bytes() == CONTENT[::-1]


def test_fully_received_partial_file_is_finished_without_restarting(server: Server, file: Path) -> None:
    interrupted(server, file)
    part_of(file).write_bytes(CONTENT)
    fetch(server.link("/a"), file, sha256(CONTENT))
    assert file.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=1000000-"


def test_a_tampered_file_is_refused_with_both_hashes(server: Server, file: Path) -> None:
    server.files["/a"] = Served(CONTENT[:-1] + b"!")
    with pytest.raises(DownloadError) as error:
        fetch(server.link("/a"), file, sha256(CONTENT))
    message = str(error.value)
    assert "\n" not in message
    for word in (str(file), sha256(CONTENT), sha256(CONTENT[:-1] + b"!"), "delete the file's entry from the lock file"):
        assert word in message
    assert left_in(file.parent) == []


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (None, "the server answers 404 Not Found; see the publisher's page"),
        (Served(b"", status=403), "the server answers 403 Forbidden"),
        (Served(b"", status=503), "the server answers 503 Service Unavailable; run the same command again"),
        (
            Served(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"}),
            "the server sent a web page; expected a file",
        ),
        (Served(CONTENT, announced=len(CONTENT) + 10), "announced 1000010 bytes but has none after 1000000"),
    ],
)
def test_failed_or_invalid_response_is_reported_in_one_line(
    server: Server, file: Path, served: Served | None, message: str
) -> None:
    if served is not None:
        server.files["/a"] = served
    with pytest.raises(DownloadError, match=message) as error:
        fetch(server.link("/a"), file, None)
    assert "\n" not in str(error.value)
    assert server.link("/a") in str(error.value)
    assert not file.exists()


def test_too_short_content_length_is_caught_by_the_locked_hash(server: Server, file: Path) -> None:
    server.files["/a"] = Served(CONTENT, announced=10)
    with pytest.raises(DownloadError, match="does not serve the locked file"):
        fetch(server.link("/a"), file, sha256(CONTENT))
    assert not file.exists()


def test_file_with_a_content_encoding_is_not_decompressed(server: Server, file: Path) -> None:
    packed = gzip.compress(CONTENT)
    server.files["/a.tgz"] = Served(packed, headers={"Content-Encoding": "x-gzip"}, drops=[300_000])
    fetch(server.link("/a.tgz"), file, None)
    assert file.read_bytes() == packed


def test_unreachable_server_is_reported_in_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
    with pytest.raises(
        DownloadError, match=r"cannot reach 127\.0\.0\.1:\d+ \(.*Connection refused.*\); run the same command again"
    ) as error:
        fetch(dead, file, None)
    assert "\n" not in str(error.value)
    assert left_in(file.parent) == []
    assert remote_size(dead) is None


def test_insufficient_disk_space_is_refused_before_downloading(
    server: Server, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a"] = Served(CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 9, 9))
    with pytest.raises(DownloadError, match=r"1.0 MB remain to be downloaded, but .* has 9 B free"):
        fetch(server.link("/a"), file, None)
    assert left_in(file.parent) == []


def test_concurrent_download_of_the_same_file_is_refused(server: Server, file: Path) -> None:
    gate = threading.Event()
    server.files["/a"] = Served(CONTENT, gate=gate)
    first = threading.Thread(target=fetch, args=(server.link("/a"), file, None))
    first.start()
    while not server.asked:
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process is downloading this file"):
        fetch(server.link("/a"), file, None)
    gate.set()
    first.join()
    assert file.read_bytes() == CONTENT
