"""The two file formats, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from features.errors import StoreError
from features.file_format import Format
from features.hdf5_store import Hdf5Format
from features.zarr_store import ZarrFormat

FORMATS: Mapping[str, Format] = MappingProxyType({"zarr": ZarrFormat(), "hdf5": Hdf5Format()})


def format_named(name: str, codec: str = "none") -> Format:
    """The file format called `name`, which has to offer `codec`.

    Raises:
        StoreError: there is no such format, or it lacks the codec.
    """
    if name not in FORMATS:
        raise StoreError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
    files = FORMATS[name]
    if codec not in files.codecs:
        raise StoreError(f"codec is {codec!r}; expected one that {name} has: {', '.join(files.codecs)}")
    return files
