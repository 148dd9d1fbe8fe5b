"""Objects in a bucket, through obstore: every error is one line without credentials, every write can be conditional.

Credentials, region and endpoint come from the environment alone, as obstore reads it (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL), and are kept nowhere else.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from isal import isal_zlib

from egopatch.features.values.errors import BadLocation, Overtaken, StoreError
from egopatch.features.values.location import ObjectUrl

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Roles that a scheduler hands out, and public buckets. Without any of them obstore would ask a service that most
# machines do not have, for minutes.
_OTHER_CREDENTIALS = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken")
_ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed")
_PART = 16 << 20  # bytes of one request of a large upload; four of them are in memory
_BLOCK = 4 << 20
RETRIES = 6  # of a request that failed for reasons that may pass; about ten seconds in all


@dataclass(frozen=True)
class Version:
    """One state of an object: its ETag, and the number that some storages give it beside."""

    e_tag: str
    number: str | None


@dataclass(frozen=True)
class Content:
    """An object, or the end of one.

    Attributes:
        content: bytes read.
        size: of the whole object.
        version: for `Bucket.put`.
        modified: by the server's clock.
    """

    content: bytes
    size: int
    version: Version
    modified: datetime


class Bucket:
    """The objects at `url`; keys are relative to it. It is used by many threads, and made anew in each process.

    Raises:
        BadLocation: obstore is not installed, or the environment has no credentials.
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
        with self._clear_errors("opening it"):
            self._store: ObjectStore = from_url(
                str(url),
                client_options={"allow_http": endpoint.startswith("http://"), "timeout": timedelta(minutes=5)},
                retry_config={
                    "max_retries": RETRIES,
                    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=4), "base": 2},
                },
            )

    def get(self, key: str, unless: Version | None = None) -> Content | None:
        """All of an object; None where it still has the version `unless`.

        Raises:
            FileNotFoundError: there is none.
        """
        import obstore
        from obstore.exceptions import NotModifiedError

        with self._clear_errors(f"reading {key}"):
            try:
                options: Any = {"if_none_match": unless.e_tag} if unless else None
                return _content(obstore.get(self._store, key, options=options))
            except NotModifiedError:
                return None

    def tail(self, key: str, count: int) -> Content:
        """Up to `count` bytes from an object's end. Errors as in `get`."""
        import obstore

        with self._clear_errors(f"reading {key}"):
            try:
                return _content(obstore.get(self._store, key, options={"range": {"suffix": count}}))
            except obstore.exceptions.GenericError as error:
                if _code(error) != "InvalidRange" and "non-partial response" not in str(error):
                    raise
                return _content(obstore.get(self._store, key))  # an empty object has no last bytes

    def range(self, key: str, start: int, size: int) -> bytes:
        """`size` bytes of an object from `start`, fewer where it ends before. Errors as in `get`."""
        import obstore

        with self._clear_errors(f"reading {key}"):
            try:
                return bytes(obstore.get_range(self._store, key, start=start, length=size))
            except obstore.exceptions.GenericError as error:
                if _code(error) != "InvalidRange":
                    raise
                return b""  # it ends before

    def sum_of(self, key: str) -> tuple[int, int]:
        """Size and CRC-32 of an object, read in blocks. Errors as in `get`."""
        import obstore

        size = value = 0
        with self._clear_errors(f"reading {key}"):
            for block in obstore.get(self._store, key).stream(min_chunk_size=_BLOCK):
                value = isal_zlib.crc32(block, value)
                size += len(block)
        return size, value

    def put(self, key: str, content: bytes) -> Version:
        """Write an object, whatever is there."""
        return self._put(key, content, "overwrite")

    def put_over(self, key: str, content: bytes, version: Version | None) -> Version:
        """Write an object if its state is still `version`; None where there was none.

        Raises:
            Overtaken: somebody else has written it since.
        """
        if version is None:
            return self._put(key, content, "create")
        numbered = {} if version.number is None else {"version": version.number}
        return self._put(key, content, {"e_tag": version.e_tag, **numbered})

    def upload(self, key: str, path: Path) -> None:
        """Write an object of any size from a file, a few parts at a time."""
        import obstore

        with self._clear_errors(f"writing {key}"):
            obstore.put(self._store, key, path, chunk_size=_PART, max_concurrency=4)

    def listing(self, folder: str) -> dict[str, Version]:
        """Key and version of every object below `folder`."""
        import obstore

        found: dict[str, Version] = {}
        with self._clear_errors(f"listing {folder}"):
            for page in obstore.list(self._store, folder or None):
                found |= {meta["path"]: _version(meta) for meta in page}
        return found

    def folders(self, folder: str) -> set[str]:
        """Names of the folders in `folder`."""
        import obstore

        with self._clear_errors(f"listing {folder}"):
            found = obstore.list_with_delimiter(self._store, folder)
        return {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name, or one below a folder of this name."""
        import obstore

        with self._clear_errors(f"looking for {name or self.url}"):
            try:
                if name:
                    obstore.head(self._store, name)
                    return True
            except FileNotFoundError:
                pass
            return any(page for page in obstore.list(self._store, name or None, chunk_size=1))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are passed over."""
        import obstore

        with self._clear_errors("deleting"):
            obstore.delete(self._store, [*keys])

    def _put(self, key: str, content: bytes, mode: Any) -> Version:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._clear_errors(f"writing {key}"):
            try:
                return _version(obstore.put(self._store, key, content, mode=mode, use_multipart=False))
            except (AlreadyExistsError, PreconditionError):
                raise Overtaken(f"{self.url}/{key} was written by somebody else meanwhile; run it again") from None

    @contextmanager
    def _clear_errors(self, doing: str) -> Iterator[None]:
        """Turn what obstore raises into a StoreError, whose text is ours: the server's may repeat what it was sent."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise StoreError(self._no_bucket()) from None
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}: {doing}") from None
        except BaseError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                message = self._no_bucket()
            elif code in _REFUSED or "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):
                message = (
                    f"{self.url}: {self._endpoint} refused the credentials while {doing} ({code or 'forbidden'}); "
                    f"check {' and '.join(_KEYS)}, and what they are allowed"
                )
            elif code in _ELSEWHERE or "incorrectly configured region" in str(error):
                message = f"{self.url}: the bucket is not where {self._endpoint} looks while {doing}; check AWS_REGION"
            elif re.search(r"error sending request|Connect|dns error|TimedOut", str(error)):
                message = (
                    f"{self.url}: {self._endpoint} cannot be reached while {doing}; check AWS_ENDPOINT_URL and the "
                    "network, and run the same command again"
                )
            else:
                what = code or type(error).__name__
                message = f"{self.url}: {self._endpoint} failed while {doing} ({what}); run the same command again"
            raise StoreError(message) from None

    def _no_bucket(self) -> str:
        return (
            f"{self.url}: there is no bucket {self.url.bucket!r} at {self._endpoint}; make it, or check store.path and "
            "AWS_ENDPOINT_URL"
        )


def _require_credentials(url: ObjectUrl) -> None:
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing and not any(os.environ.get(name) for name in _OTHER_CREDENTIALS):
        raise BadLocation(f"{url} needs credentials and {' and '.join(missing)} is not set; set it in the environment")


def _version(meta: Mapping[str, Any]) -> Version:
    return Version(meta["e_tag"], meta["version"])


def _content(result: Any) -> Content:
    meta = result.meta
    return Content(bytes(result.bytes()), meta["size"], _version(meta), meta["last_modified"])


def _code(error: BaseException) -> str:
    """The name that S3 gives an error; empty where there is none."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""
