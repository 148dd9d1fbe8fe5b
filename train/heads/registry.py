"""Builds the head that a config names.

`HEADS` lists the heads of this package. Heads from outside come from the entry points `egopatch.heads` of installed
packages, each a `Head`, and from `register_head`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from egopatch.configs.plugins import Plugins, call_fault, of_this_package, traceback_kept
from egopatch.configs.schema import Config, ConfigError, HeadConfig
from egopatch.extract.encoders import open_checkpoint
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.attention import Attention
from egopatch.train.heads.common.blind import Majority, QuestionOnly
from egopatch.train.heads.common.choice import Choice, LongestOption, unwrapped
from egopatch.train.heads.common.pooled import Pooled
from egopatch.train.heads.common.question import Sizes
from egopatch.train.heads.fused.fused import FusedSystem, load_head
from egopatch.train.heads.psa.psa import PSA
from egopatch.train.rundir.checked_json import typed


@dataclass(frozen=True)
class Head:
    """A head from outside this package.

    Attributes:
        name: Value of `head.name` that selects it.
        build: Maps its options and the sizes of features and answers to the untrained module. `forward(batch)` of the
            module takes a `train.data.batch.Batch` and returns logits `[B, A]`, whose shape is checked. If it has a
            method `measure(tokens)`, that is called once before training, with `PatchTokens` of up to 64 training
            clips, to set its buffers.
        options: Dataclass of its options, which `head.options` fills and whose types are checked; None if it has none.
        reads_video: Whether it reads patch tokens; a head that does not needs no store of clips.
        stacks: Whether `torch.vmap` can run it; then random numbers must come from `train.heads.common.noise`. A sweep
            on a CPU trains runs of such heads in several processes at once, and those that differ only in `head.ratio`
            as one.
        captures: Whether a training step can be a CUDA graph: `forward` reads no value back from the device, and its
            shapes follow from those of the batch.
    """

    name: str
    build: Callable[[Any, Sizes], nn.Module]
    options: type | None = None
    reads_video: bool = True
    stacks: bool = False
    captures: bool = False


@dataclass(frozen=True)
class _BuiltIn:
    """A head of this package.

    Attributes:
        build: Maps the config and the sizes of features and answers to the untrained module.
        reads_video: As in `Head`.
        stacks: As in `Head`; false for heads that read every patch, since one fills a machine, and for those that
            learn nothing.
        chooses: Whether it scores the options of multiple-choice questions by itself; others are wrapped in a `Choice`.
        published: Whether it starts from `head.checkpoint`.
    """

    build: Callable[[Config, Sizes], nn.Module]
    reads_video: bool = True
    stacks: bool = True
    chooses: bool = False
    published: bool = False


def _build_longest_option(config: Config, sizes: Sizes) -> nn.Module:
    if not sizes.choices:
        raise ConfigError("head.name is longest-option, but the questions have no options; use majority")
    return LongestOption()


def _build_fused(config: Config, sizes: Sizes) -> nn.Module:
    name: Literal["egovlpv2", "mfas"] = "egovlpv2" if config.head.name == "egovlpv2" else "mfas"
    if sizes.patches < sizes.grid[0] * sizes.grid[1]:
        raise ConfigError(
            f"head.name is {name}, which reads whole frames, but the store has {sizes.patches} of "
            f"{sizes.grid[0] * sizes.grid[1]} patches a frame; use the store that this one was derived from"
        )
    if name == "mfas" and config.encoder.arch != "mfas":
        raise ConfigError(
            f"head.name is mfas but encoder.arch is {config.encoder.arch}, which has no coarse tower; "
            "set encoder.arch to mfas"
        )
    checkpoint = open_checkpoint(name, config.head.checkpoint or config.encoder.checkpoint)
    return FusedSystem(load_head(name, checkpoint, sizes.answers, config.encoder.variant))


_POOLED = _BuiltIn(lambda config, sizes: Pooled(config.head, sizes))
_FUSED = _BuiltIn(_build_fused, stacks=False, published=True)
HEADS: Mapping[str, _BuiltIn] = {
    "majority": _BuiltIn(
        lambda config, sizes: Majority(sizes.choices or sizes.answers), reads_video=False, stacks=False, chooses=True
    ),
    "longest-option": _BuiltIn(_build_longest_option, reads_video=False, stacks=False, chooses=True),
    "question-only": _BuiltIn(lambda config, sizes: QuestionOnly(config.head, sizes), reads_video=False),
    "pooled": _POOLED,
    "attention": _BuiltIn(lambda config, sizes: Attention(config.head, sizes), stacks=False),
    "egovlp": _POOLED,  # as in the published system
    "egovlpv2": _FUSED,
    "mfas": _FUSED,
    "psa": _BuiltIn(lambda config, sizes: PSA(config.head, sizes)),
}


def _fault(name: str, head: object) -> str | None:
    if not isinstance(head, Head):
        return f"is of type {type(head).__name__}; expected a train.heads.Head"
    if head.options is not None and not (isinstance(head.options, type) and is_dataclass(head.options)):
        return f"has options {head.options!r}; expected a dataclass, not an instance of one, or None"
    if head.name != name:
        return f"is a Head called {head.name!r}; expected the same name"
    for flag in ("reads_video", "stacks", "captures"):
        if not isinstance(value := getattr(head, flag), bool):
            return f"is a Head whose {flag} is {value!r:.60}; expected True or False"
    fault = call_fault(head.build, "options", "sizes")
    return None if fault is None else f"is a Head whose build {fault}"


_PLUGINS: Plugins[Head] = Plugins("head.name", "egopatch.heads", HEADS.keys(), _fault)


def register_head(head: Head, replace: bool = False) -> None:
    """Let `head.name` name `head` in this process.

    Args:
        replace: Whether to replace what an earlier call registered under the name.

    Raises:
        ConfigError: The name is taken, or `head` is not a `Head`.
    """
    if not isinstance(head, Head):
        raise ConfigError(f"register_head was given {head!r}, which {_fault('', head)}")
    _PLUGINS.register(head.name, head, replace)


def check_head(config: HeadConfig) -> None:
    """Check the head's name and the options of a registered head, before any data is read.

    Raises:
        ConfigError: The name is unknown, its registration is broken, or an option is unknown or of the wrong type.
    """
    head = _PLUGINS.find(config.name)
    if head is not None:
        _options_of(head, config)
    elif config.options is not None:
        raise ConfigError(
            f"head.options is {config.options!r}, but {config.name} is a built-in head, whose options are keys of the "
            "section head itself; set them there, and remove head.options"
        )


def reads_video(name: str) -> bool:
    """Whether the head called `name` reads patch tokens."""
    return _described(name).reads_video


def reads_ratio(config: HeadConfig) -> bool:
    """Whether the head depends on `head.ratio`; of all heads only psa selects patches by it."""
    return config.name == "psa" and "all" not in config.scores


def can_stack(name: str) -> bool:
    """Whether several heads called `name` can train as stacked heads."""
    return _described(name).stacks


def can_capture(name: str) -> bool:
    """Whether a training step of heads called `name` can be a CUDA graph."""
    head = _PLUGINS.find(name)
    return head is None or head.captures


def package_versions(name: str) -> dict[str, str]:
    """Name and version of the package that registers the head; empty if none does."""
    package = _PLUGINS.package_of(name)
    return {} if package is None else dict([package.rsplit(" ", 1)])


def _described(name: str) -> Head | _BuiltIn:
    return _PLUGINS.find(name) or HEADS[name]


def _options_of(head: Head, config: HeadConfig) -> Any:
    """The head's options as its dataclass."""
    given: Mapping[str, Any] = config.options or {}
    if head.options is None:
        if given:
            raise ConfigError(f"head.options is {given!r}, but the head {head.name} has no options; remove them")
        return None
    try:
        return typed(head.options, "head.options", given)
    except ValueError as error:
        known = ", ".join(field.name for field in fields(head.options))
        raise ConfigError(f"head.options of the head {head.name}: {error}; its options: {known}") from error


def build_head(config: Config, sizes: Sizes) -> nn.Module:
    """The untrained head named `head.name`; for multiple-choice questions (`sizes.choices`), it scores the options.

    `egovlpv2` and `mfas` start from `head.checkpoint`, or from `encoder.checkpoint` if that is null.

    Raises:
        ConfigError: The store does not fit the head, or `head.checkpoint` is set for a head without one.
        CheckpointError: The checkpoint of a fused head is missing or another network's.
    """
    head = _described(config.head.name)
    if config.head.checkpoint is not None and not (isinstance(head, _BuiltIn) and head.published):
        raise ConfigError(
            f"head.checkpoint is {config.head.checkpoint}, but a {config.head.name} head takes no checkpoint; set it "
            "to null, or head.name to egovlpv2 or mfas"
        )
    if not sizes.choices or (isinstance(head, _BuiltIn) and head.chooses):
        return _build(head, config, sizes)
    return Choice(_build(head, config, replace(sizes, answers=config.head.width)), config.head, sizes)


def errors_kept(head: nn.Module) -> AbstractContextManager[None]:
    """`traceback_kept` for code of a head from outside this package; errors of our own heads stay one line each."""
    read = unwrapped(head)
    return nullcontext() if of_this_package(read) else traceback_kept(f"the head {type(read).__name__}")


def _build(head: Head | _BuiltIn, config: Config, sizes: Sizes) -> nn.Module:
    if isinstance(head, _BuiltIn):
        return head.build(config, sizes)
    options = _options_of(head, config.head)
    with traceback_kept(f"the head {head.name}"):
        module = head.build(options, sizes)
    return _checked(head, module, sizes.answers)


def _checked(head: Head, module: object, answers: int) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the head {head.name} builds a {type(module).__name__}; expected a torch.nn.Module")
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise ConfigError(
            f"the head {head.name} builds a {type(module).__name__}, which has no forward; expected a method "
            "forward(batch) that returns logits"
        )
    for method, argument in (("forward", "batch"), ("measure", "tokens")):
        if hasattr(module, method) and (fault := call_fault(getattr(module, method), argument)):
            raise ConfigError(f"the {method} of the head {head.name} {fault}")
    if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
        raise ConfigError(
            f"the head {head.name} has parameters without a shape, such as {lazy[0]}; expected none: compute the shape "
            "from the argument sizes of its build"
        )
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() and parameter.requires_grad:
            raise ConfigError(
                f"the head {head.name} has the parameter {name} of {parameter.dtype}; expected a real floating-point "
                "type: store the real and the imaginary part of complex numbers as two parameters"
            )
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ConfigError(
                f"the head {head.name} has an {type(part).__name__} with sparse=True in {name}; expected sparse=False, "
                "because the optimiser takes no sparse gradients"
            )
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shared = first.setdefault(id(parameter), name)
        if shared != name:
            raise ConfigError(
                f"the head {head.name} has one parameter under two names, {shared} and {name}; expected each once: "
                "call the first module from both places instead of storing it twice"
            )
    for owner in module.modules():
        for name, value in vars(owner).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            inner = [each for each in held if isinstance(each, nn.Module | nn.Parameter)]
            found = [p for each in inner for p in (each.parameters() if isinstance(each, nn.Module) else [each])]
            if any(parameter.requires_grad and id(parameter) not in first for parameter in found):
                raise ConfigError(
                    f"the head {head.name} has trainable parameters in {name}, a {type(value).__name__}, where torch "
                    "does not find them, so they would not be trained; use nn.ModuleList, nn.ModuleDict or "
                    "nn.ParameterList"
                )
    if plain := next((name for name, value in module.state_dict().items() if not isinstance(value, Tensor)), None):
        raise ConfigError(
            f"the head {head.name} has {plain} in its state_dict, which is no tensor; expected only tensors, as which "
            "weights are stored: use register_buffer instead of get_extra_state"
        )
    module.register_forward_pre_hook(partial(_note_versions, versions := dict[int, int]()))
    module.register_forward_hook(partial(_require_unchanged, head.name, versions))
    module.register_forward_hook(partial(_require_logits, head.name, answers))
    module.register_forward_hook(partial(_require_no_more, head.name, frozenset(first.values())))
    return module


def _require_no_more(name: str, known: frozenset[str], module: nn.Module, inputs: tuple[Batch], _: object) -> None:
    """Refuse parameters that `forward` has created: the optimiser and the stored weights have only those of `build`."""
    if late := next((parameter for parameter, _ in module.named_parameters() if parameter not in known), None):
        raise ConfigError(
            f"the forward of the head {name} adds {late}, which would neither be trained nor stored; create all layers "
            "in its __init__, with shapes from the argument sizes of its build"
        )


def _note_versions(versions: dict[int, int], module: nn.Module, inputs: tuple[Batch]) -> None:
    versions.clear()
    versions.update((id(tensor), tensor._version) for tensor in _tensors_of(inputs[0]).values())


def _require_unchanged(name: str, versions: dict[int, int], module: nn.Module, inputs: tuple[Batch], _: object) -> None:
    """Refuse changes in place: the tensors may be the features in memory, or those of the next head of a sweep."""
    for field, tensor in _tensors_of(inputs[0]).items():
        if tensor._version != versions.get(id(tensor), 0):  # the batch may have copied it during the forward
            raise ConfigError(
                f"the head {name} changes batch.{field} in place, which other batches and heads read too; expected a "
                "new tensor: correct its forward (x = x * 2, not x.mul_(2) or x *= 2)"
            )


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that count their changes, by the names of their fields."""
    found = dict[str, object](vars(batch))
    for field in ("stored", "tokens"):
        if isinstance(tokens := found.get(field), PatchTokens):
            found |= {f"{field}.{name}": tensor for name, tensor in tokens.tensors().items()}
    return {field: value for field, value in found.items() if isinstance(value, Tensor) and not value.is_inference()}


def _require_logits(name: str, answers: int, module: nn.Module, inputs: tuple[Batch], logits: object) -> None:
    """Refuse anything but logits [B, A]: surplus columns would go unnoticed until one of them wins."""
    index = inputs[0].text_index
    expected = (len(index), answers)
    if not isinstance(logits, Tensor) or logits.shape != expected or not logits.is_floating_point():
        found = f"a {type(logits).__name__}"
        if isinstance(logits, Tensor):
            found = f"a tensor {tuple(logits.shape)} of {logits.dtype}"
        raise ConfigError(
            f"the head {name} returns {found}; expected logits {expected} of a floating-point type, a row for "
            "each question and a column for each of sizes.answers: correct its forward"
        )
    if logits.device != index.device:
        raise ConfigError(
            f"the head {name} returns logits on {logits.device}; expected {index.device}, the device of the batch: "
            "correct its forward"
        )
