"""Builds the untrained heads of a run group, measures their inputs, and chooses how their steps are computed."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import PatchTokens
from egopatch.features.common.machine import triton_fault
from egopatch.train.data.features import Features
from egopatch.train.data.question_table import NO_OPTION, QuestionTable, plan_batches
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.heads import HEADS, PSA, Choice, Majority, Sizes, build_head, can_capture, errors_kept, unwrapped
from egopatch.train.heads.common.question import QuestionReader
from egopatch.train.heads.psa.coarse import kernel_width
from egopatch.train.heads.psa.selection import implementation_in_use
from egopatch.train.steps.stacked_heads import StackedHeads

# Number of clips that the input whitening is measured on.
MEASURED_CLIPS = 64


def choose_selection(configs: Sequence[Config], experiment: Experiment) -> tuple[str, str] | None:
    """Implementation of `select_attend` for these runs, and why; None for heads that do not select."""
    head, sizes = configs[0].head, experiment.sizes
    if head.name != "psa":
        return None
    frame = torch.empty(1, 1, sizes.patches, sizes.width, device=experiment.device)
    return implementation_in_use(frame, head.implementation, len(configs))


def why_not_captured(config: Config, experiment: Experiment) -> str | None:
    """The reason why the steps of a run do not become a CUDA graph; None if they do.

    The reference versions of our operations read values back from the device, which a graph cannot do.
    """
    features, ranks = experiment.features, experiment.ranks
    if experiment.device.type != "cuda":
        return f"the device is {experiment.device.type}"
    if ranks.size > 1:
        return f"{ranks.size} ranks train together"
    if config.train.accumulate > 1:
        return f"train.accumulate is {config.train.accumulate}"
    if features.store is not None and features.residency != "gpu":
        return f"features are not on the GPU (train.residency: {features.residency})"
    if not can_capture(config.head.name):
        return f"Head.captures is false for the head {config.head.name}"
    if fault := triton_fault(experiment.device):
        return f"dropout runs its reference ({fault})"
    for width in selected_widths(config, experiment.sizes):
        frame = torch.empty(1, 1, experiment.sizes.patches, width, device=experiment.device)
        implementation, why = implementation_in_use(frame, config.head.implementation, 1)
        if implementation != "triton":
            return f"select_attend runs its reference ({why})"
    return None


def selected_widths(config: Config, sizes: Sizes) -> list[int]:
    """Channels of the patches that a head selects from: the stored patches, and those of psa's coarse level."""
    if config.head.name != "psa":
        return []
    return [sizes.width, kernel_width(sizes.width)] if config.head.coarse else [sizes.width]


def build_stacked_heads(configs: Sequence[Config], experiment: Experiment) -> StackedHeads:
    """Build untrained heads with their optimiser; prints a note if heads from outside have nothing to learn.

    Raises:
        ConfigError: `train.label_smoothing` would reward options that a question does not have.
    """
    options, smoothing = experiment.train_table.options, configs[0].train.label_smoothing
    if smoothing and options is not None and bool((options == NO_OPTION).any()):
        raise ConfigError(
            f"train.label_smoothing is {smoothing}, but some questions have fewer than {options.shape[1]} options; "
            "use 0"
        )
    heads = []
    for config in configs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            heads.append(build_head(config, experiment.sizes).to(experiment.device))
    ranks, train = experiment.ranks, configs[0].train
    if ranks.first and len(experiment.train_table):
        measure_inputs(heads, experiment.features, experiment.train_table)
    head = unwrapped(heads[0])
    # A head that reads only some frames copies them, and cannot use what was derived from all frames.
    if isinstance(head, PSA) and head.coarse is not None and len(head.frame_indices) == experiment.sizes.frames:
        with torch.no_grad():
            experiment.features.derive(head.coarse.derive)
    ranks.broadcast_tensors([tensor for head in heads for tensor in head.state_dict().values()])
    learns = any(parameter.requires_grad for parameter in heads[0].parameters())
    plans = (plan_batches(experiment.train_table, train.batch, train.seed, epoch) for epoch in range(train.epochs))
    steps = sum(math.ceil(len(plan) / train.accumulate) for plan in plans) if learns else 0
    stacked = StackedHeads(heads, [config.train.seed for config in configs], train, steps, experiment.device, ranks)
    if not learns and configs[0].head.name not in HEADS:
        ranks.print_once(
            f"note: the head {configs[0].head.name} has no trainable parameters, so nothing is learned; if it is to "
            "learn, assign its layers to attributes in its __init__, with requires_grad"
        )
    return stacked


def measure_inputs(heads: Sequence[nn.Module], features: Features, table: QuestionTable) -> None:
    """Measure answer counts and the input whitening on the training questions, for heads of one shape."""
    tokens: PatchTokens | None = None
    if features.store is not None and hasattr(unwrapped(heads[0]), "measure"):
        stride = max(1, len(table.clips) // MEASURED_CLIPS)
        tokens = features.tokens(table.clips[::stride][:MEASURED_CLIPS])
    first, *others = heads
    _measure_head(first, features, table, tokens)
    for other in others:
        head = unwrapped(other)
        if isinstance(head, PSA) and head.measures_kept_patches:  # the kept patches depend on its ratio
            _measure_head(other, features, table, tokens)
            continue
        for buffer, measured in zip(other.buffers(), first.buffers(), strict=True):
            buffer.copy_(measured)


def _measure_head(whole: nn.Module, features: Features, table: QuestionTable, tokens: PatchTokens | None) -> None:
    head = unwrapped(whole)
    if isinstance(head, Majority):
        head.count(table)
    for module in head.modules():
        if isinstance(module, QuestionReader):
            module.whiten.measure(features.text_tokens(table.text))
    if isinstance(whole, Choice):
        assert table.options is not None
        whole.read.whiten.measure(features.text_tokens(table.options))
    if tokens is not None:
        assert callable(head.measure)
        attributes, stored, unstored = _attributes(head), _stored(head), _unstored(head)
        with errors_kept(head):
            head.measure(tokens)
        lost = [name for name, value in _attributes(head).items() if value is not attributes.get(name)]
        lost += [name for name, version in _unstored(head).items() if version != unstored.get(name)]
        if lost:
            raise ConfigError(
                f"{type(head).__name__}.measure sets {lost[0]}, which is not stored with the weights; expected a "
                "persistent buffer: call register_buffer in its __init__, and copy_ into it"
            )
        if changed := next((name for name, kind in _stored(head).items() if kind != stored.get(name)), None):
            raise ConfigError(
                f"{type(head).__name__}.measure makes {changed} {_stored(head)[changed]}, but its __init__ "
                f"{stored.get(changed, 'nothing')}, into which the stored weights could not be loaded; expected equal "
                "shapes and types: call register_buffer with them in its __init__, and copy_ into it"
            )


def _attributes(head: nn.Module) -> dict[str, object]:
    """The attributes of all modules of a head, by their dotted names; those that torch stores are not among them."""
    return {
        f"{path}.{name}".removeprefix("."): value
        for path, module in head.named_modules()
        for name, value in vars(module).items()
        if name != "training"  # set before every step
    }


def _unstored(head: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and version of each buffer that is not persistent, by its name."""
    stored = head.state_dict().keys()
    return {name: (id(tensor), tensor._version) for name, tensor in head.named_buffers() if name not in stored}


def _stored(head: nn.Module) -> dict[str, str]:
    """Shape and type of each tensor that is stored with the weights, by its name."""
    return {name: f"a tensor {tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in head.state_dict().items()}
