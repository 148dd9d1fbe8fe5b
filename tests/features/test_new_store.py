"""Creating and opening a store: which ids, specifications, fingerprints and locations are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from egopatch.features import (
    ArraySpec,
    Fingerprint,
    Store,
    StoreError,
    StoreSpec,
    create_store,
    open_store,
)
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill

Make = Callable[..., Store]
CLS, PATCHES = SPEC.array("cls"), SPEC.array("patches")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../x", "is a path that leads elsewhere"),
        ("a/../../x", "is a path that leads elsewhere"),
        ("..\\x", "is a path that leads elsewhere"),
        ("/etc/passwd", "is a path that leads elsewhere"),
        ("a\0b", "contains a control character"),
        ("x" * 4096, "has 4096 bytes; expected at most 1024"),
        ("", "is empty"),
        ("\ud800", "is not valid Unicode"),
    ],
)
def test_hostile_ids_are_refused(make: Make, name: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        make(ids=("good", name))


def test_two_spellings_of_one_id_are_refused(make: Make) -> None:
    make(ids=("caf\u00e9",))
    with pytest.raises(StoreError, match="two Unicode spellings of one name"):
        make(ids=("cafe\u0301",))


def test_ids_of_a_new_store_come_from_any_iterable_but_not_from_one_text(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, (name for name in "ab"))
    assert store.planned_ids == ("a", "b")
    with pytest.raises(TypeError, match=r"^ids is 'abc'; expected a list of ids, such as \['abc'\]$"):
        create_store(tmp_path / "other", SPEC, FINGERPRINT, "abc")
    assert not (tmp_path / "other").exists()


def test_a_new_store_needs_a_spec_and_a_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^fingerprint is {'depth': 2}; expected a Fingerprint: Fingerprint\("):
        create_store(tmp_path / "store", SPEC, {"depth": 2}, IDS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^spec is {'frames': 4}; expected a StoreSpec, such as StoreSpec\.for_pat"):
        create_store(tmp_path / "store", {"frames": 4}, FINGERPRINT, IDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("location", [None, 3, {"path": "x"}])
def test_a_location_that_is_no_path_is_refused(location: object) -> None:
    with pytest.raises(StoreError, match=r"^the location of a store is .*; expected its folder or URL$"):
        open_store(location)  # type: ignore[arg-type]


def test_ids_never_become_paths(make_local: Make) -> None:
    store = make_local(ids=("P01/P01_01", "vid|P1|start|end", "..."))
    fill(store)
    names = [path.name for path in store.path.rglob("*")]
    assert not any("P01" in name or "|" in name or "..." in name for name in names)
    assert len(store.read(store.planned_ids).cls) == 3


def test_a_missing_store_and_an_unknown_format_are_refused(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"no store at .*nowhere \(store.json is missing\).*replace its old path"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="format 'tar' is unknown"):
        create_store(tmp_path / "x", SPEC, FINGERPRINT, IDS, "tar")


def _with(old: ArraySpec, *new: ArraySpec) -> StoreSpec:
    return replace(SPEC, arrays=tuple(array for array in SPEC.arrays if array != old) + new)


@pytest.mark.parametrize(
    ("spec", "fingerprint", "why"),
    [
        (lambda: SPEC, {"a": [1]}, r"fingerprint has 'a' = \[1\]; expected text, a number, true, false or None"),
        (lambda: SPEC, {"a": Path("x")}, r"fingerprint has 'a' = PosixPath\('x'\); expected text, a number"),
        (lambda: SPEC, {"a": np.float32(1)}, r"fingerprint has 'a' = np.float32\(1.0\); .*Python's own types"),
        (lambda: SPEC, {1: "a"}, "fingerprint has the name 1; expected text"),
        (lambda: SPEC, {"a": float("nan")}, "fingerprint has 'a' = nan; expected text, a number"),
        (lambda: SPEC, "a", "fingerprint is 'a'; expected a mapping from names of settings to values"),
        (lambda: _with(CLS, replace(CLS, shape=(8.0,))), {}, r"'cls' has row shape \(8.0,\); expected a tuple of ints"),
        (lambda: _with(CLS, replace(CLS, shape=[8])), {}, r"'cls' has row shape \[8\]; expected a tuple of ints"),
        (
            lambda: replace(SPEC, grid=(2, 3, 1)),
            {},
            r"grid is \(2, 3, 1\); expected at least 1 row and 1 column, as a tuple",
        ),
        (lambda: replace(SPEC, grid=[2, 3]), {}, r"grid is \[2, 3\]; expected .*, as a tuple of ints"),
        (lambda: replace(SPEC, grid=(2, 2)), {}, r"grid is \(2, 2\), but array 'patches' has 6 patches a frame, not 4"),
        (lambda: replace(SPEC, shard=4.0), {}, "shard is 4.0; expected at least 1 row, as an int"),
        (
            lambda: _with(CLS, replace(CLS, shape=(9,))),
            {},
            r"'cls' has row shape \(9,\); expected \(8,\) beside patches",
        ),
        (lambda: _with(CLS, CLS, ArraySpec("coarse", (4, 8), "float16")), {}, r"'coarse' has row shape .*\[T, M, E\]"),
        (lambda: _with(CLS, replace(CLS, dtype="float64")), {}, "array dtype 'float64' is unknown; expected one of"),
        (lambda: _with(PATCHES, replace(PATCHES, dtype="int8")), {}, "has dtype int8, which needs an array 'scale'"),
        (lambda: _with(CLS), {}, "array 'cls' is missing; a store of patches needs cls, patches, saliency"),
        (lambda: _with(SPEC.array("patches")), {}, "array 'patches' is missing"),
    ],
)
def test_a_store_that_could_not_be_opened_is_refused_before_anything_is_written(
    spec: Callable[[], StoreSpec], fingerprint: dict, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        create_store(tmp_path / "store", spec(), Fingerprint(fingerprint), IDS)
    assert not (tmp_path / "store").exists()
