"""The published networks' upper halves in the training loop, and fine-tuned files evaluated through the two stages."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from egopatch.configs.schema import Config, ConfigError, EncoderConfig, RunConfig, StoreConfig, TrainConfig, VideoConfig
from egopatch.extract.datasets import load_dataset
from egopatch.extract.encoders import load_checkpoint, load_text_encoder, load_video_encoder
from egopatch.extract.errors import CheckpointError
from egopatch.extract.fingerprints import configured
from egopatch.features import Fingerprint, FingerprintMismatch, StoreSpec, create_store, open_store
from egopatch.train.__main__ import main
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.heads import load_head
from egopatch.train.rundir.run_folder import RunError
from tests.extract.encoders.networks import tiny as tiny_network
from tests.train.kills import killed_after
from tests.train.tiny import losses, with_run, write_tiny, written

FRAMES, SIZE, LENGTH = 3, 64, 6


def write_features(config: Config) -> None:
    """The two stores of `config`, from made-up videos and word numbers through its own networks."""
    checkpoint, arch = load_checkpoint(config.encoder.checkpoint), config.encoder.arch
    dataset = load_dataset(config.data)
    encoder = load_video_encoder(arch, checkpoint, FRAMES, 2, variant=config.encoder.variant)
    spec = StoreSpec.for_patches(FRAMES, encoder.grid, encoder.width, "float32", 16, encoder.coarse)
    fields = {**configured(config), "checkpoint": checkpoint.sha256}
    store = create_store(config.store.path, spec, Fingerprint(fields), [clip.clip_id for clip in dataset.clips])
    generator = torch.Generator().manual_seed(1)
    for work in store.missing_shards():
        tokens = encoder(torch.randn(len(work.ids), FRAMES, 3, SIZE, SIZE, generator=generator)).tensors()
        tokens["timestamps"] = torch.zeros(len(work.ids), FRAMES)
        rows = {name: {key: tensor[i] for key, tensor in tokens.items()} for i, name in enumerate(work.ids)}
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))
    spec = StoreSpec.for_text(LENGTH, encoder.width, "float32")
    texts = create_store(config.store.path / "text", spec, Fingerprint(fields), dataset.texts)
    text_encoder = load_text_encoder(arch, checkpoint, 2)
    for work in texts.missing_shards():
        ids = torch.stack([torch.tensor([0, *(sum(map(ord, text)) + i for i in range(4)), 2]) for text in work.ids])
        mask = torch.ones(len(ids), LENGTH, dtype=torch.bool)
        with torch.no_grad():
            states = text_encoder(ids % 50, mask)
        rows = {text: {"states": states[i], "attention_mask": mask[i]} for i, text in enumerate(work.ids)}
        texts.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))


def make(root: Path, arch: str, variant: str = "paper", answers: int | None = None) -> Config:
    """A config of stage two on a tiny network of `arch`, with features; the file is saved as fine-tuned ones are."""
    base = write_tiny(root, clips=12)
    count = len(load_dataset(base.data).answers)
    network = tiny_network(root, arch, width=64, answers=answers or count)
    path = root / f"{arch}-tuned.tar"
    torch.save({"model_state_dict": {f"module.{n}": t for n, t in network.tensors.items()}, "epoch": 3}, path)
    config = dataclasses.replace(
        base,
        video=VideoConfig(frames=FRAMES, size=SIZE),
        encoder=EncoderConfig(arch=arch, checkpoint=path, depth=2, dtype="float32", variant=variant),  # type: ignore[arg-type]
        store=StoreConfig(path=root / "features", dtype="float32"),
        train=TrainConfig(epochs=2, batch=16, accumulate=2, lr=3e-4, device="cpu"),
        run=RunConfig(dir=root / "runs" / arch),
    )
    config = dataclasses.replace(config, head=dataclasses.replace(config.head, name=arch))  # type: ignore[arg-type]
    write_features(config)
    return config


@pytest.fixture(scope="module")
def mfas(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make(tmp_path_factory.mktemp("mfas"), "mfas")


def test_mfas_trains_on_cached_fine_and_coarse_tokens(mfas: Config) -> None:
    assert open_store(mfas.store.path).spec.array("coarse").shape == (FRAMES, 4, 64)
    metrics = fit(mfas, "x")
    assert metrics.all.n == 16
    trace = losses(mfas.run.dir)
    assert len(trace) == 2 * 2  # 4 batches an epoch, 2 to a step
    assert trace[-1] < trace[0]


def test_a_killed_run_of_a_published_head_resumes_bit_for_bit(mfas: Config) -> None:
    killed, undisturbed = with_run(mfas, "killed"), with_run(mfas, "undisturbed")
    fit(undisturbed, "x")
    torch.manual_seed(5)
    killed_after(3, lambda: fit(killed, "x"))  # in the second epoch
    torch.manual_seed(99)  # another process has other random numbers
    fit(killed, "x")
    assert losses(killed.run.dir) == losses(undisturbed.run.dir)


def test_mfas_trains_from_a_pretrained_egovlpv2_checkpoint(tmp_path: Path) -> None:
    config = make(tmp_path, "egovlpv2")
    tensors = load_checkpoint(config.encoder.checkpoint).tensors
    path = tmp_path / "pretrained.pth"
    torch.save({"state_dict": {name: t for name, t in tensors.items() if not name.startswith("projector")}}, path)
    config = dataclasses.replace(
        with_run(config, "mfas", head_name="mfas", train_epochs=1, store_path=tmp_path / "coarse"),
        encoder=dataclasses.replace(config.encoder, arch="mfas", checkpoint=path, variant="released"),
    )
    write_features(config)
    assert fit(config, "x").all.n == 16


@pytest.mark.parametrize(("arch", "variant"), [("egovlpv2", "paper"), ("mfas", "paper"), ("mfas", "released")])
def test_a_fine_tuned_checkpoint_is_evaluated_without_training(
    tmp_path: Path, arch: str, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_run(make(tmp_path, arch, variant), "tuned")
    head = dataclasses.replace(config.head, checkpoint=config.encoder.checkpoint)
    config = dataclasses.replace(config, head=head)
    metrics = evaluate(config, "the command")
    out = capsys.readouterr().out
    assert "missing tensors: 0" in out
    assert "unexpected tensors: 0" in out
    card = json.loads((config.run.dir / "card.json").read_text())
    assert (card["best_epoch"], card["command"]) == (0, "the command")
    # The same by hand, question by question.
    dataset = load_dataset(config.data)
    network = load_head(arch, config.encoder.checkpoint, variant=variant)  # type: ignore[arg-type]
    store, texts = open_store(config.store.path), open_store(config.store.path / "text")
    lines = [json.loads(line) for line in (config.run.dir / "predictions.jsonl").read_text().splitlines()]
    answered = {line["question_id"]: line["answer"] for line in lines}
    for question in dataset.questions["test"]:
        states = texts.read_text([question.text])
        with torch.no_grad():
            logits = network(store.read([question.clip_id]), states.states, states.attention_mask)
        assert answered[question.question_id] == dataset.answers[int(logits.argmax())]
    assert evaluate(config).all == metrics.all  # again, from its own folder


def test_a_checkpoint_that_does_not_match_store_or_answers_is_refused(tmp_path: Path, mfas: Config) -> None:
    tuned = with_run(mfas, "tuned", head_checkpoint=mfas.encoder.checkpoint)
    other = tmp_path / "an other.tar"
    content = torch.load(mfas.encoder.checkpoint, weights_only=True)
    tensors = content["model_state_dict"]
    tensors["module.alpha"] += 1
    torch.save(content, other)
    with pytest.raises(FingerprintMismatch, match=r"extract run .*\.checkpoint '/.*/an other\.tar' "):
        evaluate(with_run(tuned, "a", head_checkpoint=other))
    for name in [name for name in tensors if "projector" in name]:
        tensors[name] = tensors[name][:3, :3] if "2.weight" in name else tensors[name][:3]
    torch.save(content, other)
    with pytest.raises(CheckpointError, match="has a classifier of 3 answers"):
        evaluate(with_run(tuned, "b", head_checkpoint=other))
    del tensors["module.norm.weight"]
    torch.save(content, other)
    with pytest.raises(CheckpointError, match=r"1 tensor is missing or of the wrong shape; .* norm\.weight"):
        evaluate(with_run(tuned, "c", head_checkpoint=other))


def test_heads_without_a_published_classifier_are_refused(mfas: Config, tmp_path: Path) -> None:
    checkpoint = mfas.encoder.checkpoint
    with pytest.raises(ConfigError, match=r"head\.name is egovlp, for which no EgoTaskQA classifier was published"):
        evaluate(with_run(mfas, "x", head_name="egovlp", head_checkpoint=checkpoint))
    with pytest.raises(ConfigError, match="but a psa head takes no checkpoint"):
        fit(with_run(mfas, "y", head_name="psa", head_checkpoint=checkpoint), "x")
    other = make(tmp_path, "egovlpv2")
    with pytest.raises(
        ConfigError, match=r"head\.name is mfas but encoder\.arch is egovlpv2, which has no coarse tower"
    ):
        fit(with_run(other, "z", head_name="mfas"), "x")


def test_a_network_width_unlike_the_stores_prints_one_line(
    mfas: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_network(tmp_path, "mfas", width=128, answers=4)
    other = tmp_path / "other.tar"
    torch.save({"model_state_dict": {f"module.{n}": t for n, t in network.tensors.items()}, "epoch": 3}, other)
    assert main(["fit", "--config", written(with_run(mfas, "wide")), "--encoder.checkpoint", str(other)]) == 1
    assert "head's network: use a store that was encoded with its checkpoint\n" in capsys.readouterr().err


def test_a_file_is_not_evaluated_where_training_was_interrupted(mfas: Config) -> None:
    begun = with_run(mfas, "begun", head_checkpoint=mfas.encoder.checkpoint)
    begun.run.dir.mkdir(parents=True)
    (begun.run.dir / "last.pt").touch()
    with pytest.raises(RunError, match=r"holds a head that was trained there; use another --run.dir"):
        evaluate(begun)
    assert [path.name for path in begun.run.dir.iterdir()] == ["last.pt"]


def test_evaluate_command_accepts_a_fine_tuned_checkpoint(mfas: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path, checkpoint = written(with_run(mfas, "command")), str(mfas.encoder.checkpoint)
    assert main(["evaluate", "--config", path, "--head.checkpoint", checkpoint]) == 0
    assert "mfas on the direct test questions: open" in capsys.readouterr().out
