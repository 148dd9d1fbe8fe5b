"""A store shows itself: the facts as text and as a table, and a clip as a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch

from egopatch.features import Fingerprint, StoreSpec, create_store
from egopatch.features.common.pictures import DIMMED
from egopatch.features.store.store import Store
from egopatch.features.tools.derive import derive


@pytest.fixture
def store(tmp_path: Path) -> Store:
    spec = StoreSpec.for_patches(2, (2, 2), 4, "float16", 4)
    store = create_store(tmp_path / "store", spec, Fingerprint({"arch": "a<b", "depth": 6}), ["one", "two"])
    assert "0 of 2 stored" in repr(store)
    row = {array.name: torch.zeros(array.shape) for array in spec.arrays}
    row["saliency"] = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0]])
    row["timestamps"] = torch.tensor([0.25, 0.75])
    store.write_shard(0, {"one": row}, {"one": "made up"})
    return store


def test_repr_describes_the_store(store: Store) -> None:
    lines = dict(line.split(maxsplit=1) for line in repr(store).replace("made by", "made_by").splitlines())
    assert lines["clips"] == "1 of 2 stored"
    assert lines["patches"] == "float16 [2, 4, 4]"
    assert lines["made_by"] == "arch a<b, depth 6"
    assert lines["next"] == "store.read(store.clip_ids[:1])  # patches [1, 2, 4, 4]"
    assert "<td>arch a&lt;b, depth 6</td>" in store._repr_html_()


def test_a_picture_is_bright_where_the_saliency_is_high(store: Store) -> None:
    pixels = np.asarray(store.show("one", np.ones((2, 3, 64, 64), np.float32))) / 255
    first, second = pixels[:64, :64, 0], pixels[:64, 68:132, 0]
    assert first[-1, -1] == second[0, 0] == 1
    assert first[0, 0] == second[-1, -1] == pytest.approx(DIMMED, abs=0.01)
    assert np.asarray(store.show("one")).shape == (240, 452, 3)
    # Frames that a position in time covers together: the one in its middle is shown.
    frames = np.stack([np.full((3, 64, 64), level, np.float32) for level in (0, 0.2, 0, 0.4)])
    pixels = np.asarray(store.show("one", frames)) / 255
    assert pixels[63, 63, 0] == pytest.approx(0.2, abs=0.01)
    with pytest.raises(
        ValueError, match=r"frames has shape \(1, 3, 64, 64\); expected \[2 or more, 3, height, width\]"
    ):
        store.show("one", frames[:1])
    with pytest.raises(
        ValueError, match=r"frames has dtype uint8; expected float32 in \[0, 1\]: divide values up to 255"
    ):
        store.show("one", (frames * 255).astype(np.uint8))
    for wrong, values in ((frames * 255, "0 to 102"), (frames - 1, "-1 to -0.6"), (frames * np.nan, "nan to nan")):
        with pytest.raises(ValueError, match=rf"^frames has values from {values}; expected \[0, 1\]: divide values up"):
            store.show("one", wrong)
    assert store.show("one", torch.from_numpy(frames)) == store.show("one", frames)  # type: ignore[arg-type]


def test_patches_dropped_by_a_derived_store_are_dark(store: Store, tmp_path: Path) -> None:
    pixels = np.asarray(derive(store.path, tmp_path / "kept", 0.5).show("one", np.ones((2, 3, 64, 64), np.float32)))
    assert pixels[63, 63, 0] == 255
    assert (pixels[:64, :64, 0] == 0).any()
