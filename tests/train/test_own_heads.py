"""Faulty custom heads: the message names the head, or the traceback keeps their author's line."""

import os
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import PatchTokens
from egopatch.train.__main__ import main
from egopatch.train.commands.sweep import STACKED
from egopatch.train.data.batch import Batch
from egopatch.train.fitting.fit import fit
from egopatch.train.heads import Choice, Head, Sizes, build_head, errors_kept
from egopatch.train.heads.registry import _PLUGINS as HEADS
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.tiny import with_run


class Linear(nn.Module):
    """A linear layer on the mean patch, whose logits `change` alters."""

    def __init__(self, sizes: Sizes, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(sizes.width, sizes.answers), change

    def forward(self, batch: Batch) -> Tensor:
        return self.change(self.linear(batch.tokens.patches.float().mean((1, 2)))[batch.clip_index])


Registered = Callable[..., Config]


@pytest.fixture
def own(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """Registers a head `mine`; returns a config of it."""

    def register(build: Callable[[object, Sizes], nn.Module], stacks: bool = False) -> Config:
        monkeypatch.setitem(HEADS._registered, "mine", Head("mine", build, stacks=stacks))
        return with_run(tiny, "mine", head_name="mine", train_epochs=1)

    return register


def refuses(logits: Tensor) -> Tensor:
    return logits + float("three")


def measures(_: nn.Module, tokens: PatchTokens) -> None:
    float("three")


def builds(_: object, sizes: Sizes) -> nn.Module:
    float("three")
    return Linear(sizes)


@pytest.mark.parametrize("broken", ["forward", "measure", "build"])
def test_an_error_in_a_custom_head_keeps_its_traceback(
    broken: str, own: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "measure", measures if broken == "measure" else lambda *_: None, raising=False)
    change = refuses if broken == "forward" else lambda logits: logits
    config = own(builds if broken == "build" else lambda _, sizes: Linear(sizes, change))
    config.run.dir.parent.mkdir(parents=True, exist_ok=True)
    # A bare ValueError would become one line of `train fit`, without a traceback.
    with pytest.raises(RuntimeError, match=r"head (mine|Linear) raises ValueError: could not convert") as caught:
        fit(config, "x")
    assert re.search(r"test_own_heads\.py\", line \d+, in (refuses|measures|builds)", traced(caught.value))


@pytest.mark.usefixtures("forks")
def test_the_traceback_of_a_custom_head_survives_a_forked_process(own: Registered) -> None:
    config = own(lambda _, sizes: Linear(sizes, refuses), stacks=True)
    with pytest.raises(RuntimeError, match="head Linear raises ValueError") as caught:
        run_sweep(config, seeds=[0, 1])
    assert re.search(r"test_own_heads\.py\", line \d+, in refuses", traced(caught.value))


def test_an_error_while_a_head_scores_options_names_the_head(own: Registered) -> None:
    config = own(lambda _, sizes: Linear(sizes))
    head = build_head(config, Sizes(2, (3, 4), 12, 32, 32, 4, choices=4))
    assert isinstance(head, Choice)
    with pytest.raises(RuntimeError, match=r"^the head Linear raises ValueError: three$"), errors_kept(head):
        raise ValueError("three")


def traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("method", ["forward", "measure"])
def test_a_method_that_takes_other_arguments_is_refused_in_one_line(
    method: str, own: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, method, lambda self, tokens, states: None, raising=False)
    argument = "batch" if method == "forward" else "tokens"
    expected = rf"^the {method} of the head mine takes \(tokens, states\); expected a function of \({argument}\)$"
    with pytest.raises(ConfigError, match=expected):
        fit(own(lambda _, sizes: Linear(sizes)), "x")


def test_a_module_without_a_forward_is_refused(own: Registered) -> None:
    with pytest.raises(ConfigError, match=r"^the head mine builds a ParameterList, which has no forward; expected a m"):
        fit(own(lambda _, __: nn.ParameterList()), "x")


def test_a_head_declared_blind_that_reads_tokens_is_refused(own: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own(lambda _, sizes: Linear(replace(sizes, width=4)))
    monkeypatch.setitem(HEADS._registered, "mine", replace(HEADS._registered["mine"], reads_video=False))
    with pytest.raises(ConfigError, match=r"reads_video=False, so no video was read; set reads_video=True$"):
        fit(config, "x")


def test_parameters_without_a_shape_are_refused(own: Registered) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        head = Linear(sizes)
        head.lazy = nn.LazyLinear(sizes.answers)
        return head

    with pytest.raises(ConfigError, match=r"^the head mine has parameters without a shape, such as lazy\.weight; exp"):
        fit(own(build), "x")


def test_a_config_error_from_a_custom_head_is_passed_through(own: Registered) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        raise ConfigError(f"patches is {sizes.patches}; expected a square")

    with pytest.raises(ConfigError, match=r"^patches is 12; expected a square$"):
        fit(own(build), "x")


@pytest.mark.parametrize("change", [Tensor.detach, torch.zeros_like])
def test_logits_without_a_gradient_are_refused(change: Callable[[Tensor], Tensor], own: Registered) -> None:
    config = own(lambda _, sizes: Linear(sizes, change), stacks=True)
    with pytest.raises(ConfigError, match=r"^the head Linear returns logits without a gradient; expected logits that"):
        fit(config, "x")
    with pytest.raises(ConfigError, match=r"^the head Linear returns logits without a gradient"):
        run_sweep(config, ratios=[0.25, 0.5, 0.75, 1.0])  # stacked in twos on two cores, where torch.vmap hides it


@pytest.mark.parametrize("change", [lambda logits: logits * logits.sum().item(), lambda logits: logits[logits > 0]])
def test_a_head_that_torch_cannot_stack_is_refused_in_one_line(
    change: Callable[[Tensor], Tensor], own: Registered
) -> None:
    expected = (
        r"^the head Linear is registered with stacks=True, but torch\.vmap cannot run its forward \(vmap: .*\); rem"
    )
    with pytest.raises(ConfigError, match=expected) as refused:
        run_sweep(own(lambda _, sizes: Linear(sizes, change), stacks=True), ratios=[0.25, 0.5, 0.75, 1.0])
    assert "\n" not in str(refused.value)


def test_logits_on_another_device_are_refused(own: Registered) -> None:
    config = own(lambda _, sizes: Linear(sizes, lambda logits: logits.to("meta")))
    with pytest.raises(ConfigError, match=r"^the head mine returns logits on meta; expected cpu, the device of the"):
        fit(config, "x")


def test_non_finite_logits_are_not_blamed_on_the_learning_rate(own: Registered) -> None:
    config = own(lambda _, sizes: Linear(sizes, lambda logits: logits * float("nan")))
    with pytest.raises(RunError, match=r"the loss is nan in epoch 1, step 1 .* check the logits of the head mine") as e:
        fit(config, "x")
    assert "--train.lr" not in str(e.value)


def test_a_head_without_trainable_parameters_prints_a_note(own: Registered, capsys: pytest.CaptureFixture[str]) -> None:
    config = own(lambda _, sizes: Linear(sizes, Tensor.detach).requires_grad_(False))
    fit(config, "x")
    note = "note: the head mine has no trainable parameters, so nothing is learned; if it is to learn, assign"
    assert capsys.readouterr().out.count(note) == 1
    fit(with_run(config, "majority", head_name="majority"), "x")
    fit(with_run(own(lambda _, sizes: Linear(sizes)), "learns"), "x")
    assert "no trainable parameters" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "stacks", "options", "noted"),
    [
        pytest.param("mine", True, ["--seeds", "0", "1"], False, marks=pytest.mark.slow),
        ("mine", False, ["--ratios", "0.5", "1.0"], False),
        ("mine", True, ["--ratios", "0.25", "0.5", "0.75", "1.0"], True),
    ],
)
def test_the_stacking_note_appears_only_for_ratios_trained_together(
    name: str, stacks: bool, options: list[str], noted: bool, own: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own(lambda _, sizes: Linear(sizes), stacks)
    settings = [f"--data.root={config.data.root}", f"--store.path={config.store.path}", f"--run.dir={config.run.dir}"]
    settings += ["--data.name=egotaskqa", "--head.name=mine", "--train.epochs=1", "--train.device=cpu"]
    assert main(["sweep", *settings, *options]) == 0
    assert (f"note: {STACKED}" in capsys.readouterr().out) == noted


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("stacks", "processes"), [(True, 2), (False, 1)])
def test_runs_of_a_head_that_stacks_train_in_several_processes(
    stacks: bool, processes: int, own: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/extending.md promises; runs that differ in more than the ratio are not stacked."""

    def noting(logits: Tensor) -> Tensor:
        (tmp_path / str(os.getpid())).touch()
        return logits

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run_sweep(own(lambda _, sizes: Linear(sizes, noting), stacks), seeds=[0, 1])
    assert len([path for path in tmp_path.iterdir() if path.name.isdecimal()]) == processes


def test_parameters_hidden_from_torch_are_refused(own: Registered) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        head = Linear(sizes)
        head.layers = [head.linear]  # a second name for a registered layer, which is trained
        build_head(own(lambda *_: head), Sizes(2, (3, 4), 12, 32, 32, 4))
        head.more = {"a": nn.Linear(2, 2)}  # type: ignore[assignment]
        return head

    with pytest.raises(ConfigError, match=r"^the head mine has trainable parameters in more, a dict, where torch does"):
        build_head(own(build), Sizes(2, (3, 4), 12, 32, 32, 4))


def test_logits_that_are_nan_only_in_evaluation_are_refused(own: Registered) -> None:
    class Broken(Linear):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) * (1.0 if self.training else float("nan"))

    with pytest.raises(ConfigError, match=r"^the head Broken answers with logits that are NaN, although its weights"):
        fit(own(lambda _, sizes: Broken(sizes)), "x")


def test_attributes_set_by_measure_must_be_stored_with_the_weights(
    own: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(head: nn.Module, tokens: PatchTokens) -> None:
        head.mean = tokens.cls.mean()  # type: ignore[assignment]

    monkeypatch.setattr(Linear, "measure", measure, raising=False)
    with pytest.raises(ConfigError, match=r"^Linear\.measure sets mean, which is not stored with the weights"):
        fit(own(lambda _, sizes: Linear(sizes)), "x")

    def measure_below(head: nn.Module, tokens: PatchTokens) -> None:
        head.linear.mean = tokens.cls.mean()  # type: ignore[union-attr,assignment]

    monkeypatch.setattr(Linear, "measure", measure_below)
    with pytest.raises(ConfigError, match=r"^Linear\.measure sets linear\.mean, which is not stored with the weights"):
        fit(own(lambda _, sizes: Linear(sizes)), "x")


@pytest.mark.parametrize(
    ("registered", "found"), [(None, "nothing"), (torch.zeros(1), r"a tensor \(1,\) of torch\.float32")]
)
def test_what_measure_stores_must_fit_a_head_that_has_not_measured(
    registered: Tensor | None, found: str, own: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        head = Linear(sizes)
        head.register_buffer("mean", registered)
        return head

    def measure(head: nn.Module, tokens: PatchTokens) -> None:
        head.mean = tokens.cls.double().mean()  # type: ignore[assignment]

    monkeypatch.setattr(Linear, "measure", measure, raising=False)
    with pytest.raises(
        ConfigError,
        match=rf"^Linear\.measure makes mean a tensor \(\) of torch\.float64, but its __init__ {found}, into",
    ):
        fit(own(build), "x")


def test_a_state_that_is_no_tensor_is_refused(own: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "get_extra_state", lambda head: {"rate": 1})
    with pytest.raises(ConfigError, match=r"^the head mine has _extra_state in its state_dict, which is no tensor"):
        fit(own(lambda _, sizes: Linear(sizes)), "x")


@pytest.mark.parametrize("residency", ["disk", "ram"])
@pytest.mark.parametrize("field", ["tokens.patches", "states", "clip_index", None])
def test_a_change_of_the_batch_in_place_is_refused(field: str | None, residency: str, own: Registered) -> None:
    class Changes(Linear):
        def forward(self, batch: Batch) -> Tensor:
            logits = super().forward(batch)
            if field is not None:
                attrgetter(field)(batch).mul_(1)
            return logits

    config = own(lambda _, sizes: Changes(sizes))
    config = replace(config, train=replace(config.train, residency=residency))
    if field is None:
        fit(config, "x")
        return
    with pytest.raises(ConfigError, match=rf"^the head mine changes batch\.\w*\.?{field.split('.')[-1]} in place"):
        fit(config, "x")


def test_a_head_that_cannot_be_copied_is_named(own: Registered) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        head = Linear(sizes)
        head.lock = threading.Lock()  # type: ignore[assignment]
        return head

    with pytest.raises(
        ConfigError, match=r"^the head Linear cannot be copied \(cannot pickle '_thread\.lock' object\)"
    ):
        fit(own(build), "x")


def test_layers_added_by_forward_are_refused(own: Registered) -> None:
    class Adds(Linear):
        def forward(self, batch: Batch) -> Tensor:
            if not hasattr(self, "late"):
                self.late = nn.Linear(self.linear.out_features, self.linear.out_features)
            return self.late(super().forward(batch))

    with pytest.raises(
        ConfigError, match=r"^the forward of the head mine adds late\.weight, which would neither be tr"
    ):
        fit(own(lambda _, sizes: Adds(sizes)), "x")


def test_buffers_set_by_measure_must_be_persistent(own: Registered) -> None:
    class Measures(Linear):
        def __init__(self, sizes: Sizes) -> None:
            super().__init__(sizes)
            self.register_buffer("mean", torch.zeros(sizes.width), persistent=False)

        def measure(self, tokens: PatchTokens) -> None:
            self.get_buffer("mean").copy_(tokens.patches.float().mean((0, 1, 2)))

    with pytest.raises(ConfigError, match=r"^Measures\.measure sets mean, which is not stored with the weights; expec"):
        fit(own(lambda _, sizes: Measures(sizes)), "x")


@pytest.mark.parametrize(("dtype", "sparse"), [(torch.complex64, False), (torch.float32, True)])
def test_parameters_that_cannot_be_trained_are_refused(dtype: torch.dtype, sparse: bool, own: Registered) -> None:
    def build(_: object, sizes: Sizes) -> nn.Module:
        head = Linear(sizes)
        head.table = nn.Embedding(2, sizes.width, sparse=sparse, dtype=dtype)
        return head

    found = "an Embedding with sparse=True in table" if sparse else r"the parameter table\.weight of torch\.complex64"
    with pytest.raises(ConfigError, match=rf"^the head mine has {found}; expected"):
        fit(own(build), "x")
