"""One file from one link: resumed where it stopped, refused where it is not what was expected.

`fetch` is pooch's `retrieve` with a downloader of our own, since pooch's starts again from nothing. Bytes go to
`FILE.part`, which outlives a broken connection and Ctrl-C; the next request asks for the rest (RFC 9110, Range with
If-Range) and starts over where the server cannot give it or holds another file by now.
"""

import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests
import urllib3

BLOCK = 1 << 16
ATTEMPTS = 3
WAIT_S = 1.0
TIMEOUT_S = 30.0
# As published. Left to itself, requests would unpack what a server labels as compressed, such as every .tgz.
_AS_IT_IS = {"Accept-Encoding": "identity"}
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)

Progress = Callable[[int, int | None], None]


class DownloadError(RuntimeError):
    """A file could not be had; one line that says which, why and what to do."""


class _BrokenOff(Exception):
    """An attempt ended early; what came is in the part file. The message is the reason."""


def fetch(link: str, file: Path, sha256: str | None, on_progress: Progress = lambda done, total: None) -> None:
    """Download `link` to `file`, which is not there yet.

    Args:
        link: http or https.
        file: where it goes, in one step at the end; folders are made.
        sha256: what it must hash to; None takes whatever comes.
        on_progress: called with the bytes that are there and the bytes in all, None where the server does not say.

    Raises:
        DownloadError: the server refuses, cannot be reached or breaks off again and again, the disk is too small, or
            the hash is another one; then nothing is put in place.
    """
    pooch.get_logger().setLevel(logging.WARNING)
    with _only_one(part_of(file)):
        try:
            pooch.retrieve(
                link,
                known_hash=None if sha256 is None else f"sha256:{sha256}",
                fname=file.name,
                path=file.parent,
                downloader=ResumingDownloader(part_of(file), on_progress),
            )
        except ValueError as error:  # pooch's word for another hash
            raise DownloadError(
                f"{file}: {link} does not serve what was locked, and nothing was put in place"
                f" ({str(error).split('. ')[0]}). If the publisher has put up a new file that you want, delete its"
                " entry from the lock and run this again; else get the locked file elsewhere and put it there"
            ) from None


def part_of(file: Path) -> Path:
    """Where the bytes of an unfinished download are."""
    return file.with_name(f"{file.name}.part")


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def remote_size(link: str) -> int | None:
    """Bytes that the server says it would send, None where it does not say or cannot be reached."""
    try:
        with requests.head(link, headers=_AS_IT_IS, timeout=TIMEOUT_S, allow_redirects=True) as response:
            return _number(response.headers.get("Content-Length")) if response.status_code == 200 else None
    except requests.RequestException:
        return None


def free_bytes(path: Path) -> int:
    """Free space on the disk that `path` is or will be on."""
    return shutil.disk_usage(nearest(path)).free


def nearest(path: Path) -> Path:
    """`path`, or the lowest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


@dataclass
class ResumingDownloader:
    """A downloader for pooch that goes on where the last one stopped.

    Args:
        part: file that collects the bytes.
        on_progress: as in `fetch`.
    """

    part: Path
    on_progress: Progress

    def __call__(self, url: str, output_file: str, _pooch: object = None) -> None:
        """Bring the whole of `url` to `output_file`.

        Raises:
            DownloadError: see `fetch`.
        """
        reached, in_vain = self._size(), 0
        with requests.Session() as session:
            while True:
                try:
                    self._attempt(session, url)
                    break
                except _BrokenOff as reason:
                    in_vain = 0 if self._size() > reached else in_vain + 1
                    reached = max(reached, self._size())
                    if in_vain == ATTEMPTS:
                        raise DownloadError(
                            f"{url}: {reason}; run this again to go on from there, or with --offline to see what to"
                            " put where"
                        ) from None
                    time.sleep(WAIT_S * 2**in_vain)
        self.part.replace(output_file)
        _state_of(self.part).unlink(missing_ok=True)

    def _attempt(self, session: requests.Session, url: str) -> None:
        total, validator = self._known(url)
        have = self._size()
        headers = dict(_AS_IT_IS)
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
                whole = total if total is not None else _content_range(response)[1]
                if response.status_code == 416 and have == whole:
                    return  # everything had come before the connection broke
                self._check(response, url, have, total)
                if response.status_code == 200:
                    have, total = 0, _number(response.headers.get("Content-Length"))
                else:
                    total = _content_range(response)[1]
                self._check_disk(url, have, total)
                self._remember(url, total, response)
                self._receive(response, have, total)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _BrokenOff(_reason(url, error, self._size())) from None
        if total is not None and self._size() != total:
            raise _BrokenOff(f"the server announced {total} bytes and sent {self._size()}")

    def _check(self, response: requests.Response, url: str, have: int, total: int | None) -> None:
        """Refuse what is no answer to the question; drop a part that the answer does not continue."""
        status = response.status_code
        if status in _WORTH_ANOTHER_TRY:
            raise _BrokenOff(f"the server says {status} {response.reason}")
        start, size = _content_range(response)
        if status == 416:
            self._forget()
            raise _BrokenOff(f"the server announced {total} bytes and has nothing after {have}")
        if status == 206 and (start != have or (total is not None and size != total)):
            self._forget()
            raise _BrokenOff("the server holds another file than the one begun")
        if status not in (200, 206):
            raise DownloadError(
                f"{url}: the server says {status} {response.reason}; see the publisher's page for a new link"
            )
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError(f"{url}: serves a web page where a file was expected; see the publisher's page")

    def _check_disk(self, url: str, have: int, total: int | None) -> None:
        free = free_bytes(self.part)
        if total is not None and total - have > free:
            raise DownloadError(
                f"{url}: {total - have} bytes are still to come and {free} are free at {self.part.parent}; make room"
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

    def _known(self, url: str) -> tuple[int | None, str | None]:
        """Size and validator of the file that the part belongs to; a part of something else is dropped."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(_state_of(self.part).read_text(encoding="utf-8"))
            if state["url"] == url:
                return state["total"], state["validator"]
        self._forget()
        return None, None

    def _remember(self, url: str, total: int | None, response: requests.Response) -> None:
        etag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        _state_of(self.part).write_text(
            json.dumps({"url": url, "total": total, "validator": validator}), encoding="utf-8"
        )

    def _forget(self) -> None:
        with self.part.open("r+b") as file:
            file.truncate(0)
        _state_of(self.part).unlink(missing_ok=True)


@contextmanager
def _only_one(part: Path) -> Iterator[None]:
    """Hold the part file against other processes; it is there inside the block."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{part}: another process is fetching it; wait for that one") from None
        try:
            yield
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
                _state_of(part).unlink(missing_ok=True)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and size of the whole file, as a 206 or a 416 says them."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    return (_number(found[1]), int(found[2])) if found else (None, None)


def _reason(url: str, error: Exception, have: int) -> str:
    if isinstance(error, requests.ConnectionError) and not isinstance(error, requests.exceptions.ChunkedEncodingError):
        cause = getattr(error.args[0] if error.args else None, "reason", error)
        return f"cannot reach {urlsplit(url).netloc} ({str(cause).split(': ', 1)[-1]})"
    return f"the connection broke off after {have} bytes"
