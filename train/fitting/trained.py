"""A trained head: the card and the weights of its run's folder, and the config that builds it again."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from egopatch.configs.schema import Config, ConfigError, HeadConfig
from egopatch.train.heads import Sizes, build_head, reads_video
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.rundir.card import Card, chooses_options
from egopatch.train.rundir.checked_json import typed
from egopatch.train.rundir.names import CARD, WEIGHTS
from egopatch.train.rundir.run_folder import RunError, load_weights
from egopatch.train.steps.stacked_heads import StackedHeads


def trained_config(config: Config, card: Card) -> Config:
    """`config` with the head and the seed of `card`, and without averaged weights, which only training keeps."""
    return replace(config, head=head_of(card, config.head), train=replace(config.train, seed=card.seed, ema=0.0))


def head_of(card: Card, config: HeadConfig) -> HeadConfig:
    """The card's options of the head; those that only decide how fast it is computed come from `config`."""
    recorded = {name: card.config["head"].get(name, value) for name, value in asdict(config).items()}
    return replace(typed(HeadConfig, "head", recorded), implementation=config.implementation)


def require_video(folder: Path, card: Card) -> None:
    """Refuse the run in `folder` with a ConfigError if its head, of `card`, reads no video."""
    if not reads_video(card.model):
        raise ConfigError(f"run.dir is {folder}, which holds a {card.model} head; expected one that reads video")


def require_answers(folder: Path, card: Card) -> None:
    """Refuse the run in `folder` with a ConfigError if its head, of `card`, chooses among a question's own options."""
    if chooses_options(card.answers):
        raise ConfigError(
            f"run.dir is {folder}, whose head chooses among options; expected one with an answer vocabulary"
        )


def open_head(
    config: Config, folder: Path, card: Card, sizes: Sizes, device: torch.device, ranks: Distributed = ALONE
) -> tuple[nn.Module, StackedHeads]:
    """The trained head of the run in `folder`, by itself and as a stack of one that answers; both have its weights.

    Args:
        config: As from `trained_config`.
        sizes: Sizes of the features, and the number of answers.
        ranks: Processes that open the same head; the first one reads the weights.

    Raises:
        RunError: The weights are missing, damaged, of another epoch than the card's, or of another head.
    """
    head = build_head(config, sizes).to(device).eval()
    heads = StackedHeads([head], [card.seed], config.train, 0, device)
    # The stack has copies of the weights, so the head itself needs them too. The stack has checked their names.
    head.load_state_dict(_load_trained(heads, folder, card, ranks), strict=False)
    return head, heads


def _load_trained(heads: StackedHeads, folder: Path, card: Card, ranks: Distributed) -> dict[str, Tensor]:
    """Load the weights of the run in `folder` into a stack of one head; returns them."""
    path = folder / WEIGHTS

    def read() -> dict[str, Tensor]:
        if not path.exists():
            raise RunError(
                f"{path}: no such file, but {CARD} beside it describes a head that was trained: the weights were "
                "deleted, or this folder only holds the results of a head that was trained in another one; restore "
                "the file, use the folder that the head was trained in, or delete this folder and train again"
            )
        return load_weights(folder, card.best_epoch)

    weights = ranks.broadcast(read)
    try:
        heads.load_weights(0, weights)
    except ValueError as error:
        raise RunError(
            f"{path} does not fit the {card.model} head that {CARD} beside it describes ({error}); restore both files "
            "from the same training and, for a head from outside, install its package in the version that the card "
            "names; or delete the folder and train again"
        ) from None
    return weights
