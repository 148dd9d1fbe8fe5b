"""Objects in a bucket, through obstore: every error is one line without credentials, every write can be conditional.

obstore takes credentials, region and endpoint from the environment alone (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ENDPOINT_URL); they are kept nowhere else.
"""

import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import urlsplit

from isal import isal_zlib

from egopatch.features.io.fields import FileSum
from egopatch.features.values.errors import BadLocation, RequestFailed, StoreError, write_conflict
from egopatch.features.values.location import ObjectUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Roles that a scheduler provides, and public buckets. Without any of them obstore would spend minutes asking a metadata
# service that most machines do not have.
_OTHER_CREDENTIALS = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_EXPIRED = "ExpiredToken"
_WRONG_CLOCK = "RequestTimeTooSkewed"
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "InvalidToken")
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed")
_UPLOAD_CHUNK = 16 << 20  # bytes in one request of a large upload; four chunks are in memory at once
_BLOCK = 4 << 20
RETRIES = 6  # after errors that may be temporary; about ten seconds in all
# Where obstore gives up, although tries are left, if a connection breaks off: within a listing, and while or after it
# sends a request that it takes for one that must not be sent twice, which are conditional writes and deletions.
_BROKEN_OFF = re.compile(rf"list response body|\bretries: [0-{RETRIES - 1}],.*\bkind: Interrupted", re.DOTALL)
_WRITE = "write"  # metadata of an object: the random number of the conditional write that made it


@dataclass(frozen=True)
class Version:
    """One state of an object: its ETag, and the version number that some providers add."""

    e_tag: str
    number: str | None


@dataclass(frozen=True)
class Content:
    """An object, or the end of one.

    Attributes:
        content: Bytes that were read.
        size: Bytes in the whole object.
        version: State of the object, for `Bucket.put_if_unchanged`.
        modified: Time of the last write, by the server's clock.
    """

    content: bytes
    size: int
    version: Version
    modified: datetime


class Bucket:
    """The objects at `url`; keys are relative to it. Threads may share a bucket; each process creates its own.

    Raises:
        BadLocation: obstore is not installed, or the environment has no credentials.
        StoreError: The process was forked from one that has opened a bucket; every method raises this too.
        RequestFailed: In every method, the server cannot be reached, or refuses or fails the request.
    """

    def __init__(self, url: ObjectUrl) -> None:
        self.url = url
        if url.scheme == "s3":
            _require_credentials(url)
        try:
            from obstore.store import from_url
        except ImportError:
            raise BadLocation(
                f"{url} needs the package obstore, which is not installed; run: pip install 'egopatch[s3]'"
            ) from None
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if url.scheme == "s3" else ""
        self._endpoint = urlsplit(endpoint).hostname or "the provider's own endpoint"
        with self._one_line_errors("opening it"):
            self._store: ObjectStore = from_url(
                str(url),
                client_options={"allow_http": endpoint.startswith("http://"), "timeout": timedelta(minutes=5)},
                retry_config={
                    "max_retries": RETRIES,
                    # Each wait is random, from the first one to the last one times `base`: with 0.1 s and a base of 2
                    # all six were over after a second.
                    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=4), "base": 3},
                },
            )

    @overload
    def get(self, key: str) -> Content: ...
    @overload
    def get(self, key: str, unless: Version | None) -> Content | None: ...
    def get(self, key: str, unless: Version | None = None) -> Content | None:
        """A whole object; None where it still has the version `unless`.

        Raises:
            FileNotFoundError: The object does not exist.
        """
        from obstore.exceptions import NotModifiedError

        with self._one_line_errors(f"reading {key}"):
            try:
                options: Any = {"if_none_match": unless.e_tag} if unless else None
                return _content(self._store.get(key, options=options))
            except NotModifiedError:
                return None

    def tail(self, key: str, count: int) -> Content:
        """The last `count` bytes of an object, or all of a shorter one. Errors as in `get`."""
        from obstore.exceptions import GenericError

        with self._one_line_errors(f"reading {key}"):
            try:
                return _content(self._store.get(key, options={"range": {"suffix": count}}))
            except GenericError as error:
                if _s3_code(error) != "InvalidRange" and "non-partial response" not in str(error):
                    raise
                return _content(self._store.get(key))  # an empty object has no last bytes

    def range(self, key: str, start: int, size: int) -> bytes:
        """`size` bytes of an object from `start`, fewer where the object ends before. Errors as in `get`."""
        from obstore.exceptions import GenericError

        with self._one_line_errors(f"reading {key}"):
            try:
                return bytes(self._store.get_range(key, start=start, length=size))
            except GenericError as error:
                if _s3_code(error) != "InvalidRange":
                    raise
                return b""  # the object ends before `start`

    def size_and_crc(self, key: str) -> FileSum:
        """Size in bytes and CRC-32 of an object, read in blocks. Errors as in `get`."""
        size = value = 0
        with self._one_line_errors(f"reading {key}"):
            for block in self._store.get(key).stream(min_chunk_size=_BLOCK):
                value = isal_zlib.crc32(block, value)
                size += len(block)
        return size, value

    def put(self, key: str, content: bytes) -> Version:
        """Write an object, replacing an existing one."""
        with self._one_line_errors(f"writing {key}"):
            return _version(self._store.put(key, content, use_multipart=False))

    def put_if_unchanged(self, key: str, content: bytes, version: Version | None) -> Version:
        """Write an object if its state is still `version`, or, if `version` is None, if it still does not exist.

        Raises:
            WriteConflict: Another writer has written the object since.
        """
        if version is None:
            return self._put_on_condition(key, content, "create")
        numbered = {} if version.number is None else {"version": version.number}
        return self._put_on_condition(key, content, {"e_tag": version.e_tag, **numbered})

    def upload(self, key: str, path: Path) -> None:
        """Write an object of any size from a file, a few chunks at a time."""
        with self._one_line_errors(f"writing {key}"):
            for last in (False, True):
                try:
                    self._store.put(key, path, chunk_size=_UPLOAD_CHUNK, max_concurrency=4)
                    return
                except FileNotFoundError as error:
                    # Some servers say so to the last request of an upload, if it is sent again for its lost answer.
                    if last or _s3_code(error) != "NoSuchUpload":
                        raise

    def listing(self, folder: str) -> dict[str, Version]:
        """Keys and versions of all objects below `folder`."""
        with self._one_line_errors(f"listing {folder}"):
            return _complete(
                lambda: {meta["path"]: _version(meta) for page in self._store.list(folder or None) for meta in page}
            )

    def folders(self, folder: str) -> set[str]:
        """Names of the folders directly in `folder`."""
        with self._one_line_errors(f"listing {folder}"):
            found = _complete(lambda: self._store.list_with_delimiter(folder))
        return {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}

    def exists(self, name: str) -> bool:
        """Whether an object of this name exists, or one below a folder of this name."""
        from obstore.exceptions import BaseError

        with self._one_line_errors(f"looking for {name or self.url}"):
            try:
                if name:
                    self._store.head(name)
                    return True
            except FileNotFoundError:
                pass
            except BaseError:
                # The answer to HEAD has no body that gives the reason; the refusal of a listing has one.
                next(iter(self._store.list(name, chunk_size=1)), None)
                raise
            return _complete(lambda: any(page for page in self._store.list(name or None, chunk_size=1)))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; missing ones are ignored."""
        with self._one_line_errors("deleting"):
            _complete(lambda: self._store.delete([*keys]))

    def _put_on_condition(self, key: str, content: bytes, mode: Any) -> Version:
        """Write an object; a request whose answer is lost is sent again, and is then refused if the first was served.

        The content does not tell whose the object is: another writer's may be the same.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        write = uuid.uuid4().hex
        attributes: Any = {_WRITE: write}
        with self._one_line_errors(f"writing {key}"):
            try:
                return _version(
                    _complete(
                        lambda: self._store.put(key, content, attributes=attributes, mode=mode, use_multipart=False)
                    )
                )
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if _s3_code(error) == "NoSuchBucket":
                    raise
            with suppress(FileNotFoundError):  # S3 answers 404 if the object was deleted
                found = self._store.get(key)
                if found.attributes.get(_WRITE) == write:
                    return _version(found.meta)
            raise write_conflict(f"{self.url}/{key}")

    @contextmanager
    def _one_line_errors(self, doing: str) -> Iterator[None]:
        """Turn obstore's errors into StoreErrors with our own text: the server's text may repeat credentials."""
        from obstore.exceptions import BaseError

        if _process_of_obstore() != os.getpid():
            raise StoreError(
                f"{self.url} cannot be used in a forked process: requests would hang, because a fork does not copy the "
                "threads of obstore; spawn the process (DataLoader: multiprocessing_context='spawn')"
            )
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            code = _s3_code(error)
            if code == "NoSuchBucket":
                message = (
                    f"{self.url}: bucket {self.url.bucket!r} does not exist at {self._endpoint}; create it, or check "
                    "store.path and AWS_ENDPOINT_URL"
                )
            elif isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}: {doing}") from None
            elif code == _EXPIRED:
                message = (
                    f"{self.url}: {self._endpoint} refused the credentials while {doing}: they have expired; set "
                    f"new ones ({', '.join(_KEYS)}, AWS_SESSION_TOKEN), and run the same command again"
                )
            elif code == _WRONG_CLOCK:
                message = (
                    f"{self.url}: {self._endpoint} has another time than this machine while {doing} ({code}); set this "
                    "machine's clock, and run the same command again"
                )
            elif code in _REFUSED or "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):
                message = (
                    f"{self.url}: {self._endpoint} refused the credentials while {doing} ({code or 'forbidden'}); "
                    f"check {' and '.join(_KEYS)}, and their permissions"
                )
            elif code in _WRONG_REGION or "incorrectly configured region" in str(error):
                message = f"{self.url}: {self._endpoint} expects another region while {doing}; check AWS_REGION"
            elif re.search(r"error sending request|Connect|dns error|TimedOut|response body", str(error)):
                message = (
                    f"{self.url}: {self._endpoint} cannot be reached while {doing}; check AWS_ENDPOINT_URL and the "
                    "network, and run the same command again"
                )
            else:
                what = code or type(error).__name__
                message = f"{self.url}: {self._endpoint} failed while {doing} ({what}); run the same command again"
            raise RequestFailed(message) from None


@cache
def _process_of_obstore() -> int:
    """The process that first opened a bucket; a forked child has this number, too, and none of obstore's threads."""
    return os.getpid()


def _complete(request: Callable[[], T]) -> T:
    """The result of a request, which is sent again if the connection breaks off and obstore does not do that itself."""
    from obstore.exceptions import GenericError

    for attempt in range(RETRIES):
        try:
            return request()
        except GenericError as error:
            if not _BROKEN_OFF.search(str(error)):
                raise
        time.sleep(min(0.2 * 2**attempt, 4))
    return request()


def _require_credentials(url: ObjectUrl) -> None:
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing and not any(os.environ.get(name) for name in _OTHER_CREDENTIALS):
        be, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        names = " and ".join(missing)
        raise BadLocation(f"{url} needs credentials, but {names} {be} not set; set {them} in the environment")


def _version(meta: Mapping[str, Any]) -> Version:
    return Version(meta["e_tag"], meta["version"])


def _content(result: Any) -> Content:
    meta = result.meta
    return Content(bytes(result.bytes()), meta["size"], _version(meta), meta["last_modified"])


def _s3_code(error: BaseException) -> str:
    """S3's code for an error; empty where the server gave none."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""
