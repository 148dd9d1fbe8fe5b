"""Clips and texts from two networks are refused, naming the fields that differ."""

import json
from pathlib import Path

import pytest

from egopatch.features import Fingerprint, FingerprintMismatch, Store, StoreSpec, create_store
from egopatch.features.__main__ import main
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import network_differences, require_same_network, substores
from tests.features.conftest import IDS, SPEC

MADE_BY = {"arch": "egovlpv2", "checkpoint": "sha256:1", "depth": 6, "compute_dtype": "bfloat16"}


def clips_and_texts(root: Path, text_fields: dict) -> tuple[Store, Store]:
    clips = create_store(root, SPEC, Fingerprint(MADE_BY), IDS)
    texts = create_store(root / "text", StoreSpec.for_text(5, 8), Fingerprint(text_fields), ("why?",))
    return clips, texts


@pytest.mark.parametrize(
    "fields",
    [
        {
            **MADE_BY,
            "depth": 12,
            "compute_dtype": "float32",
            "tokenizer": "roberta",
        },  # clips and texts have depths of their own
        {"arch": "egovlpv2", "text_checkpoint": "sha256:2"},  # texts with weights of their own
    ],
)
def test_clips_and_texts_of_one_network_are_accepted(
    tmp_path: Path, fields: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, texts = clips_and_texts(tmp_path / "store", fields)
    assert network_differences(clips.fingerprint, texts.fingerprint) == []
    require_same_network(clips, texts)  # raises nothing
    assert substores(storage_at(clips.path)) == ["", "text"]
    assert substores(storage_at(texts.path)) == [""]
    assert main(["info", str(clips.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["network_differences"] == []
    assert shown["text"]["fingerprint"] == fields


def test_clips_and_texts_of_two_networks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, texts = clips_and_texts(tmp_path / "store", {**MADE_BY, "checkpoint": "sha256:2"})
    assert network_differences(clips.fingerprint, texts.fingerprint) == [
        "checkpoint: clips have 'sha256:1', texts have 'sha256:2'"
    ]
    with pytest.raises(
        FingerprintMismatch, match=r"different networks \(checkpoint: clips have 'sha256:1', .*\); move .*text away"
    ):
        require_same_network(clips, texts)
    assert main(["info", str(clips.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network_differences"] == network_differences(
        clips.fingerprint, texts.fingerprint
    )
