"""`features compare`: say whether two stores, or feature files, agree, and if not, the likely cause."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from egopatch.features.commands.shared import CommandParser, count, location, progress, require_existing
from egopatch.features.common.command_line import print_result

_FILES = "a store, or feature files: a folder or an HDF5 file"


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Print the verdict and the largest differences; returns 0 if they agree, else 1."""
    parser.add_place("A", _FILES)
    parser.add_argument("other", type=location, metavar="B", help=_FILES)
    parser.add_argument("--clips", type=count, metavar="N", help="compare at most N clips")
    options = parser.parse_args(args)
    for name, place in (("A", options.store), ("B", options.other)):
        if isinstance(place, Path):
            require_existing(name, place, _FILES)
    from egopatch.features.tools.compare import CLIPS, compare

    with progress("compare", "clips", options) as on_clips:
        found = compare(options.store, options.other, options.clips or CLIPS, on_clips)
    lines = [
        found.verdict,
        f"clips: {found.clips} compared of {found.common} common, {found.only_a} only in A, {found.only_b} only in B",
        f"cosine {found.cosine:.6f}, relative error {found.error:.3g}",
    ]
    if found.times_differ_s is not None:
        lines.append(f"frame times differ by at most {found.times_differ_s:.3g} s")
    lines += [
        f"  {measure.name}: cosine {measure.cosine:.6f}, relative error {measure.error:.3g}"
        for measure in (*found.worst_clips, *found.worst_tokens, *found.worst_channels)
        if measure.error
    ]
    lines += [f"fingerprint: {line}" for line in found.fields]
    print_result(options.json, asdict(found), "\n".join(lines))
    return 0 if found.agree else 1
