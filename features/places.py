"""Which kind of storage a location is."""

from pathlib import Path

from features.local_storage import LocalStorage
from features.location import Location
from features.object_storage import ObjectStorage
from features.storage import Storage


def storage_at(location: Location) -> Storage:
    """The storage of the store at `location`.

    Raises:
        BadLocation: it is a URL, and what that needs is not there: a package, credentials.
    """
    return LocalStorage(location) if isinstance(location, Path) else ObjectStorage(location)
