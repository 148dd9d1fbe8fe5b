"""The two file formats, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from egopatch.features.formats.hdf5_shards import Hdf5Format
from egopatch.features.formats.interface import Format
from egopatch.features.formats.zarr_shards import ZarrFormat
from egopatch.features.values.errors import StoreError

FORMATS: Mapping[str, Format] = MappingProxyType({"zarr": ZarrFormat(), "hdf5": Hdf5Format()})


def format_named(name: str, codec: str = "none") -> Format:
    """The file format called `name`, which must support `codec`.

    Raises:
        StoreError: The format does not exist, or does not support the codec.
    """
    if name not in FORMATS:
        raise StoreError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
    file_format = FORMATS[name]
    if codec not in file_format.codecs:
        raise StoreError(f"codec is {codec!r}; expected one of {name}'s codecs: {', '.join(file_format.codecs)}")
    return file_format
