"""Models loaded by name from a stand-in hub on loopback: revisions, the cache, and what is refused."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoConfig, AutoModel

from egopatch.configs.schema import Config, EncoderConfig, VideoConfig
from egopatch.extract.encoders import CheckpointError, load_video_encoder, open_text_checkpoint
from egopatch.extract.worker.job import resolve_job
from tests.extract.encoders.hub_server import Files, HubServer, Model, serving_hub
from tests.extract.encoders.test_hf import CONFIGS, PROCESSOR

NAME = "some/dinov2"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Files]:
    """The files of a random model with this seed, and a pickle beside them."""

    def write(seed: int) -> Files:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("model")
        AutoModel.from_config(AutoConfig.for_model("dinov2", **CONFIGS["dinov2"])).save_pretrained(folder)
        written = {file.name: file.read_bytes() for file in folder.iterdir()}
        processor = {"preprocessor_config.json": json.dumps(PROCESSOR).encode()}
        return written | processor | {"pytorch_model.bin": b"a pickle", "theirs.py": b"raise SystemExit"}

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Callable[[int], Files]) -> Iterator[HubServer]:
    """A hub with two revisions of one model, and an empty cache."""
    with serving_hub() as server:
        model = server.models[NAME] = Model()
        model.push(files(0), "main", "v1")
        model.push(files(1), "v2", "refs/pr/1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", server.link)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.link + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


def weight(model: str) -> Tensor:
    """A tensor that tells models apart."""
    return next(load_video_encoder("hf", model, 4, 2, size=32).parameters()).detach().clone()


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_video_encoder("hf", model, 4, 2, size=32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_downloaded_without_pickles_and_then_read_offline(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weight(NAME)
    assert open_text_checkpoint("hf", None, NAME).path.parent.name == "snapshots"
    got = {path.rpartition("/")[2] for path in hub.asked if path.startswith(f"GET /{NAME}/resolve/")}
    assert got == {"config.json", "model.safetensors", "preprocessor_config.json"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert torch.equal(weight(NAME), first)
    assert not hub.asked


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    main, second = weight(NAME), weight(f"{NAME}@v2")
    assert not torch.equal(main, second)
    assert torch.equal(weight(f"{NAME}@refs/pr/1"), second)
    assert torch.equal(weight(f"{NAME}@{hub.models[NAME].refs['v2']}"), second)
    assert f"the hub's {NAME} has no revision 'v3'; expected a branch, a tag or a commit" in refused(f"{NAME}@v3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(weight(f"{NAME}@v2"), second)
    assert f"run `hf download {NAME} --revision v1` on a machine" in refused(f"{NAME}@v1")


def test_workers_use_the_revision_that_their_job_resolved(hub: HubServer, files: Callable[[int], Files]) -> None:
    encoder = EncoderConfig(arch="hf", checkpoint=Path(NAME), depth=2, dtype="float32", device="cpu")
    job = resolve_job(Config(video=VideoConfig(frames=4, size=32), encoder=encoder))
    hub.models[NAME].push(files(2), "main")
    hub.asked.clear()
    worker = resolve_job(job.config, "cpu", job.network)
    assert worker.checkpoint.sha256 == job.checkpoint.sha256
    assert not hub.asked
    assert resolve_job(Config(video=job.config.video, encoder=encoder)).checkpoint.sha256 != job.checkpoint.sha256


def test_hub_errors_are_reported_in_one_line(hub: HubServer, files: Callable[[int], Files]) -> None:
    assert "the hub has no model of this name; check the spelling, or run `hf auth login`" in refused("some/other")
    pickled = {name: content for name, content in files(0).items() if not name.endswith(".safetensors")}
    hub.models["some/pickled"] = Model()
    hub.models["some/pickled"].push(pickled, "main")
    assert "some/pickled, on the hub, has its weights in pytorch_model.bin, a pickle, which" in refused("some/pickled")
    hub.gated.add(NAME)
    assert "its owners restrict access to it on the hub; request access on its page" in refused(NAME)
    hub.broken = 503
    assert "it cannot be downloaded from the hub (Got: HfHubHTTPError: Server error '503" in refused("some/other")
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_uncached_model_without_a_hub_fails_quickly_in_one_line(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    before = time.monotonic()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert f"not in the hub's cache {constants.HF_HUB_CACHE}, and {address} cannot be reached; run" in refused(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(NAME)
    assert line.startswith(f"{NAME} is not a folder here, and not in the hub's cache")
    assert line.endswith(
        f"and HF_HUB_OFFLINE is set; run `hf download {NAME}` on a machine that reaches the hub and copy its "
        "cache here, or name the model's folder"
    )
    assert time.monotonic() - before < 10  # the hub's client would retry for a minute
    assert not hub.asked


def test_a_download_that_was_interrupted_is_not_used_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    weight(NAME)
    (downloaded,) = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/model.safetensors")
    downloaded.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{NAME} is not a folder here, and only in part in the hub's cache" in refused(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    weight(NAME)


@pytest.mark.parametrize("model", ["/some/folder", "three/levels/deep", "some/model@", "some/mo del", "-x"])
def test_missing_folder_with_an_invalid_hub_name_is_refused_locally(hub: HubServer, model: str) -> None:
    assert refused(model) == (
        f"{model} does not exist; expected a model's folder, or its name on the hub: NAME or NAME@REVISION"
    )
    assert not hub.asked
