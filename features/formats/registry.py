"""The two file formats, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from egopatch.features.formats.hdf5_shards import Hdf5Format
from egopatch.features.formats.interface import Format, require_format
from egopatch.features.formats.zarr_shards import ZarrFormat

FORMATS: Mapping[str, Format] = MappingProxyType({"zarr": ZarrFormat(), "hdf5": Hdf5Format()})


def format_named(name: str, codec: str = "none") -> Format:
    """The file format called `name`, which must support `codec`.

    Raises:
        StoreError: The format does not exist, or does not support the codec.
    """
    require_format(name, codec)
    return FORMATS[name]
