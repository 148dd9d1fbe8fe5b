import shutil
from pathlib import Path

import pytest

from egopatch.extract.__main__ import main
from egopatch.extract.worker.job_stats import jobs_path
from tests.extract.job import CLIPS, options, slowly


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a checkpoint, a tokenizer and a finished store; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    assert main(["synth", "--out", str(root / "data"), "--clips", str(CLIPS)]) == 0
    assert main(["standin", *options(root)]) == 0
    assert main(["run", *options(root)]) == 0
    return root


@pytest.fixture(scope="session")
def single(made: Path) -> Path:
    """The store of one undisturbed job with one shard per clip."""
    assert main(["run", *slowly(made, "--store.path", str(made / "single"))]) == 0
    return made / "single"


@pytest.fixture
def fresh(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may spoil."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def bare(fresh: Path) -> Path:
    """The same without the store."""
    shutil.rmtree(fresh / "store")
    jobs_path(fresh / "store").unlink()
    return fresh
