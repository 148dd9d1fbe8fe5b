"""Grouping by clip, and features from disk and from memory."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Dataset, Question
from egopatch.features import PatchTokens, StoreError, open_store, read_ahead
from egopatch.features.store.read_ahead import ClipSource
from egopatch.train.data.batch import Batch
from egopatch.train.data.features import Features
from egopatch.train.data.question_table import NO_CLASS, QuestionTable, plan_batches
from egopatch.train.data.residency import ClipsInMemory, choose_residency
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.processes.distributed import Distributed
from egopatch.train.rundir.trained_on import changed_clips
from tests.features.faults import before_a_shard_is_opened, replace_rows
from tests.train.tiny import losses, with_run, write_tiny


def table_of(clips: list[int]) -> QuestionTable:
    questions = [Question(str(i), f"c{c}", "t", "a", "open", ()) for i, c in enumerate(clips)]
    dataset = Dataset((), {"train": (), "val": (), "test": ()}, ("<UNK0>", "<UNK1>", "a"), ("t",), "direct")
    return QuestionTable.from_questions(questions, dataset, {"t": 0})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 20), st.integers(0, 3))
def test_batches_hold_each_question_once_whole_clips_and_stay_bounded(clips: list[int], size: int, epoch: int) -> None:
    table = table_of(clips)
    plan = plan_batches(table, size, seed=1, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(clips)))
    of_batch = [set(table.clip[torch.from_numpy(rows)].tolist()) for rows in plan]
    assert sum(map(len, of_batch)) == len(set(clips))
    assert all(len(rows) <= size or len(seen) == 1 for rows, seen in zip(plan, of_batch))


def test_order_follows_from_seed_and_epoch() -> None:
    table = table_of(list(range(40)))

    def order(seed: int | None, epoch: int) -> list[int]:
        return np.concatenate(plan_batches(table, 8, seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(None, 0) == list(range(40))


@pytest.mark.parametrize("head", ["psa", "egovlp", pytest.param("attention", marks=pytest.mark.slow)])
def test_disk_and_ram_residency_train_identically(tiny: Config, capsys: pytest.CaptureFixture[str], head: str) -> None:
    on_disk = with_run(tiny, f"{head}-disk", head_name=head, train_residency="disk")
    in_memory = with_run(tiny, f"{head}-ram", head_name=head, train_residency="ram")
    fit(on_disk, "x")
    assert "kept on disk, read batch by batch (set by train.residency" in capsys.readouterr().out
    fit(in_memory, "x")
    assert "kept in memory (set by train.residency" in capsys.readouterr().out
    assert losses(on_disk.run.dir) == losses(in_memory.run.dir)


@pytest.mark.parametrize("residency", ["disk", "ram", "gpu"])
def test_batches_hold_their_clips_and_copy_no_resident_tokens(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, residency: str
) -> None:
    monkeypatch.setattr(
        "egopatch.train.data.features.choose_residency", lambda *_: (residency, "")
    )  # a GPU's steps, on the CPU
    monkeypatch.setattr("egopatch.train.data.features.READ_CLIPS", 5)
    experiment = open_experiment(tiny)
    features, table = experiment.features, experiment.train_table
    store = features.store
    assert store is not None
    places, read = set(), features.bytes_read
    for batch in features.stream(table, plan_batches(table, 16, 0)):
        clips = table.clip[batch.rows].unique().tolist()
        expected = store.read([table.clips[clip] for clip in clips]).tensors()
        found = batch.tokens.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert torch.equal(table.clip[batch.rows], torch.tensor(clips)[batch.clip_index])
        assert batch.stored is not None
        places.add(batch.stored.patches.data_ptr())
    # Resident tokens stay in place; tokens read from disk cycle through the buffers of three batches.
    assert len(places) == (3 if residency == "disk" else 1)
    assert (features.bytes_read > read) == (residency == "disk")


META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Notes the operators that would make a GPU's host wait, with `meta` in the GPU's place.

    Those are all that involve both devices, except copies from pinned memory that are asked not to wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []  # kept, so that no later tensor gets their memory
        self.waits: list[str] = []
        self.copies = 0

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if on_host and len(on_host) < len(tensors):
            memory = {tensor.untyped_storage().data_ptr() for tensor in self.pinned}
            pinned = all(tensor.untyped_storage().data_ptr() in memory for tensor in on_host)
            self.copies += 1
            if not (pinned and (kwargs or {}).get("non_blocking")):
                self.waits.append(str(function))
        return out


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Experiments open on `meta`, and memory is pinned, as far as `Waits` can tell."""
    waits = Waits()

    def pinned_read_ahead(
        source: ClipSource, batches: Sequence[Sequence[str]], threads: int, device: torch.device
    ) -> Iterator[PatchTokens]:
        assert device == META
        for ids in batches:
            tokens = source.read(ids, out=source.buffers(len(ids)), threads=threads).tensors()
            yield PatchTokens(**{name: waits.pin(tensor) for name, tensor in tokens.items()})

    monkeypatch.setattr("egopatch.train.data.features.read_ahead", pinned_read_ahead)
    monkeypatch.setattr("egopatch.train.fitting.experiment.pick_device", lambda *_: META)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: waits.pin(tensor))
    return waits


def tensors_of(value: object, path: str = "batch") -> dict[str, Tensor]:
    """The tensors of a batch, nested ones included, by name."""
    if isinstance(value, Tensor):
        return {path: value}
    if is_dataclass(value):
        parts: dict[str, object] = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        parts = {str(place): part for place, part in enumerate(value)} if isinstance(value, tuple) else {}
    return {name: t for part, inner in parts.items() for name, t in tensors_of(inner, f"{path}.{part}").items()}


@pytest.mark.parametrize("residency", ["disk", "ram", "gpu"])
@pytest.mark.parametrize("shared", [False, True])
def test_building_a_batch_does_not_wait_for_copies(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, waits: Waits, residency: str, shared: bool
) -> None:
    """A copy from memory that is not pinned waits for the steps before, so a host could not launch ahead of its GPU."""
    monkeypatch.setattr("egopatch.train.data.features.choose_residency", lambda *_: (residency, ""))
    experiment = open_experiment(with_run(tiny, "waits", data_paraphrases=True))
    features, table = experiment.features, experiment.train_table
    if shared:  # the batches of one of two ranks
        features.ranks, features._rank_clips = Distributed(0, 2), frozenset(table.clips[::2])
    with waits:
        batches = list(features.stream(table, plan_batches(table, 16, 0)))
    assert waits.waits == []
    assert waits.copies >= 8 * len(batches)
    for batch in batches:
        on_host = {name for name, tensor in tensors_of(batch).items() if tensor.device != META}
        assert on_host == {"batch.rows", "batch.variants.0.rows", "batch.variants.1.rows"}
        assert (batch.rank_slice is not None) == shared


def test_building_a_multiple_choice_batch_does_not_wait_for_copies(waits: Waits) -> None:
    features = Features(None, None, [], ["q", "a", "b", "c"], "auto", META)
    table = table_of([0, 1, 1])
    options, lengths = torch.tensor([[1, 2, -1], [2, 3, 1], [3, 1, 2]]), torch.ones(3, 3, dtype=torch.long)
    with waits:
        batch = features.batch(replace(table, options=options, lengths=lengths), np.arange(3))
    assert waits.waits == []
    assert batch.options is not None
    assert {tensor.device for tensor in tensors_of(batch.options).values()} == {META}


def test_clips_in_memory_read_like_their_store(tiny: Config) -> None:
    store = open_experiment(tiny).features.store
    assert store is not None
    held, requested = store.clip_ids[1:9], [store.clip_ids[row] for row in (7, 2, 2, 5)]
    memory = ClipsInMemory(store.read(held), {name: row for row, name in enumerate(held)}, store)
    expected = [store.read(ids).tensors() for ids in (requested, held, requested[:1])]
    for tokens, want in zip(read_ahead(memory, [requested, held, requested[:1]]), expected, strict=True):
        found = tokens.tensors()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def with_own_tokens(batch: Batch) -> Batch:
    """The batch and its variants with the tokens of its clips alone, wherever they are kept."""
    assert batch.variants is not None
    first, second = (variant.with_tokens(batch.tokens) for variant in batch.variants)
    return replace(batch.with_tokens(batch.tokens), variants=(first, second))


def same_content(batch: Batch, expected: Batch) -> None:
    found, wanted = tensors_of(batch), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.cpu(), wanted[name].cpu()), name


def test_batches_from_disk_and_memory_are_equal(tiny: Config) -> None:
    streams = []
    for residency in ("disk", "ram"):
        config = with_run(tiny, residency, data_paraphrases=True, train_residency=residency)
        experiment = open_experiment(config)
        table = experiment.train_table
        streams.append(experiment.features.stream(table, plan_batches(table, 16, 0)))
    for batches in zip(*streams, strict=True):
        on_disk, in_memory = map(with_own_tokens, batches)
        same_content(on_disk, in_memory)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("residency", ["disk", "ram", "gpu"])
def test_batches_reach_the_gpu_without_synchronisation(tiny: Config, cuda: torch.device, residency: str) -> None:
    config = with_run(tiny, "cuda", data_paraphrases=True, train_residency=residency, train_device="cuda")
    features, table = (experiment := open_experiment(config)).features, experiment.train_table
    on_cpu = open_experiment(with_run(config, "cpu", train_residency="ram", train_device="cpu")).features
    plan = plan_batches(table, 16, 0)
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in features.stream(table, plan):
            torch.cuda._sleep(10_000_000)  # the copies wait in line while the loop goes on
            found.append(with_own_tokens(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, expected in zip(found, on_cpu.stream(table, plan), strict=True):
        same_content(batch, with_own_tokens(expected))


@pytest.mark.parametrize("residency", ["disk", "ram"])
@pytest.mark.parametrize("quantised", [False, True])
def test_chunked_patches_equal_the_patches_of_the_clips(tiny: Config, residency: str, quantised: bool) -> None:
    experiment = open_experiment(with_run(tiny, "chunks", train_residency=residency))
    table = experiment.train_table
    batch = next(iter(experiment.features.stream(table, plan_batches(table, 24, 0))))
    assert batch.stored is not None
    assert len(batch.tokens.cls) == 3
    if quantised:
        scale = torch.rand(batch.stored.patches.shape[:3])
        batch = replace(batch, stored=replace(batch.stored, scale=scale))
    patches, scales = zip(*batch.patch_chunks(2), strict=True)
    assert [len(chunk) for chunk in patches] == [2, 1]
    assert torch.equal(torch.cat(patches), batch.tokens.patches)
    assert torch.equal(torch.cat(scales), batch.tokens.scale) if quantised else scales == (None, None)


def test_variants_keep_the_questions_and_replace_only_their_texts(tiny: Config) -> None:
    experiment = open_experiment(with_run(tiny, "variants", data_paraphrases=True))
    features, table = experiment.features, experiment.train_table
    assert experiment.tables["val"].variants is None
    stored = open_store(tiny.store.path / "text")
    for batch in features.stream(table, plan_batches(table, 16, 0)):
        assert batch.variants is not None
        for number, variant in enumerate(batch.variants):
            assert variant.stored is batch.stored
            assert variant.variants is None
            assert torch.equal(variant.answers, batch.answers)
            rows = table.variants[batch.rows, number]
            read = stored.read_text([table.questions[q].variants[number] for q in batch.rows])
            assert torch.equal(features._states[rows], read.states[:, : features._states.shape[1]])
            assert torch.equal(variant.states[variant.text_index], features._states[rows])
            assert torch.equal(variant.mask[variant.text_index], features._mask[rows])
    assert next(features.stream(experiment.tables["val"], [np.arange(3)])).variants is None


def test_gpu_residency_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.residency is 'gpu' but the device is cpu"):
        choose_residency("gpu", 10, torch.device("cpu"))


def test_features_that_do_not_fit_in_memory_stay_on_disk() -> None:
    chosen, line = choose_residency("auto", 10**18, torch.device("cpu"))
    assert chosen == "disk"
    assert "1000000.0 TB kept on disk" in line


def test_unknown_answers_are_not_trained_on() -> None:
    questions = [Question(str(i), "c", "t", answer, "open", ()) for i, answer in enumerate(["a", "b", "a"])]
    dataset = Dataset((), {"train": (), "val": (), "test": ()}, ("<UNK0>", "<UNK1>", "a"), ("t",), "direct")
    table = QuestionTable.from_questions(questions, dataset, {"t": 0})
    assert table.answer.tolist() == [2, NO_CLASS, 2]
    assert [q.question_id for q in table.answerable().questions] == ["0", "2"]


def test_text_that_was_never_encoded_is_refused(tiny: Config) -> None:
    path = tiny.data.root / "qa" / "direct" / "formatted_val_qas_encode.json"
    before = path.read_text()
    try:
        path.write_text(before.replace("what colour is the left thing?", "which hue has the left thing?"))
        with pytest.raises(
            StoreError, match=r"1 question text is missing from .*, such as 'which hue has the left thing"
        ):
            open_experiment(tiny)
    finally:
        path.write_text(before)


def test_a_row_replaced_after_it_was_read_counts_as_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_run(write_tiny(tmp_path), "psa", train_epochs=1, train_residency="ram")
    store = open_store(config.store.path)
    read, unread = store.clip_ids[0], store.clip_ids[16]
    before_a_shard_is_opened(monkeypatch, 1, lambda: replace_rows(store, 90, read, unread))
    fit(config, "egopatch train fit")
    assert set(changed_clips(config.run.dir, store)) == {read, unread}
