"""The choice between a folder and object storage, by location."""

from pathlib import Path

from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.objects import ObjectStorage
from egopatch.features.values.location import Location


def storage_at(location: Location) -> Storage:
    """The storage of the store at `location`.

    Raises:
        BadLocation: The location is a URL, and obstore or the credentials for it are missing.
    """
    return LocalStorage(location) if isinstance(location, Path) else ObjectStorage(location)
