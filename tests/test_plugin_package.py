"""A package that adds an encoder, a data set and a head: every command works on them, with two workers."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.features import open_store
from tests.extract.video.videos import write_video

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}

# Every command in one process, to start it once. The last line of output is the exit codes.
COMMANDS = """
import dataclasses, json, sys, threading
from egopatch import register_dataset, register_encoder, register_head
from egopatch.extract.__main__ import main as extract
from egopatch.train.__main__ import main as train
import egopatch_colours.encoder as package
from egopatch_colours.dataset import load
from egopatch_colours.head import HEAD

DOUBLE = 2.0

def build_video(checkpoint, options):  # defined here: worker processes cannot import it
    encoder = package.build_video(checkpoint, options)
    encoder.scale.mul_(DOUBLE)
    return encoder

LOCK = threading.Lock()

def build_alone(checkpoint, options):
    with LOCK:
        return package.build_video(checkpoint, options)

if __name__ == "__main__":
    args = sys.argv[1:]
    codes = [extract([name, *args]) for name in ("doctor", "run", "status")]
    codes += [train([name, *args]) for name in ("fit", "evaluate")]
    codes += [train(["sweep", *args, "--seeds", "0", "1", "--grid", args[1] + ".grid"])]
    codes += [train([name, *args]) for name in ("table", "report")]
    register_encoder(dataclasses.replace(package.NETWORK, name="doubled", build_video=build_video))
    register_dataset("here", load)
    other = ["--encoder.arch", "doubled", "--data.name", "here", "--store.path", args[1] + ".doubled"]
    codes += [extract(["run", *args, *other])]
    register_head(dataclasses.replace(HEAD, name="mine"))
    mine = ["--head.name", "mine", "--run.dir", args[1] + ".runs/mine", "--seeds", "0", "1"]
    codes += [train(["sweep", *args, *other, *mine])]
    register_encoder(dataclasses.replace(package.NETWORK, name="alone", build_video=build_alone))
    codes += [extract(["run", *args, "--encoder.arch", "alone", "--store.path", args[1] + ".alone"])]
    print(json.dumps(codes))
"""


def plain(rgb: tuple[int, int, int], _: int, size: tuple[int, int]) -> np.ndarray:
    return np.full((size[1], size[0], 3), rgb, np.uint8)


def run(*command: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, folder = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "tests" / "plugin_package", copy)  # building in place would leave a folder behind
    command = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(copy)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("experiment")
    (root / "data").mkdir()
    for part in ("train", "val", "test"):
        for colour, rgb in COLOURS.items():
            for number in range(2):
                path = root / "data" / f"{part}_{colour}_{number}.mp4"
                write_video(path, 4, size=(64, 64), draw=partial(plain, rgb))
    torch.save({"scale": torch.full((3,), 2.0)}, root / "colours.pth")
    (root / "experiment.yaml.grid").write_text("head.options.hidden: [8, 16]\n")
    (root / "experiment.yaml").write_text(f"""
data:    {{name: squares, root: {root}/data}}
video:   {{frames: 2, size: 64}}
encoder: {{arch: colours, checkpoint: {root}/colours.pth, depth: 1, dtype: float32, batch: 2, device: cpu}}
text:    {{model: {MINILM.name}, depth: 1, max_length: 8}}
store:   {{path: {root}/store, dtype: float32, shard: 3}}
engine:  {{workers: 2, decoders: 1}}
head:    {{name: gated, options: {{hidden: 32}}}}
train:   {{epochs: 30, batch: 3, lr: 1.0e-2, device: cpu}}
run:     {{dir: {root}/runs/gated}}
""")
    return ["--config", str(root / "experiment.yaml")]


@pytest.mark.slow
def test_every_command_works_with_a_plugin_package(installed: Path, experiment: list[str]) -> None:
    root = Path(experiment[1]).parent
    script = root / "script.py"
    script.write_text(COMMANDS)
    done = run(str(script), *experiment, path=installed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * 10 + [2], done.stdout + done.stderr
    assert "encoder.arch is 'alone', which cannot be sent to worker processes" in done.stderr
    store = open_store(root / "store")
    assert len(store.clip_ids) == 18
    assert store.fingerprint.fields["plugin"] == "egopatch-colours 1.2"
    card = json.loads((root / "runs/gated/card.json").read_text())
    assert card["config"]["head"]["options"] == {"hidden": 32}
    assert card["versions"]["egopatch-colours"] == "1.2"
    assert json.loads((root / "runs/gated/test.json").read_text())["all"]["accuracy"] == 100
    sweep = json.loads((root / "runs/sweeps/direct-gated/sweep.json").read_text())
    assert (sweep["trained"], sweep["failed"]) == (4, {})
    assert "gated" in (root / "runs" / "table.md").read_text()
    assert "gated" in (root / "runs" / "report.html").read_text()
    # What a script registers reaches its workers.
    doubled = open_store(root / "experiment.yaml.doubled")
    red = [name for name in doubled.clip_ids if "red" in name]
    assert torch.equal(doubled.read(red).patches, 2 * store.read(red).patches)


BROKEN = {
    "extract run --encoder.arch no-module": "package egopatch-colours 1.2 that registers it cannot be imported",
    "extract run --encoder.arch no-network": "package egopatch-colours 1.2 is of type type; expected an extract",
    "extract run --encoder.arch lite": "'lite' is registered by egopatch and by egopatch-colours 1.2",
    "train fit --head.name raises": "cannot be imported (RuntimeError: no GPU here, so nothing works)",
    "train fit --head.name gatde": "did you mean gated?",
    "train fit --head.options.hidden 0": "hidden is 0; expected at least 1",
}


@pytest.mark.slow
def test_plugin_errors_are_reported_in_one_line(installed: Path, experiment: list[str], tmp_path: Path) -> None:
    code = f"""
import contextlib, io, json
from egopatch.__main__ import main

for line in {list(BROKEN)}:
    stage, command, *options = line.split()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main([stage, command, *{experiment}, "--run.dir", {str(tmp_path / "run")!r}, *options])
    print(json.dumps([code, said.getvalue()]))
"""
    done = run("-c", code, path=installed)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(BROKEN), done.stderr
    for (exit_code, said), why in zip(results, BROKEN.values(), strict=True):
        assert exit_code == 2
        assert why in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
