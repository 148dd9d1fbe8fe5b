"""How fast a DataLoader with two workers reads shuffled clips, against `read_ahead` in one process.

    python benchmarks/dataloader.py [--clips 128] [--rounds 5] [--folder FOLDER] [--quick] [--out FILE]

Clips are EgoVLPv2's (4.8 MB in float16), in batches of 16, from a store that memory holds. The contenders take turns in
one run, and each figure is the best of all rounds, because others may use the machine. Workers are started before the
clock. Writes benchmarks/results/dataloader.json; exits with 1 if `torch_dataset` reaches less than 0.7 of `read_ahead`.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from benchmarks.store import BATCH, CLIP_BYTES, FINGERPRINT, SPEC, clip_rows  # noqa: E402
from egopatch.features import Store, create_store, open_store, read_ahead, torch_dataset  # noqa: E402

GOAL = 0.7


def write(folder: Path, clips: int) -> Store:
    names = [f"clip{n}" for n in range(clips)]
    store = create_store(folder, SPEC, FINGERPRINT, names)
    for work in store.missing_shards():
        store.write_shard(work.shard, {n: clip_rows(int(n[4:])) for n in work.ids}, dict.fromkeys(work.ids, "random"))
    return open_store(folder)


def contenders(store: Store) -> dict[str, Callable[[], None]]:
    """Functions that read every clip once, in a new order."""
    clips = torch_dataset(store)

    def ahead() -> None:
        order = random.sample(store.clip_ids, len(store.clip_ids))
        for _ in read_ahead(store, [order[n : n + BATCH] for n in range(0, len(order), BATCH)]):
            pass

    def loader(**options: object) -> Callable[[], None]:
        batches = DataLoader(clips, BATCH, shuffle=True, num_workers=2, persistent_workers=True, **options)

        def read() -> None:
            for _ in batches:
                pass

        return read

    return {
        "read_ahead": ahead,
        "DataLoader, torch_dataset": loader(collate_fn=clips.collate),
        "DataLoader, torch's own collate": loader(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is written; needs the clips' size")
    add_result_arguments(parser, "dataloader.json", "two batches, one round")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.rounds = 2 * BATCH, 1
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        store = write(Path(name) / "store", options.clips)
        readers = contenders(store)
        rounds: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(options.rounds + 1):
            for contender, read in readers.items():
                started = time.perf_counter()
                read()
                if number:  # the first round starts the workers, and allocates the memory that they reuse
                    rounds[contender].append(options.clips * CLIP_BYTES / 1e9 / (time.perf_counter() - started))
    best = {contender: max(speeds) for contender, speeds in rounds.items()}
    share = best["DataLoader, torch_dataset"] / best["read_ahead"]
    result = {
        "machine": stamp(),
        "clips": options.clips,
        "best_gb_s": best,
        "rounds_gb_s": rounds,
        "share_of_read_ahead": share,
        "to_reach": GOAL,
    }
    write_result(options, result)
    for contender, speed in best.items():
        print(f"{contender:32} {speed:6.2f} GB/s")
    print(f"{'ok  ' if share >= GOAL else 'MISS'} torch_dataset reaches {share:.2f} of read_ahead (at least {GOAL})")
    return 0 if share >= GOAL or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
