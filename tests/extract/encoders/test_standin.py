"""Stand-in networks: deterministic, loadable like published ones, and their tokens tell patches apart."""

from pathlib import Path

import pytest
import torch

from egopatch.extract.encoders import load_text_encoder, load_tokenizer, load_video_encoder
from egopatch.extract.encoders.checkpoints.standin import write_standin
from tests.extract.encoders.networks import TEXTS


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2"])
def test_same_arguments_give_equal_files(tmp_path: Path, arch: str) -> None:
    first, again, other = (
        write_standin(arch, tmp_path / str(i) / "network.pth", texts=TEXTS, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    )
    assert first.checkpoint.read_bytes() == again.checkpoint.read_bytes() != other.checkpoint.read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first.tokenizer / name).read_bytes() == (again.tokenizer / name).read_bytes()


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2"])
def test_tokenizer_and_text_network_encode_texts(tmp_path: Path, arch: str) -> None:
    standin = write_standin(arch, tmp_path / "network.pth", texts=TEXTS)
    ids, mask = load_tokenizer(str(standin.tokenizer), 12)([TEXTS[0].upper(), "A zebra, unseen: 42?" * 9])
    assert ids.shape == mask.shape == (2, 12)
    assert mask.dtype == torch.bool
    first, last, pad = (0, 2, 1) if arch == "egovlpv2" else (2, 3, 0)
    assert ids[0, 0] == ids[1, 0] == first
    assert ids[1, -1] == last
    assert (ids[0][~mask[0]] == pad).all()
    assert ids[0, mask[0].sum() - 1] == last
    lower, _ = load_tokenizer(str(standin.tokenizer), 12)([TEXTS[0]])
    assert torch.equal(ids[0], lower[0])  # questions are lower-cased
    states = load_text_encoder(arch, standin.checkpoint, 2)(ids, mask)
    assert states.shape == (2, 12, 128)
    assert states.isfinite().all()


def test_changed_patch_changes_its_own_token_most(tmp_path: Path) -> None:
    standin = write_standin("egovlpv2", tmp_path / "network.pth", texts=TEXTS)
    encoder = load_video_encoder("egovlpv2", standin.checkpoint, 4, 2)
    grey = torch.zeros(1, 4, 3, 112, 112)
    spot = grey.clone()
    spot[:, 1, 0, 48:64, 32:48] = 2.0  # one red patch: row 3, column 2 of the second frame
    moved = (encoder(spot).patches - encoder(grey).patches).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 49 + 3 * 7 + 2
    assert moved.flatten().topk(2).values[1] < 0.5 * moved.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mfas"}, "arch is 'mfas'; expected egovlp or egovlpv2"),
        ({"width": 100}, "width is 100; expected a multiple of 64"),
        ({"size": 100}, "size is 100; expected a multiple of patch, 16"),
        ({"fusion": 5}, "fusion is 5; expected 1 to depth, 4"),
        ({"texts": ()}, "texts is empty"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    request = {"arch": "egovlpv2", "path": tmp_path / "network.pth", "texts": TEXTS} | options
    with pytest.raises(ValueError, match=message):
        write_standin(**request)
