"""One miniature experiment for all tests of stage two; each test trains into folders of its own."""

import dataclasses
from pathlib import Path

import pytest

from egopatch.configs.schema import Config
from egopatch.train.fitting.fit import fit
from egopatch.train.processes.process_pool import can_fork
from tests.train.tiny import with_run, write_tiny


@pytest.fixture(scope="session")
def shared_tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(shared_tiny: Config, tmp_path: Path) -> Config:
    return dataclasses.replace(shared_tiny, run=dataclasses.replace(shared_tiny.run, dir=tmp_path / "runs" / "psa"))


@pytest.fixture
def trained(tiny: Config) -> Config:
    """A head psa, trained for an epoch."""
    config = with_run(tiny, "psa", train_epochs=1)
    fit(config, "egopatch train fit")
    return config


@pytest.fixture
def forks() -> None:
    """Skips where the runs of a sweep are not forked: with a GPU, or after a test that compiled with a CUDA build."""
    if not can_fork():
        pytest.skip("this process cannot train in forked ones")
