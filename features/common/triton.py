"""Versions of Triton, (major, minor), and how the kernels of stage two are cut for them."""

OLDEST = (3, 6)  # that compiled the kernels and ran them on a GPU; torch 2.10 and 2.11 bring it
SPILLING = (
    3,
    8,
)  # from which on the sizes that were measured on an H100 spill registers, so that smaller ones are used
NEWEST_TRIED = (3, 9)


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as `3.6.0+git1234`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
