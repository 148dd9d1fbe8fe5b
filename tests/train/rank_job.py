"""One rank of a test, started by torchrun: trains each config that it is given, then evaluates the last one again."""

import sys
from pathlib import Path

from egopatch.configs.command_line import load_config
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.processes.distributed import join


def main() -> None:
    with join(cuda=False) as ranks:
        for path in sys.argv[1:]:
            config = load_config(Path(path))
            fit(config, "x", ranks)
        evaluate(config, ranks=ranks)
        features = open_experiment(config, ranks=ranks).features
        held = ranks.gather((sorted(features._clip_rows), features.bytes_read))
        ranks.print_once(f"held {held}")
    threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert not any("gloo" in name for name in threads), threads


if __name__ == "__main__":
    main()
