"""Sizes and counts as people read them."""


def counted(number: int, one: str, many: str = "") -> str:
    """`1 clip` or `3 clips`: a number, with `one` or with `many` things; by default `many` is `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def format_bytes(nbytes: float) -> str:
    """`nbytes` with the unit that leaves one to three digits before the point, such as `4.8 MB`; powers of 1,000."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.95:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} TB"
