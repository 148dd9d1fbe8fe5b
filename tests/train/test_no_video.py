"""Training opens no video and imports nothing that could: checked in a process where both fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from egopatch.configs.schema import Config
from tests.train.tiny import with_run, write_tiny, written

ROOT = Path(__file__).parents[2]

# Fits and evaluates after importing all of stage two. Video libraries cannot be imported, and no file below the
# folder of videos can be opened or so much as looked for by name.
SCRIPT = """
import importlib, pkgutil, sys

POISON = ("decord", "av", "torchcodec", "cv2", "imageio")

class Poison:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in POISON:
            raise AssertionError(f"stage two imports {name}")

def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir", "subprocess.Popen") and "qa_videos" in str(args):
        raise AssertionError(f"stage two touches a video: {event} {args}")

sys.meta_path.insert(0, Poison())
sys.addaudithook(watch)
import egopatch.train
for module in pkgutil.walk_packages(egopatch.train.__path__, "egopatch.train."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from egopatch.train.__main__ import main
code = main(["fit", *sys.argv[1:]]) or main(["evaluate", *sys.argv[1:]])
assert not set(POISON) & set(sys.modules), "imported past the import system"
sys.exit(code)
"""


def run(*args: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tiny")
    config: Config = with_run(write_tiny(root, clips=24), "watched", train_epochs=1)
    videos = config.data.root / "qa_videos"
    videos.mkdir()
    for index in range(24):  # exist, so that an attempt to open them would be noticed
        (videos / f"clip|P{index}|0|{index + 1}.mp4").write_bytes(b"no video")
    return written(config)


@pytest.mark.slow
def test_all_of_stage_two_imports_and_trains_without_video(config_file: str) -> None:
    done = run("--config", config_file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("sabotage", "word"),
    [
        ("import decord", "stage two imports decord"),
        ("import av.video", "stage two imports av"),
        ("open('qa_videos/a.mp4')", "stage two touches a video: open"),
    ],
)
def test_the_no_video_check_detects_violations(sabotage: str, word: str) -> None:
    done = run(script=SCRIPT.partition("import egopatch.train\n")[0] + sabotage)
    assert done.returncode != 0
    assert word in done.stderr
