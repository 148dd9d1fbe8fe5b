"""Downloading one file: an interrupted download resumes, and a file with another hash is refused.

`fetch` is pooch's `retrieve` with our own downloader, because pooch's restarts from zero. Bytes go to `FILE.part`,
which survives a broken connection and Ctrl-C; the next request asks for the rest (RFC 9110, Range with If-Range) and
restarts if the server cannot resume or has another file by now.
"""

import fcntl
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests
import urllib3

from egopatch.features.common.disk import free_bytes
from egopatch.features.common.units import format_bytes
from egopatch.features.io.files import lock_file

BLOCK = 1 << 16
ATTEMPTS = 3
WAIT_S = 1.0
TIMEOUT_S = 30.0
# By default, requests would decompress everything that a server labels as compressed, such as every .tgz.
_UNCHANGED = {"Accept-Encoding": "identity"}
_RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)

OnProgress = Callable[[int, int | None], None]


class DownloadError(RuntimeError):
    """A download failed; the message names the file, the cause and what to do, in one line."""


class _Interrupted(Exception):
    """An attempt ended early; the part file keeps the bytes received. The message is the reason."""


def fetch(link: str, file: Path, sha256: str | None, on_progress: OnProgress = lambda done, total: None) -> None:
    """Download `link` to `file`, which does not exist yet.

    Args:
        link: Link, http or https.
        file: Path that the complete file is moved to at the end; missing folders are created.
        sha256: Expected SHA-256; None accepts any content.
        on_progress: Called with the number of bytes received and the total, which is None if the server omits it.

    Raises:
        DownloadError: The server refuses, cannot be reached or disconnects repeatedly, the disk is too small, or the
            hash differs; `file` is then not created.
    """
    pooch.get_logger().setLevel(logging.WARNING)
    with _exclusive(part_of(file)):
        try:
            pooch.retrieve(
                link,
                known_hash=None if sha256 is None else f"sha256:{sha256}",
                fname=file.name,
                path=file.parent,
                downloader=_ResumingDownloader(link, part_of(file), on_progress),
            )
        except ValueError as error:  # pooch raises it if the hash differs
            raise DownloadError(
                f"{file}: {link} does not serve the locked file, so nothing was saved ({str(error).split('. ')[0]}). "
                "If the publisher has a new version that you want, delete the file's entry from the lock file and "
                "run the same command again; otherwise get the locked file elsewhere and put it there"
            ) from None


def part_of(file: Path) -> Path:
    """The file that holds the bytes of an unfinished download."""
    return file.with_name(f"{file.name}.part")


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def remote_size(link: str) -> int | None:
    """Size that the server announces; None if it omits it or cannot be reached."""
    try:
        with requests.head(link, headers=_UNCHANGED, timeout=TIMEOUT_S, allow_redirects=True) as response:
            return _number(response.headers.get("Content-Length")) if response.status_code == 200 else None
    except requests.RequestException:
        return None


@dataclass
class _ResumingDownloader:
    """A downloader for pooch that resumes an interrupted download.

    Args:
        link, on_progress: As in `fetch`.
        part: File that collects the bytes.
    """

    link: str
    part: Path
    on_progress: OnProgress

    def __call__(self, _link: str, output_file: str, _pooch: object = None) -> None:
        """Download all of the link to `output_file`.

        Raises:
            DownloadError: As in `fetch`.
        """
        reached, failures = self._size(), 0
        with requests.Session() as session:
            while True:
                try:
                    self._attempt(session)
                    break
                except _Interrupted as reason:
                    failures = 0 if self._size() > reached else failures + 1
                    reached = max(reached, self._size())
                    if failures == ATTEMPTS:
                        raise DownloadError(
                            f"{self.link}: {reason}; run the same command again to resume, or add --offline to see "
                            "what to put where"
                        ) from None
                    time.sleep(WAIT_S * 2**failures)
        self.part.replace(output_file)
        _state_of(self.part).unlink(missing_ok=True)

    def _attempt(self, session: requests.Session) -> None:
        total, validator = self._known()
        have = self._size()
        headers = dict(_UNCHANGED)
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with session.get(self.link, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
                whole = total if total is not None else _content_range(response)[1]
                if response.status_code == 416 and have == whole:
                    return  # everything had arrived before the connection broke
                self._check(response, have, total)
                if response.status_code == 200:
                    have, total = 0, _number(response.headers.get("Content-Length"))
                else:
                    total = _content_range(response)[1]
                self._check_disk(have, total)
                self._remember(total, response)
                self._receive(response, have, total)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Interrupted(_reason(self.link, error, self._size())) from None
        if total is not None and self._size() != total:
            raise _Interrupted(f"the server announced {total} bytes but sent {self._size()}")

    def _check(self, response: requests.Response, have: int, total: int | None) -> None:
        """Refuse a response that is not the requested file; empty the part file if it cannot be continued."""
        status = response.status_code
        if status in _RETRY_STATUSES:
            raise _Interrupted(f"the server answers {status} {response.reason}")
        start, size = _content_range(response)
        if status == 416:
            self._forget()
            raise _Interrupted(f"the server announced {total} bytes but has none after {have}")
        if status == 206 and (start != have or (total is not None and size != total)):
            self._forget()
            raise _Interrupted("the file on the server has changed since the download began")
        if status not in (200, 206):
            raise DownloadError(
                f"{self.link}: the server answers {status} {response.reason}; see the publisher's page for a new link"
            )
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError(f"{self.link}: the server sent a web page; expected a file: see the publisher's page")

    def _check_disk(self, have: int, total: int | None) -> None:
        free = free_bytes(self.part)
        if total is not None and total - have > free:
            raise DownloadError(
                f"{self.link}: {format_bytes(total - have)} remain to be downloaded, but {self.part.parent} has "
                f"{format_bytes(free)} free; free some disk space"
            )

    def _receive(self, response: requests.Response, have: int, total: int | None) -> None:
        with self.part.open("r+b") as out:
            out.truncate(have)
            out.seek(have)
            for block in response.raw.stream(BLOCK, decode_content=False):
                out.write(block)
                self.on_progress(out.tell(), total)

    def _size(self) -> int:
        return self.part.stat().st_size

    def _known(self) -> tuple[int | None, str | None]:
        """Size and validator of the file that is being downloaded; empties a part file of another link."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(_state_of(self.part).read_text(encoding="utf-8"))
            if state["url"] == self.link:
                return state["total"], state["validator"]
        self._forget()
        return None, None

    def _remember(self, total: int | None, response: requests.Response) -> None:
        etag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        _state_of(self.part).write_text(
            json.dumps({"url": self.link, "total": total, "validator": validator}), encoding="utf-8"
        )

    def _forget(self) -> None:
        with self.part.open("r+b") as file:
            file.truncate(0)
        _state_of(self.part).unlink(missing_ok=True)


@contextmanager
def _exclusive(part: Path) -> Iterator[None]:
    """Lock the part file against other processes; it exists inside the block."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as handle:
        try:
            lock_file(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, part)
        except BlockingIOError:
            raise DownloadError(f"{part}: another process is downloading this file; wait for it to finish") from None
        try:
            yield
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
                _state_of(part).unlink(missing_ok=True)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size in the header of a 206 or 416 response."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    return (_number(found[1]), int(found[2])) if found else (None, None)


def _reason(link: str, error: Exception, have: int) -> str:
    if isinstance(error, requests.ConnectionError) and not isinstance(error, requests.exceptions.ChunkedEncodingError):
        cause = getattr(error.args[0] if error.args else None, "reason", error)
        return f"cannot reach {urlsplit(link).netloc} ({str(cause).split(': ', 1)[-1]})"
    return f"the connection was interrupted after {have} bytes"
