"""Padded batches and steps captured as CUDA graphs learn the same as plain batches run eagerly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders.layers import graphs
from egopatch.train.data.batch import Batch
from egopatch.train.data.batch_size import BatchSize
from egopatch.train.data.question_table import NO_CLASS, QuestionTable, plan_batches
from egopatch.train.fitting import build_heads
from egopatch.train.fitting.build_heads import build_stacked_heads, why_not_captured
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.heads import Head, register_head
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.steps import captured
from egopatch.train.steps.captured import changing_tensors, with_own_tensors
from tests.capture import failing_capture
from tests.train.test_choice import choice  # noqa: F401  a fixture
from tests.train.test_published import make
from tests.train.tiny import WIDTH, losses, with_run

BATCH = 20


def epoch(experiment: Experiment, padded: bool, seed: int = 0) -> Iterator[Batch]:
    """The batches of an epoch; its last one is smaller than the others."""
    table = experiment.train_table
    plan = plan_batches(table, BATCH, seed)
    size = BatchSize.covering(table, plan_batches(table, BATCH, 0), BATCH) if padded else None
    return experiment.features.stream(table, plan, size)


def trace(config: Config, experiment: Experiment, padded: bool, seeds: tuple[int, ...] = (0,)) -> list[list[float]]:
    """Losses and norms of the steps of two epochs."""
    configs = [with_run(config, f"seed{seed}", train_seed=seed) for seed in seeds]
    heads = build_stacked_heads(configs, experiment)
    steps = [heads.learn(batch) for seed in range(2) for batch in epoch(experiment, padded, seed)]
    return [step.values.flatten().tolist() for step in steps if step is not None]


@pytest.mark.parametrize("options", [
    {"train_label_smoothing": 0.1}, {"head_name": "egovlp"}, {"head_name": "question-only"}, {"head_name": "attention"},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"train_contrast": 1.0, "data_paraphrases": True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_padding_changes_no_loss(tiny: Config, options: dict[str, object]) -> None:
    config = with_run(tiny, "padded", train_ema=0.9, **options)
    experiment = open_experiment(config)
    sizes = {tuple(tensor.shape for tensor in changing_tensors(batch)) for batch in epoch(experiment, padded=True)}
    assert len(sizes) == 1
    seeds = (0,) if options.get("head_name") == "attention" else (0, 1)
    expected = trace(config, experiment, padded=False, seeds=seeds)
    assert len(expected) > 10
    torch.testing.assert_close(
        torch.tensor(trace(config, experiment, padded=True, seeds=seeds)), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_padding_changes_no_loss_of_options(choice: Config) -> None:  # noqa: F811
    experiment = open_experiment(choice)
    expected = torch.tensor(trace(choice, experiment, padded=False))
    torch.testing.assert_close(torch.tensor(trace(choice, experiment, padded=True)), expected, rtol=1e-4, atol=1e-5)


def test_padding_questions_have_no_class_and_are_not_counted(tiny: Config) -> None:
    experiment = open_experiment(tiny)
    table = experiment.train_table
    rows = plan_batches(table, BATCH, None)[0][:7]
    size = BatchSize(10, 5, 9, 0)
    batch, plain = (experiment.features.batch(table, rows, size=wanted) for wanted in (size, None))
    assert batch.padded
    assert not plain.padded
    assert len(batch) == batch.total_questions == 7
    assert batch.answers[:7].tolist() == plain.answers.tolist()
    assert batch.answers[7:].tolist() == [NO_CLASS] * 3
    assert batch.clip_rows is not None
    assert len(batch.clip_rows) == 5
    assert len(batch.states) == 9
    assert torch.equal(batch.states[batch.text_index[:7]], plain.states[plain.text_index])


@pytest.mark.parametrize("size", [BatchSize(6, 9, 9, 0), BatchSize(9, 1, 9, 0), BatchSize(9, 9, 1, 0)])
def test_a_batch_larger_than_the_size_is_not_padded(tiny: Config, size: BatchSize) -> None:
    experiment = open_experiment(tiny)
    table = experiment.train_table
    rows = np.concatenate(plan_batches(table, 1, None))[:16]
    assert not experiment.features.batch(table, rows, size=size).padded


def test_a_graph_gets_its_own_copy_of_every_changing_tensor(tiny: Config) -> None:
    """A graph reads the tensors that it was captured with: each must be a copy, and get the next batch's numbers."""
    experiment = open_experiment(with_run(tiny, "own", data_paraphrases=True))
    first, second = list(epoch(experiment, padded=True))[:2]
    own = with_own_tensors(first)
    assert own.stored is first.stored
    pairs = list(zip(changing_tensors(own), changing_tensors(second), strict=True))
    assert len(pairs) >= 3 * 6
    before = {tensor.data_ptr() for tensor in changing_tensors(first)}
    for tensor, new in pairs:
        assert tensor.data_ptr() not in before
        tensor.copy_(new)
    assert all(torch.equal(a, b) for a, b in zip(changing_tensors(own), changing_tensors(second), strict=True))


def test_cached_merged_patches_give_the_same_losses(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_run(tiny, "derived")
    assert config.head.coarse
    plain = open_experiment(config)
    expected = trace(config, plain, padded=False)
    kept = open_experiment(config)
    kept.features.residency = "gpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    assert trace(config, kept, padded=False) == expected
    assert next(epoch(kept, padded=False)).derived is not None
    assert next(epoch(plain, padded=False)).derived is None


def test_merged_patches_are_not_cached_without_free_gpu_memory(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = open_experiment(tiny)
    experiment.features.residency = "gpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 10**9))
    trace(tiny, experiment, padded=False)
    assert next(epoch(experiment, padded=False)).derived is None


def test_one_oversized_clip_does_not_enlarge_every_padded_batch() -> None:
    clips = torch.tensor([0] * 50 + [1] * 6 + [2] * 7)
    table = QuestionTable((), ("a", "b", "c"), clips, clips, torch.zeros(63), torch.zeros(63))
    assert BatchSize.covering(table, plan_batches(table, 10, 0), 10) == BatchSize(7, 2, 2, 0)
    assert BatchSize.covering(table, plan_batches(table, 5, 0), 5).questions == 50


def test_merged_patches_are_not_cached_for_a_head_on_fewer_frames(tiny: Config) -> None:
    config = with_run(tiny, "one-frame", head_frames=1)
    experiment = open_experiment(config)
    experiment.features.residency = "gpu"
    trace(config, experiment, padded=False)
    assert next(epoch(experiment, padded=False)).derived is None


def test_why_not_captured_names_the_obstacle(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = open_experiment(tiny)
    assert why_not_captured(tiny, experiment) == "the device is cpu"
    experiment = replace(experiment, device=torch.device("cuda"))
    assert why_not_captured(tiny, experiment) == "features are not on the GPU (train.residency: ram)"
    experiment.features.residency = "gpu"
    several = with_run(tiny, "several", train_accumulate=2)
    assert why_not_captured(several, experiment) == "train.accumulate is 2"
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: shape)

    def only_wide(shape: tuple[int, ...], *_: object) -> tuple[str, str]:
        return ("triton", "fits") if shape[-1] > WIDTH else ("reference", "too narrow")

    monkeypatch.setattr(build_heads, "implementation_in_use", only_wide)
    monkeypatch.setattr(build_heads, "triton_fault", lambda _: None)
    assert why_not_captured(tiny, experiment) == "select_attend runs its reference (too narrow)"
    monkeypatch.setattr(build_heads, "triton_fault", lambda _: "no compiler")
    assert why_not_captured(tiny, experiment) == "dropout runs its reference (no compiler)"


def test_capture_checks_the_kernels_on_the_padded_coarse_width(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = replace(open_experiment(tiny), device=torch.device("cuda"))
    experiment.features.residency = "gpu"
    seen = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: shape)
    monkeypatch.setattr(build_heads, "triton_fault", lambda _: None)
    monkeypatch.setattr(
        build_heads, "implementation_in_use", lambda shape, *_: (seen.append(shape[-1]) or "triton", "")
    )
    assert why_not_captured(tiny, experiment) is None
    assert seen == [WIDTH, 64]  # the stored patches, and the merged ones with 16 channels of positions, padded


def test_a_failed_capture_restores_the_current_stream(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    current = failing_capture(monkeypatch)

    def step(_: Batch) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RunError, match=r"cannot become a CUDA graph \(operation not permitted"):
        captured._capture(step, next(epoch(open_experiment(tiny), padded=True)))
    assert current == ["the caller's"]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),  # of an allocation
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),  # of the graph
])  # fmt: skip
def test_a_capture_that_lacks_memory_is_no_failed_capture(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """`shortage_explained` names the batch size to try; another head or residency would not help."""
    failing_capture(monkeypatch)

    def step(_: Batch) -> Tensor:
        raise error

    with pytest.raises(type(error), match="out of memory"):
        captured._capture(step, next(epoch(open_experiment(tiny), padded=True)))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that steps were captured with."""
    made: list[Batch] = []
    capture = captured._capture

    def counted(step: Callable[[Batch], Tensor], batch: Batch) -> Any:
        made.append(batch)
        return capture(step, batch)

    monkeypatch.setattr(captured, "_capture", counted)
    return made


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["psa", "egovlp", "question-only", "attention", "contrast", "mfas", "egovlpv2"])
def test_a_cuda_graph_learns_the_same_as_eager_steps(
    tiny: Config, tmp_path: Path, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, captures: list[Batch], name: str
) -> None:
    if name in ("mfas", "egovlpv2"):
        config = with_run(make(tmp_path, name), name, train_device="cuda", train_accumulate=1)
    else:
        contrast = {"train_contrast": 1.0, "data_paraphrases": True} if name == "contrast" else {"head_name": name}
        config = with_run(tiny, name, train_device="cuda", train_ema=0.9, **contrast)
    experiment = open_experiment(config)
    assert why_not_captured(config, experiment) is None
    seeds = (0, 1, 2) if name in ("psa", "egovlp", "contrast") else (0,)
    found = torch.tensor(trace(config, experiment, padded=True, seeds=seeds))
    assert len(captures) == 1
    monkeypatch.setattr(captured, "EAGER_BATCHES", 10**6)
    expected = torch.tensor(trace(config, experiment, padded=True, seeds=seeds))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_a_graph_on_the_second_gpu_learns(tiny: Config, cuda: torch.device, captures: list[Batch]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    config = with_run(tiny, "second", train_device="cuda:1")
    values = trace(config, open_experiment(config), padded=True)
    assert len(captures) == 1
    assert len({tuple(step) for step in values}) == len(values)


def test_a_cuda_graph_is_captured_on_the_device_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses stand-ins for a second GPU, which few machines have."""
    entered: list[tuple[str, object]] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entered.append(("device", chosen))
        yield

    @contextmanager
    def graph(_: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        entered.append(("stream", stream))
        yield

    for name, stand_in in {"device": device, "graph": graph, "CUDAGraph": object}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_capture_stream", lambda of: of)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(captured, "with_own_tensors", lambda batch: batch)
    second = torch.device("cuda", 1)
    batch: Any = SimpleNamespace(answers=SimpleNamespace(device=second))
    captured._capture(lambda _: entered.append(("step", None)), batch)
    assert entered == [("device", second), ("stream", second), ("step", None)]


@pytest.mark.cuda
def test_fit_captures_its_steps(tiny: Config, cuda: torch.device, captures: list[Batch]) -> None:
    whole = with_run(tiny, "whole", train_device="cuda", train_batch=BATCH)
    fit(whole, "test")
    log = (whole.run.dir / "log.jsonl").read_text()
    assert '"event": "cuda_graph", "step": 0, "captured": true' in log
    assert len(captures) == 1
    assert losses(whole.run.dir)[-1] < losses(whole.run.dir)[0]


@pytest.mark.cuda
def test_the_reference_implementation_is_not_captured(tiny: Config, cuda: torch.device, captures: list[Batch]) -> None:
    config = with_run(tiny, "reference", train_device="cuda", train_batch=BATCH, head_implementation="reference")
    fit(config, "test")
    assert captures == []


@pytest.mark.cuda
def test_a_custom_head_without_a_capture_flag_is_not_captured(tiny: Config, cuda: torch.device) -> None:
    register_head(Head("uncaptured", lambda _, sizes: torch.nn.Linear(1, sizes.answers)), replace=True)
    config = with_run(tiny, "outside", head_name="uncaptured", train_device="cuda")
    why = why_not_captured(config, open_experiment(config))
    assert why == "Head.captures is false for the head uncaptured"


def test_measure_is_not_called_on_a_head_that_reads_no_video(tiny: Config) -> None:
    class Measures(torch.nn.Linear):
        def measure(self, tokens: object) -> None:
            raise AssertionError("there are no tokens")

    register_head(Head("no-video", lambda _, sizes: Measures(1, sizes.answers), reads_video=False), replace=True)
    config = with_run(tiny, "no-video", head_name="no-video")
    build_stacked_heads([config], open_experiment(config))


def test_a_head_with_one_parameter_under_two_names_is_refused(tiny: Config) -> None:
    class Tied(torch.nn.Module):
        def __init__(self, answers: int) -> None:
            super().__init__()
            self.look = torch.nn.Linear(4, answers)
            self.see = self.look

        def forward(self, batch: Batch) -> torch.Tensor:
            return self.see(batch.tokens.cls[:, :4])

    register_head(Head("tied", lambda _, sizes: Tied(sizes.answers)), replace=True)
    config = with_run(tiny, "tied", head_name="tied")
    with pytest.raises(ConfigError, match=r"head tied has one parameter under two names, look\.weight and see\.weight"):
        build_stacked_heads([config], open_experiment(config))
