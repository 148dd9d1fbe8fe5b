"""Where a store lies: a folder, or a place in object storage such as `s3://bucket/features`."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from egopatch.features.values.errors import BadLocation

SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class ObjectUrl:
    """A place in object storage, with what of `Path` a store's user needs.

    Attributes:
        url: scheme, bucket and prefix. Never credentials, so it may be printed and stored.

    Raises:
        BadLocation: it names no bucket, or holds more than that.
    """

    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if any(sign in self.url.partition("://")[2] for sign in "@:?#"):
            # Nothing of it is shown: it may be a key, and a key may hold slashes.
            raise BadLocation(
                "the store's URL holds a user, a query or a fragment; expected scheme://bucket/prefix alone: "
                "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        names = parts.path.strip("/").split("/")
        if parts.scheme not in SCHEMES or not parts.netloc or not all(names) or {".", ".."} & set(names):
            raise BadLocation(
                f"{self.url!r} is no place for a store; expected a folder, or scheme://bucket/prefix with one of "
                f"{', '.join(SCHEMES)} as its scheme"
            )

    @property
    def scheme(self) -> str:
        """Whose object storage it is."""
        return urlsplit(self.url).scheme

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return urlsplit(self.url).netloc

    @property
    def prefix(self) -> str:
        """What every object's name in the bucket begins with, without slashes around it."""
        return urlsplit(self.url).path.strip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return self.prefix.rpartition("/")[2]

    def with_name(self, name: str) -> "ObjectUrl":
        """The place beside this one that is called `name`."""
        return ObjectUrl(f"{self.url.rpartition('/')[0]}/{name}")

    def __truediv__(self, name: str) -> "ObjectUrl":
        return ObjectUrl(f"{self.url}/{name}") if name else self

    def __str__(self) -> str:
        return self.url


Location = Path | ObjectUrl


def locate(place: Location | str) -> Location:
    """The location that a user means by `place`: a URL where it has a scheme, else a folder.

    Raises:
        BadLocation: it is a URL that no store can have.
    """
    if isinstance(place, str):
        return ObjectUrl(place.rstrip("/")) if "://" in place else Path(place)
    return place
