"""Where a store is: a folder, or a prefix in object storage such as `s3://bucket/features`."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from egopatch.features.values.errors import BadLocation, one_line

SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class ObjectUrl:
    """A prefix in object storage, with the few methods of `Path` that a store's user needs.

    Attributes:
        url: Scheme, bucket and prefix. It never holds credentials, so it may be printed and stored.

    Raises:
        BadLocation: The URL names no bucket, or holds more than bucket and prefix.
    """

    url: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
        except ValueError:  # a bracket begins an IPv6 address, which a bucket is not
            parts = urlsplit("")
        if any(sign in self.url.partition("://")[2] for sign in "@:?#"):
            # The message does not repeat the URL: it may hold a key, and a key may hold slashes.
            raise BadLocation(
                "the store's URL holds a user, a query or a fragment; expected scheme://bucket/prefix alone: "
                "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        names = parts.path.strip("/").split("/")
        if parts.scheme not in SCHEMES or not parts.netloc or not all(names) or {".", ".."} & set(names):
            raise BadLocation(
                f"{self.url!r} cannot be the location of a store; expected a folder, or scheme://bucket/prefix with "
                f"one of the schemes {', '.join(SCHEMES)}"
            )

    @property
    def scheme(self) -> str:
        """Kind of object storage, one of `SCHEMES`."""
        return urlsplit(self.url).scheme

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return urlsplit(self.url).netloc

    @property
    def name(self) -> str:
        """Last component of the prefix."""
        return self.url.rstrip("/").rpartition("/")[2]

    def with_name(self, name: str) -> "ObjectUrl":
        """The sibling of this location called `name`."""
        return ObjectUrl(f"{self.url.rpartition('/')[0]}/{name}")

    def __truediv__(self, name: str) -> "ObjectUrl":
        return ObjectUrl(f"{self.url}/{name}") if name else self

    def __str__(self) -> str:
        return self.url


Location = Path | ObjectUrl


def parse_location(location: Location | str) -> Location:
    """`location` as an object: an `ObjectUrl` if the text has a scheme, else a folder, made absolute if it has no name.

    Raises:
        BadLocation: No store can exist at this URL, or `location` is neither text nor a path.
    """
    if isinstance(location, str):
        location = ObjectUrl(location.rstrip("/")) if "://" in location else Path(location)
    if not isinstance(location, Path | ObjectUrl):
        raise BadLocation(f"the location of a store is {one_line(location)}; expected its folder or URL")
    return location.absolute() if location == Path() else location
