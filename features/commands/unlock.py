"""`features unlock`: remove leases left by machines that are gone for good."""

from collections.abc import Sequence

from egopatch.features.commands.info import catalog_at
from egopatch.features.commands.shared import CommandParser, require_store
from egopatch.features.common.command_line import print_result
from egopatch.features.common.units import counted
from egopatch.features.state.header import HEADER
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.values.errors import WrongOption


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Name the leases that were removed; returns 0.

    Raises:
        StoreError: A running process holds one.
        WrongOption: The store has no such shard.
    """
    parser.add_place()
    parser.add_argument("--shard", type=int, metavar="N", help="number of the shard to unlock (default: all)")
    options = parser.parse_args(args)
    require_store(options.store)
    storage = storage_at(options.store)
    folders = ("", TEXT_FOLDER) if options.shard is None else ("",)
    removed = [line for folder in folders for line in storage_at(options.store / folder).unlock(options.shard)]
    # The folder of a run has a lease as well, but is not a store.
    if options.shard is not None and not removed and storage.exists(HEADER):
        catalog = catalog_at(options.store)
        shards = max(map(catalog.shard_of, catalog.rows.values()), default=-1) + 1
        if not 0 <= options.shard < shards:
            present = f"{counted(shards, 'shard')}, counted from 0" if shards else "no shards"
            raise WrongOption(f"--shard is {options.shard}, but {options.store} has {present}")
    lines = [f"removed lease {line}" for line in removed] or [f"{options.store} has no leases to remove"]
    print_result(options.json, {"removed": removed}, "\n".join(lines))
    return 0
