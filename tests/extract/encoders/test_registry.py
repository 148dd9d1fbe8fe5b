"""A network is one file and one registry entry: this file defines one and runs commands with it."""

import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.configs.schema import Config, ConfigError, TextConfig
from egopatch.extract.__main__ import main
from egopatch.extract.encoders import (
    NETWORKS,
    TextEncoder,
    find_network,
    input_transform,
    load_text_encoder,
    load_video_encoder,
    open_checkpoint,
    open_text_checkpoint,
)
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks import lite
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.texts import TextNetwork
from egopatch.extract.video.transforms import Transform
from egopatch.features import open_store
from egopatch.features.values.spec import PatchTokens


class Colours(VideoEncoder):
    """The mean colour of each 16x16 patch, scaled."""

    def __init__(self, scale: Tensor, frames: int, size: int) -> None:
        super().__init__(grid=(size // 16, size // 16), width=3, depth=1, num_frames=frames, size=size)
        self.scale = nn.Parameter(scale)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        self.check(frames)
        means = F.avg_pool2d(frames.flatten(0, 1), 16).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
        return PatchTokens(means.mean((1, 2)), means * self.scale, means.norm(dim=-1))


def build(checkpoint: Checkpoint, options: VideoOptions) -> Colours:
    return Colours(checkpoint.tensors["scale"], options.num_frames, options.size or 64)


WHOLE = Transform("whole", None, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.slow
def test_registered_network_works_with_plan_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(NETWORKS, "colours", Network("colours", build, lite.build_bert, WHOLE, None, lite.text_weights))
    torch.save({"scale": torch.full((3,), 2.0)}, tmp_path / "colours.pth")
    assert main(["synth", "--out", str(tmp_path / "data"), "--clips", "20"]) == 0
    options = [
        *("--config", "configs/demo/lite.yaml", "--encoder.arch", "colours", "--encoder.depth", "1"),
        *("--encoder.checkpoint", str(tmp_path / "colours.pth"), "--data.root", str(tmp_path / "data")),
        *("--store.path", str(tmp_path / "store"), "--video.size", "64", "--text.model", MINILM.name),
    ]
    assert main(["plan", *options, "--probe", "0"]) == 0
    assert main(["run", *options]) == 0
    assert "20/20 clips" in capsys.readouterr().out
    store = open_store(tmp_path / "store")
    assert store.fingerprint.fields["arch"] == "colours"
    assert store.fingerprint.fields["transform"] == "whole"
    tokens = store.read(store.clip_ids)
    assert tokens.patches.shape == (20, 4, 16, 3)
    assert 0 <= tokens.patches.min() < 1 < tokens.patches.max() <= 2  # colours in [0, 1], twice


def test_unknown_network_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/demo/lite.yaml", "--encoder.arch", "lyte"]) == 2
    assert (
        "encoder.arch is 'lyte'; expected one of egovlp, egovlpv2, hf, imported, lite, mfas" in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match=r"encoder\.arch is 'lyte'"):
        find_network("lyte")


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_published_networks_need_a_checkpoint(arch: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"encoder.checkpoint is not set, and no package provides the weights of {arch}; set it to the path",
    ):
        open_checkpoint(arch, None)


@pytest.mark.parametrize(
    ("attribute", "value"), [("grid", (0, 2)), ("grid", [2, 2]), ("grid", (2.0, 2.0)), ("grid", 4), ("width", "3")]
)
def test_an_encoder_with_an_attribute_of_the_wrong_type_is_refused(attribute: str, value: object) -> None:
    def build(checkpoint: Checkpoint, options: VideoOptions) -> VideoEncoder:
        encoder = Colours(torch.ones(3), 2, 32)
        setattr(encoder, attribute, value)
        return encoder

    network = Network("mine", build, lite.build_bert, WHOLE)
    expected = "a tuple of two whole numbers" if attribute == "grid" else "a whole number"
    why = f"the Colours of the encoder mine has {attribute} {value!r}; expected {expected} of at least 1"
    with pytest.raises(ConfigError, match=re.escape(why)):
        load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}))


def test_an_identity_that_no_fingerprint_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colours, "identity", {"scales": [1, 2]})
    network = Network("mine", lambda checkpoint, options: Colours(torch.ones(3), 2, 32), lite.build_bert, WHOLE)
    with pytest.raises(ConfigError, match=r"encoder mine has an identity that is not valid: fingerprint has 'scales'"):
        load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}))


def test_an_encoder_of_another_number_of_frames_is_refused() -> None:
    network = Network("mine", lambda checkpoint, options: Colours(torch.ones(3), 2, 32), lite.build_bert, WHOLE)
    why = r"^video\.frames is 4, but the Colours of the encoder mine takes 2; set video\.frames to 2, or let build_vid"
    with pytest.raises(ConfigError, match=why):
        load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}), num_frames=4)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"name": ""}, "name is ''; expected a text"),
        ({"mean": 0.5}, "mean is 0.5; expected three numbers"),
        ({"std": (1.0, 1.0)}, r"std is \(1.0, 1.0\); expected three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is \(1.0, 0.0, 1.0\); expected numbers other than 0"),
        ({"mean": (float("nan"),) * 3}, r"mean is \(nan, nan, nan\); expected three numbers"),
        ({"short_side": "224"}, "short_side is '224'; expected pixels as a whole number, or None"),
        ({"share": 0}, "share is 0; expected a number above 0 and at most 1, or None"),
        ({"share": 1.5}, "share is 1.5; expected a number above 0 and at most 1, or None"),
        ({"resampling": "cubic"}, "resampling is 'cubic'; expected one of bilinear, bicubic"),
    ],
)
def test_a_transform_that_no_frame_can_take_is_refused(changed: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}"):
        replace(WHOLE, **changed)  # type: ignore[arg-type]


def test_a_forward_that_takes_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colours, "forward", lambda self, frames, mask: None)
    network = Network("mine", lambda checkpoint, options: Colours(torch.ones(3), 2, 32), lite.build_bert, WHOLE)
    with pytest.raises(ConfigError, match=r"the forward of the encoder mine takes \(frames, mask\); .* \(frames\)"):
        load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}))


def returning(change: Callable[[PatchTokens], object]) -> VideoEncoder:
    """The encoder of an outside network, `mine`, whose `forward` returns what `change` makes of right tokens."""

    class Changed(Colours):
        def forward(self, frames: Tensor) -> PatchTokens:
            return change(super().forward(frames))  # type: ignore[return-value]

    network = Network("mine", lambda checkpoint, options: Changed(torch.ones(3), 2, 32), lite.build_bert, WHOLE)
    return load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}), num_frames=2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda t: (t.cls, t.patches),
            r"an object of type tuple; expected PatchTokens with cls \(1, 3\), patches \(1,",
        ),
        (lambda t: t.tensors(), "an object of type dict; expected PatchTokens"),
        (lambda t: None, "an object of type NoneType; expected PatchTokens"),
        (lambda t: t.patches.numpy(), "an object of type ndarray; expected PatchTokens"),
        (lambda t: replace(t, saliency=None), r"saliency \(none\); expected PatchTokens with saliency \(1, 2, 4\)"),
        (lambda t: replace(t, cls=t.cls.numpy()), "cls of type ndarray; expected"),
        (lambda t: replace(t, scale=t.saliency), r"scale \(1, 2, 4\) of .*; expected PatchTokens with scale \(none\)"),
        (
            lambda t: replace(t, patches=t.patches.long()),
            r"patches .* of torch\.int64 on cpu; expected .* floating-point",
        ),
        (
            lambda t: replace(t, cls=t.cls.to_sparse()),
            r"cls .* of torch\.float32, torch\.sparse_coo, on cpu; expected",
        ),
        (lambda t: t.to("meta"), "cls .* on meta; expected .* on cpu"),
        # The second row would be dropped silently.
        (lambda t: PatchTokens(*(torch.cat([x, x]) for x in (t.cls, t.patches, t.saliency))), r"cls \(2, 3\) of"),
        (lambda t: PatchTokens(t.cls, t.patches[:, :1], t.saliency[:, :1]), r"patches \(1, 1, 4, 3\) of"),
    ],
)
def test_invalid_output_of_a_plugin_encoder_is_refused(change: Callable[[PatchTokens], object], why: str) -> None:
    encoder = returning(change)
    with pytest.raises(ConfigError, match=f"^the encoder mine returns {why}") as caught:
        encoder(torch.rand(1, 2, 3, 32, 32))
    assert "for input (1, 2, 3, 32, 32): correct its forward" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_valid_output_of_a_plugin_encoder_is_accepted() -> None:
    encoder, frames = returning(lambda tokens: tokens), torch.rand(1, 2, 3, 32, 32)
    assert encoder(frames).patches.shape == encoder(frames=frames).patches.shape == (1, 2, 4, 3)


class Words(TextEncoder):
    def __init__(self, states: object) -> None:
        nn.Module.__init__(self)
        self.width, self.depth, self.states = 5, 1, states

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.states  # type: ignore[return-value]


def fails(*_: object) -> NoReturn:
    raise ValueError("at my line")


class Failing(Words):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        fails()


OUTSIDE = Network("mine", build, lite.build_bert, WHOLE)
NOTHING = Checkpoint(Path("mine.pth"), "bare", {})


@pytest.mark.parametrize(
    "call",
    [
        lambda: returning(fails)(torch.rand(1, 2, 3, 32, 32)),
        lambda: load_video_encoder(replace(OUTSIDE, build_video=fails), NOTHING),
        lambda: load_text_encoder(replace(OUTSIDE, build_text=fails), NOTHING),
        lambda: load_text_encoder(replace(OUTSIDE, build_text=lambda *_: Failing(0)), NOTHING)(torch.zeros(1, 2), None),
        lambda: input_transform(replace(OUTSIDE, transform=fails), Path("mine.pth"), 32),
        lambda: open_checkpoint(replace(OUTSIDE, open_checkpoint=fails), Path("mine.pth")),
        lambda: open_checkpoint(replace(OUTSIDE, locate=fails), Path("mine.pth")),
        lambda: open_text_checkpoint(replace(OUTSIDE, text_weights=fails), None, "mine"),
    ],
)
def test_error_in_a_plugin_encoder_names_it_and_keeps_the_traceback(call: Callable[[], object]) -> None:
    # `train ask` prints a ValueError as one line, without the file.
    with pytest.raises(RuntimeError, match=r"the encoder mine raises ValueError: at my line$") as caught:
        call()
    assert "in fails" in "".join(traceback.format_exception(caught.value))


def test_inconsistent_tokens_error_names_the_plugin_encoder() -> None:
    encoder = returning(lambda t: PatchTokens(t.cls, t.patches, t.saliency[:, :1]))
    with pytest.raises(RuntimeError, match=r"^the encoder mine raises ValueError: saliency has shape \(1, 1, 4\); exp"):
        encoder(torch.rand(1, 2, 3, 32, 32))


def test_plugin_encoder_without_forward_is_refused() -> None:
    class Silent(VideoEncoder):
        pass

    with pytest.raises(TypeError, match=r"Silent .*forward"):
        Silent((2, 2), 3, 1, 2, 32)  # type: ignore[abstract]


def test_plugin_encoder_without_required_attributes_is_refused() -> None:
    class Bare(Colours):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.width, self.depth, self.size = 3, 1, 32

    network = Network("mine", lambda checkpoint, options: Bare(), lite.build_bert, WHOLE)
    with pytest.raises(ConfigError, match="the Bare of the encoder mine has no grid and no num_frames; expected the"):
        load_video_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}), num_frames=2)


@pytest.mark.parametrize(
    ("states", "why"),
    [
        ((1,), r"an object of type tuple; expected a tensor with states \(2, 7, 5\)"),
        (torch.zeros(2, 5), r"states \(2, 5\) of torch\.float32 on cpu; expected a tensor with states \(2, 7, 5\)"),
        (torch.zeros(4, 7, 5), r"states \(4, 7, 5\) of"),
    ],
)
def test_invalid_output_of_a_plugin_text_encoder_is_refused(states: object, why: str) -> None:
    network = Network("mine", build, lambda checkpoint, depth: Words(states), WHOLE)
    encoder = load_text_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}))
    ids = torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(ConfigError, match=f"^the text half of the encoder mine returns {why}"):
        encoder(ids, torch.ones_like(ids))


@pytest.mark.parametrize("longest", [0, 8])
def test_only_a_text_that_is_too_long_is_blamed_on_its_length(longest: int) -> None:
    class Short(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if input_ids.shape[1] > longest:
                raise RuntimeError("shapes do not fit")
            return torch.zeros(*input_ids.shape, 5)

    network = Network("mine", build, lambda checkpoint, depth: Short(None), WHOLE)
    config = Config(text=TextConfig(model=MINILM.name))
    text = TextNetwork(config, network, torch.device("cpu"), NOTHING)
    kind, why = (ConfigError, "text.max_length is 30, and ") if longest else (RuntimeError, "shapes do not fit$")
    with pytest.raises(kind, match=f"^{why}"):
        _ = text.encoder


def test_build_text_that_returns_another_type_is_refused() -> None:
    network = Network("mine", build, lambda checkpoint, depth: nn.Identity(), WHOLE)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="'mine', but its build_text returns a Identity; expected an extract"):
        load_text_encoder(network, Checkpoint(Path("mine.pth"), "bare", {}))
