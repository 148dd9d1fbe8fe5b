"""Which kind of storage a location is."""

from pathlib import Path

from features.local_storage import LocalStorage
from features.location import Location
from features.storage import Storage


def storage_at(location: Location) -> Storage:
    """The storage of the store at `location`."""
    assert isinstance(location, Path)
    return LocalStorage(location)
