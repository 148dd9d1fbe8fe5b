"""Which kind of storage a location is."""

from pathlib import Path

from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.objects import ObjectStorage
from egopatch.features.values.location import Location


def storage_at(location: Location) -> Storage:
    """The storage of the store at `location`.

    Raises:
        BadLocation: it is a URL, and what that needs is not there: a package, credentials.
    """
    return LocalStorage(location) if isinstance(location, Path) else ObjectStorage(location)
