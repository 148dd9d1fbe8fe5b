"""File formats for shards, Zarr and HDF5, behind the protocols in `interface`.

Other rooms get a format by name from `registry`.
"""
