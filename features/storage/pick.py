"""The choice between a folder and object storage, by location."""

from pathlib import Path

from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.objects import ObjectStorage
from egopatch.features.values.location import Location, parse_location


def storage_at(location: Location | str) -> Storage:
    """The storage of the store at `location`.

    Raises:
        BadLocation: As in `parse_location`; or obstore, or the credentials for a URL, are missing.
    """
    location = parse_location(location)
    return LocalStorage(location) if isinstance(location, Path) else ObjectStorage(location)
