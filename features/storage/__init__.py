"""One store's files and journals behind a single interface, in a folder (`folder`) or in object storage (`objects`).

`pick.storage_at` returns the storage for a location; `interface` has the protocols that other rooms annotate with.
"""
