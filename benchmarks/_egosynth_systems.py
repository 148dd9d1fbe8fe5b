"""The comparisons of `egosynth.py`: systems, those that a search tunes, and parts of psa that are switched off."""

from dataclasses import dataclass
from typing import Any

from benchmarks._egosynth_docs import REFERENCE

# The heads that the search tunes, all with the same grid.
SEARCHED = ("question-only", "egovlp", "egovlpv2", "pooled (lite)", "attention (lite)", "mfas", REFERENCE)


@dataclass(frozen=True)
class System:
    """A row of the table: the encoder whose config and store it uses, and further options."""

    encoder: str
    options: tuple[str, ...]


# The setting with the highest mean val over both splits in the search, for most heads; the configs have psa's.
BASELINE = ("--train.lr", "1e-3", "--train.weight_decay", "0.05")
# Without video, val peaks before the last of these epochs.
BLIND = ("--train.epochs", "12", "--train.ema", "0")
# EgoVLPv2's head shares its config with psa; its val hardly rises at the end of these epochs.
EGOVLPV2 = ("--train.epochs", "24", "--train.ema", "0", "--head.dropout", "0.1")
SYSTEMS = {
    "majority": System("lite", ("--head.name", "majority")),
    "question-only": System("lite", ("--head.name", "question-only", *BLIND, *BASELINE)),
    "egovlp": System("egovlp", ()),
    "egovlpv2": System("egovlpv2", ("--head.name", "egovlpv2", *BASELINE, "--train.lr", "5e-4", *EGOVLPV2)),
    "pooled (lite)": System("lite", ("--head.name", "pooled", *BASELINE, "--train.lr", "2e-3")),
    "attention (lite)": System("lite", ("--head.name", "attention", *BASELINE)),
    "mfas": System("mfas", ()),
    "psa": System("egovlpv2", ()),
    REFERENCE: System("lite", ()),
}
# Description of each encoder, recorded with every system.
ENCODERS = {
    "egovlp": "random-weight stand-in of EgoVLP",
    "egovlpv2": "random-weight stand-in of EgoVLPv2",
    "mfas": "random-weight stand-in of MFAS, 8 x 8 patches a frame instead of 7 x 7",
    "lite": "EfficientNet-Lite0 (ImageNet) and MiniLM, real weights",
}

# The training of the search, the ratio curves and the copies of the store. They are many runs, and were measured before
# the config took twice the epochs, twice the rate and averaged weights.
SHORTER = ("--train.epochs", "24", "--train.lr", "1e-3", "--train.ema", "0")
# Scores that rank the patches in the ratio curves.
SOURCES = (("question", "saliency", "prior"), ("question",), ("saliency",), ("prior",), ("random",))


@dataclass(frozen=True)
class Copy:
    """A smaller copy of the store: the command of `features` that makes it (none: the lite store itself), the options
    of the head that reads it, and the copy that it is compared with.
    """

    how: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    against: str | None = None


# A derived store has too few patches for the head to merge.
FINE = ("--head.coarse", "false")
COPIES = {
    "float16": Copy(),
    "int8": Copy(("convert", "--dtype", "int8"), against="float16"),
    "float16, fine level alone": Copy(options=FINE),
    "a quarter of the patches, fine level alone": Copy(
        ("derive", "--keep", "0.25"), FINE, against="float16, fine level alone"
    ),
}
WHOLE = "the whole"
CONTRAST = "paraphrase contrast"
# Only the paraphrase contrast reads paraphrases.
PARAPHRASES = ("--data.paraphrases", "true")
# Each part of psa switched off or changed, one at a time; the last ones are parts that are left off.
ABLATION: dict[str, dict[str, Any]] = {
    "selection: random": {"head.scores": ["random"]},
    "selection: saliency alone": {"head.scores": ["saliency"]},
    "selection: prior alone": {"head.scores": ["prior"]},
    "selection: question alone": {"head.scores": ["question"]},
    "selection: none, all patches": {"head.scores": ["all"]},
    "without coarse partition": {"head.coarse": False},
    "question read once": {"head.readers": 1},
    "question not at patches": {"head.levels": ["frame", "video"]},
    "without times": {"head.time": False},
    "question not at frames": {"head.levels": ["patch", "video"]},
    "without prior": {"head.scores": ["question", "saliency"]},
    "without saliency": {"head.scores": ["question", "prior"]},
    "question not at the video": {"head.levels": ["patch", "frame"]},
    "without the question's score": {"head.scores": ["saliency", "prior"]},
    "prior: flat at the start": {"head.prior": "flat"},
    "prior: centre at the start": {"head.prior": "centre"},
    "prior not learned": {"head.prior_learned": False},
    "saliency's weight starts at 1": {"head.saliency_weight": 1.0},
    "coarse gate not learned": {"head.merge": False},
    "two frames": {"head.frames": 2},
    "label smoothing 0": {"train.label_smoothing": 0.0},
    "weights not averaged": {"train.ema": 0.0},
    "growing region": {"head.growth": True},
    CONTRAST: {"train.contrast": 0.3},
}
