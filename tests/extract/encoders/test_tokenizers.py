"""Tokenizers that cannot be loaded fail quickly with a one-line error."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders import load_tokenizer
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.extract.encoders.networks import hub, text

NAME = "egopatch/no-such-tokenizer"


def refused(model: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(model)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"text.model is {model!r}")
    return line


@pytest.mark.slow
def test_loading_a_tokenizer_does_not_import_transformers_models(tmp_path: Path) -> None:
    """`extract doctor` needs the tokenizer alone; transformers' models take seconds and 160 MB to import."""
    folder = write_standin("egovlpv2", tmp_path / "a.pth", texts=["what is held?"]).tokenizer
    program = "import sys; from egopatch.extract.encoders import load_tokenizer as load; load(sys.argv[1])"
    show = "print('transformers.modeling_utils' in sys.modules)"
    run = [sys.executable, "-c", f"{program}; {show}", str(folder)]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "False\n"


def test_tokenizer_files_of_a_newer_library_are_refused(tmp_path: Path) -> None:
    folder = write_standin("egovlpv2", tmp_path / "a.pth", texts=["what is held?"]).tokenizer
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "BPE3"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "whose tokenizer cannot be read (data did not match any variant" in refused(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_pointer_of_git_lfs_in_place_of_a_tokenizer_file_is_refused(name: str, tmp_path: Path) -> None:
    """`vocab.txt` would be read as a vocabulary of three words."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    shutil.copytree(MINILM.locate(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_text(pointer)
    load_tokenizer(str(tmp_path))  # needs no weights
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_text(pointer)
    assert refused(str(tmp_path)).endswith(
        f"whose {name} is a pointer of Git LFS, not the file itself; run `git lfs pull` to fetch it"
    )


def test_tokenizer_without_a_padding_token_is_refused(tmp_path: Path) -> None:
    """Such as that of GPT-2."""
    folder = write_standin("egovlpv2", tmp_path / "a.pth", texts=["what is held?"]).tokenizer
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    assert (
        "cannot encode a question (Asking to pad but the tokenizer does not have a padding token); correct its files"
        in refused(str(folder))
    )


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "whose tokenizer cannot be read (" in refused(str(tmp_path))


def test_missing_tokenizer_folder_is_refused(tmp_path: Path) -> None:
    line = refused(str(tmp_path / "nowhere"))
    assert line.endswith("which does not exist; expected a folder with a tokenizer or a name on the hub")


@pytest.mark.parametrize("silent", [True, False])
def test_unreachable_hub_is_reported_within_ten_seconds(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not silent:
            server.close()  # so that the port refuses
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hub, "REACH_S", 0.1 if silent else hub.REACH_S)
        before = time.monotonic()
        line = refused(NAME)
    assert f"which is neither a folder here nor in the hub's cache, and {address} cannot be reached; copy" in line
    assert time.monotonic() - before < 10


def test_uncached_tokenizer_is_refused_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "in the hub's cache, and HF_HUB_OFFLINE is set; copy the tokenizer" in refused(NAME)


def test_cached_tokenizer_is_read_without_contacting_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub cannot be reached, asking it takes seconds."""
    calls: list[bool] = []

    def read(name: str, revision: str, local_files_only: bool) -> str:
        calls.append(local_files_only)
        return f"tokenizer of {name} at {revision}"

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr(hub, "why_unreachable", lambda: pytest.fail("the hub was asked"))
    assert text._pretrained_tokenizer("some/model") == "tokenizer of some/model at main"
    assert text._pretrained_tokenizer("some/model@v2") == "tokenizer of some/model at v2"
    assert calls == [True, True]
