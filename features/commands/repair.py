"""`features repair`: remove damaged clips, so that `egopatch extract run` encodes exactly those again."""

from collections.abc import Sequence

from egopatch.features.commands.shared import CommandParser, require_store
from egopatch.features.commands.verify import add_sources, check_sources, report_json
from egopatch.features.common.command_line import print_result
from egopatch.features.values.errors import StoreError


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Say what was removed and rewritten; returns 0."""
    parser.add_place()
    add_sources(parser, "remove the clips of the changed ones")
    options = parser.parse_args(args)
    require_store(options.store)
    from egopatch.features.tools.repair import repair

    sources = check_sources(options) if options.sources else None
    if sources and (unreadable := next(iter(sources.unreadable.items()), None)):
        file, reason = unreadable
        raise StoreError(
            f"{file} cannot be read ({reason}), so it may have changed; nothing was repaired: make it readable, or "
            "repair without --sources"
        )
    done = repair(options.store, sources.clips if sources else ())
    result = {"before": report_json(done.before), "dropped": list(done.dropped), "rewritten": list(done.rewritten)}
    lines = [f"rewrote {name}" for name in done.rewritten] + [f"removed {name!r}" for name in done.dropped]
    if done.dropped:
        lines.append("run `egopatch extract run` to encode again what was removed")
    elif done.missing:
        lines.append("nothing was removed; run `egopatch extract run` to encode what is missing")
    else:
        lines.append("no clip was lost")
    print_result(options.json, result, "\n".join(lines))
    return 0
