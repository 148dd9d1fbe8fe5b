"""The code of the documentation runs as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egopatch.features import Fingerprint, StoreSpec, create_store

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_loop_of_your_own(tmp_path: Path) -> None:
    names = [f"clip{n}" for n in range(64)]
    labels = {name: n % 3 for n, name in enumerate(names)}
    spec = StoreSpec.for_patches(2, (3, 4), 16, "float16", 8)
    store = create_store(tmp_path / "stores" / "mine", spec, Fingerprint({"made": "up"}), names)
    generator = torch.Generator().manual_seed(0)
    for work in store.missing_shards():
        rows = {}
        for name in work.ids:
            rows[name] = {array.name: torch.randn(array.shape, generator=generator) for array in spec.arrays}
            rows[name]["patches"][..., labels[name]] += 2
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "made up"))
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loops.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 2
    (tmp_path / "page.py").write_text("\n".join(code))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert done.stdout.splitlines()[-1].endswith("torch.Size([2, 360, 640])")
    assert (tmp_path / "some_clips.npz").is_file()
