"""Clips and texts of two networks are told apart, by field."""

import json
from pathlib import Path

import pytest

from egopatch.features import Fingerprint, FingerprintMismatch, StoreSpec, create_store
from egopatch.features.__main__ import main
from egopatch.features.store.text_substore import mismatches, require_match
from tests.features.conftest import IDS, SPEC

MADE_BY = {"arch": "egovlpv2", "checkpoint": "sha256:1", "depth": 6, "compute_dtype": "bfloat16"}


def two_halves(root: Path, text_fields: dict) -> tuple:
    clips = create_store(root, SPEC, Fingerprint(MADE_BY), IDS)
    texts = create_store(root / "text", StoreSpec.for_text(5, 8), Fingerprint(text_fields), ("why?",))
    return clips, texts


@pytest.mark.parametrize(
    "fields",
    [
        {**MADE_BY, "depth": 12, "compute_dtype": "float32", "tokenizer": "roberta"},  # each half has its own depth
        {"arch": "egovlpv2", "text_checkpoint": "sha256:2"},  # texts with weights of their own
    ],
)
def test_halves_of_one_network(tmp_path: Path, fields: dict) -> None:
    require_match(*two_halves(tmp_path / "store", fields))


def test_halves_of_two_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, texts = two_halves(tmp_path / "store", {**MADE_BY, "checkpoint": "sha256:2"})
    assert mismatches(clips, texts) == ["checkpoint: 'sha256:1' of the clips, 'sha256:2' of the texts"]
    with pytest.raises(FingerprintMismatch, match=r"two networks \(checkpoint: 'sha256:1' .*\); move .*text away"):
        require_match(clips, texts)
    assert main(["info", str(clips.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["halves_differ"] == mismatches(clips, texts)
