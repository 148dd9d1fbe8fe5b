"""`encoder.arch: hf`: each family on a small random configuration, against the model called directly."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from egopatch.extract.encoders import CheckpointError, load_text_encoder, load_video_encoder
from egopatch.extract.encoders.layers.graphs import ReplayedEncoder, capture_cuda

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PRISM = {k: v for k, v in VISION.items() if k not in ("num_hidden_layers", "patch_size")}
CONFIGS: dict[str, dict[str, Any]] = {
    "dinov2": {**VISION, "mlp_ratio": 2},
    "dinov2_with_registers": {**VISION, "mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {**VISION, "num_register_tokens": 4},
    "clip": {"vision_config": VISION, "text_config": TEXT},
    "siglip": {"vision_config": VISION, "text_config": TEXT},
    "ijepa": VISION,
    "vit": VISION,
    "deit": VISION,
    "videomae": {**VISION, "num_frames": 4, "tubelet_size": 2},
    "vivit": {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    "timesformer": {**VISION, "num_frames": 4},
    "vjepa2": {
        **VISION,
        "crop_size": 32,
        "mlp_ratio": 2,
        "pred_hidden_size": 24,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 2,
    },
    "videoprism_vision_model": {
        **PRISM,
        "num_spatial_layers": 2,
        "num_temporal_layers": 1,
        "tubelet_size": [1, 8, 8],
        "num_frames": 4,
    },
}
VIDEO = ("videomae", "vivit", "timesformer", "vjepa2", "videoprism_vision_model")
TUBELETS = {"videomae": 2, "vivit": 2, "vjepa2": 2}
PREFIX = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "clip": 1, "vit": 1, "deit": 2, "vivit": 1}
PREFIX |= {"timesformer": 1}
PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
FRAMES, DEEPEST, PATCHES = 4, 3, 16


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the random model of a family once; returns its folder."""
    written: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in written:
            written[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            model = AutoModel.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
            with torch.no_grad():
                for parameter in model.parameters():  # so that no block is close to the identity
                    parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(written[kind])
            (written[kind] / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return written[kind]

    return write


def vision_part(folder: Path, **options: Any) -> PreTrainedModel:
    model = AutoModel.from_pretrained(folder, **options).eval()
    return getattr(model, "vision_model", model)


@torch.inference_mode()
def called_directly(folder: Path, kind: str, frames: Tensor, depth: int, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """CLS or None [B, T or 1, D], patches [B, T', N, D], and the attention, by the model's own documentation."""
    model = vision_part(folder, **options)
    more = {"skip_predictor": True} if kind == "vjepa2" else {}
    asked = {"output_hidden_states": True, "output_attentions": bool(options), **more}
    output = model(frames if kind in VIDEO else frames.flatten(0, 1), **asked)
    states = output.last_hidden_state if depth == DEEPEST else output.hidden_states[depth]
    prefix, batch, steps = PREFIX.get(kind, 0), len(frames), FRAMES // TUBELETS.get(kind, 1)
    body = states[:, prefix:]
    if kind == "timesformer":
        patches = body.reshape(batch, PATCHES, steps, -1).transpose(1, 2)
    else:
        patches = body.reshape(batch, steps, PATCHES, -1)
    first = states[:, : min(prefix, 1)]
    return first.reshape(batch, len(states) // batch, min(prefix, 1), 32), patches, output.attentions


def clips(seed: int = 1) -> Tensor:
    return torch.randn(2, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("depth", [2, DEEPEST])
def test_tokens_match_the_transformers_model(folder_of: Callable[[str], Path], kind: str, depth: int) -> None:
    folder = folder_of(kind)
    if kind == "videoprism_vision_model" and depth != DEEPEST:
        with pytest.raises(CheckpointError, match=r"runs whole, .* set encoder.depth to 3"):
            load_video_encoder("hf", folder, FRAMES, depth, size=32)
        return
    encoder = load_video_encoder("hf", folder, FRAMES, depth, size=32)
    outputs: list[Any] = []
    encoder.model.register_forward_hook(lambda _, __, output: outputs.append(output))
    tokens = encoder(clips())
    # The states after every block take memory, and at full depth none of them is read.
    assert all((output.hidden_states is None) == (depth == DEEPEST) for output in outputs)
    first, patches, _ = called_directly(folder, kind, clips(), depth)
    assert (encoder.steps, encoder.grid, encoder.width) == (FRAMES // TUBELETS.get(kind, 1), (4, 4), 32)
    torch.testing.assert_close(tokens.patches, patches, rtol=0, atol=1e-5)
    cls = first.mean(dim=(1, 2)) if first.shape[2] else patches.mean(dim=(1, 2))
    torch.testing.assert_close(tokens.cls, cls, rtol=0, atol=1e-5)
    reference = first if first.shape[2] else cls[:, None, None]
    saliency = torch.cosine_similarity(patches, reference, dim=-1) if first.shape[2] else patches.norm(dim=-1)
    torch.testing.assert_close(tokens.saliency, saliency, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_tensors_move_with_the_encoder(folder_of: Callable[[str], Path], kind: str) -> None:
    """A tensor left on the CPU would be copied to the GPU in every batch and would prevent CUDA graph capture."""
    encoder = load_video_encoder("hf", folder_of(kind), FRAMES, DEEPEST, size=32).to("meta")
    kept = [value for module in encoder.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert {tensor.device.type for tensor in (*encoder.parameters(), *encoder.buffers(), *kept)} == {"meta"}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", CONFIGS)
def test_encoder_is_captured_as_a_cuda_graph(folder_of: Callable[[str], Path], kind: str, cuda: torch.device) -> None:
    encoder, frames = load_video_encoder("hf", folder_of(kind), FRAMES, DEEPEST, size=32).to(cuda), clips().to(cuda)
    lines = list[str]()
    replayed = ReplayedEncoder(lambda: encoder(frames), partial(capture_cuda, device=cuda), lines.append)  # type: ignore[arg-type]
    for number in range(3):
        frames.copy_(clips(number))
        torch.testing.assert_close(replayed().patches, encoder(clips(number).to(cuda)).patches)
    assert lines == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_changed_patch_changes_its_own_token_most(folder_of: Callable[[str], Path], kind: str) -> None:
    depth = DEEPEST if kind == "videoprism_vision_model" else 1
    encoder = load_video_encoder("hf", folder_of(kind), FRAMES, depth, size=32)
    frames = clips()
    changed = frames.clone()
    changed[0, 3, :, 8:16, 24:32] += 2.0 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    moved = (encoder(changed).patches - encoder(frames).patches).norm(dim=-1)
    assert int(moved[0].argmax()) == (3 // TUBELETS.get(kind, 1)) * PATCHES + 1 * 4 + 3
    assert not moved[1].any()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if PREFIX.get(kind)])
def test_attention_saliency_is_the_mean_log_attention_of_cls(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    encoder = load_video_encoder("hf", folder, FRAMES, 2, size=32, saliency="attention")
    given = called_directly(folder, kind, clips(), 2, attn_implementation="eager")[2][1]
    to_patches = given[:, :, 0, PREFIX[kind] :].log().mean(dim=1)
    assert encoder(clips()).saliency.shape == (2, encoder.steps, PATCHES)
    expected = to_patches.reshape(2, encoder.steps, PATCHES)
    torch.testing.assert_close(encoder(clips()).saliency, expected, rtol=0, atol=1e-5)


def test_norm_saliency_is_the_token_norm(folder_of: Callable[[str], Path]) -> None:
    tokens = load_video_encoder("hf", folder_of("clip"), FRAMES, 2, size=32, saliency="norm")(clips())
    torch.testing.assert_close(tokens.saliency, tokens.patches.norm(dim=-1))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "clip", "siglip", "timesformer"])
def test_encoder_accepts_another_frame_size(folder_of: Callable[[str], Path], kind: str) -> None:
    encoder = load_video_encoder("hf", folder_of(kind), FRAMES, 2, size=48)
    assert encoder.grid == (6, 6)
    assert encoder(torch.zeros(1, FRAMES, 3, 48, 48)).patches.shape == (1, FRAMES, 36, 32)


def test_timesformer_accepts_more_frames_and_tells_how_many_it_was_trained_on(
    folder_of: Callable[[str], Path],
) -> None:
    """Its positions in time are stretched, which `plan`, `run` and `doctor` say."""
    encoder = load_video_encoder("hf", folder_of("timesformer"), 2 * FRAMES, 2, size=32)
    assert encoder(torch.zeros(1, 2 * FRAMES, 3, 32, 32)).patches.shape == (1, 2 * FRAMES, PATCHES, 32)
    assert encoder.trained_frames == FRAMES


def test_bfloat16_tokens_stay_close_to_float32(folder_of: Callable[[str], Path]) -> None:
    half = load_video_encoder("hf", folder_of("dinov2"), FRAMES, 2, size=32, dtype=torch.bfloat16)(clips())
    whole = load_video_encoder("hf", folder_of("dinov2"), FRAMES, 2, size=32)(clips())
    assert half.patches.dtype == torch.bfloat16
    assert (half.patches.float() - whole.patches).norm() < 0.03 * whole.patches.norm()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dinov2", {"size": 36}, r"video.size is 36; .*, a dinov2 model, takes multiples of its 8-pixel patch"),
        ("dinov2", {"depth": 4}, r"depth is 4; expected 1 to 3, the number of its blocks"),
        ("vjepa2", {"size": 48}, r"video.size is 48; .*, a vjepa2 model, takes only 32: set video.size to 32"),
        ("vjepa2", {"num_frames": 5}, r"video.frames is 5; .* makes one token from 2 frames: use a multiple of 2"),
        ("videomae", {"num_frames": 8}, r"video.frames is 8; .* was trained on 4 frames and takes no other"),
        ("siglip", {"saliency": "attention"}, r"has no CLS token whose attention could be taken; expected cls or norm"),
        ("videomae", {"size": 48}, r"this videomae model does not take 4 frames of 48 pixels"),
    ],
)
def test_unsupported_model_options_are_refused_in_one_line(
    folder_of: Callable[[str], Path], kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_video_encoder("hf", folder_of(kind), **{"num_frames": FRAMES, "depth": 2, "size": 32, **options})
    assert "\n" not in str(error.value)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _torn(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _of_another(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "ijepa"}))


def _wider(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "hidden_size": 64}))


def _part_missing(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["model.safetensors"]}))


def _of_its_own_code(folder: Path) -> None:
    settings = {"model_type": "their_own", "auto_map": {"AutoModel": "theirs.Model", "AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "theirs.py").write_text("raise SystemExit('this code was run')")


def _weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_weights, r"holds no weights; expected model.safetensors"),
        (_pickled, r"has its weights in pytorch_model.bin, a pickle, which could run code; convert the model"),
        (_torn, r"transformers cannot load this dinov2 model \("),
        (_of_another, r"the weights lack .* and \d+ more; they belong to a different model than config.json describes"),
        (_wider, r"the weights have other shapes: .* and \d+ more; they belong to a different model"),
        (_part_missing, r"lacks model-00002-of-00002.safetensors, which its index names; copy the model again"),
        (_index_of_nothing, r"index.json has no weight_map from tensors to files; copy the model again"),
        (_of_its_own_code, r"transformers cannot load this their_own model"),
        (_weights_elsewhere, r"model.safetensors is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
        (_no_config, r"config.json does not exist; expected the folder of a transformers model"),
    ],
)
def test_invalid_model_folder_is_refused_in_one_line(
    folder_of: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(folder_of("dinov2"), tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_video_encoder("hf", folder, FRAMES, 2, size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model", "pe_video", "pe_video_encoder"])
def test_models_without_a_fixed_grid_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").touch()
    fault = "patches follow the shape of each image and form no fixed grid"
    if kind.startswith("pe_"):
        fault = "tokens form no grid of patches"
    with pytest.raises(CheckpointError, match=f"is a {kind} model: its {fault}; use another model"):
        load_video_encoder("hf", tmp_path, FRAMES, 2, size=32)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "bert",
            TEXT,
            r"is a bert model: its tokens form no grid of patches \(.*'patch_size'\); use a vision or video",
        ),
        ("resnet", {"depths": [1] * 4, "hidden_sizes": [8] * 4}, r"is a resnet model: its tokens form no grid"),
        ("convnext", {"depths": [1] * 4, "hidden_sizes": [8] * 4}, r"is a convnext model: its tokens form no grid"),
        (
            "swin",
            {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2},
            r"this swin model gives states of shape \(1, 16, 16\); expected \(1, 65, 16\)",
        ),
    ],
)
def test_model_without_patch_tokens_is_refused_in_one_line(
    tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    AutoModel.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_video_encoder("hf", tmp_path, FRAMES, 2, size=32)
    assert "\n" not in str(error.value)


def test_sharded_weights_load(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("dinov2")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = load_video_encoder("hf", tmp_path, FRAMES, 2, size=32)(clips())
    assert torch.equal(tokens.patches, load_video_encoder("hf", folder, FRAMES, 2, size=32)(clips()).patches)


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert", "distilbert", "t5"])
def test_text_states_match_the_transformers_model(folder_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = folder_of(kind) if kind in CONFIGS else tmp_path
    if kind not in CONFIGS:
        t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 99}
        distilled = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}
        config = AutoConfig.for_model(kind, **{"t5": t5, "distilbert": distilled}.get(kind, TEXT))
        AutoModel.from_config(config).save_pretrained(folder)
    ids = torch.randint(3, 90, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "text_model", model)
    model = model.get_encoder() if kind == "t5" else model
    with torch.inference_mode():
        output = model(ids, attention_mask=None if kind == "siglip" else mask, output_hidden_states=True)
    for depth, expected in ((2, output.hidden_states[2]), (3, output.last_hidden_state)):
        encoder = load_text_encoder("hf", folder, depth)
        kept: list[bool] = []
        encoder.model.register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output.hidden_states is not None)
        )
        states = encoder(ids, mask)
        assert kept == [depth < 3]
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"depth is 4; expected 1 to 3, the number of its text layers"):
        load_text_encoder("hf", folder, 4)


def test_image_and_audio_models_are_refused_as_text_models(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a dinov2 model; text.model expects a text model"):
        load_text_encoder("hf", folder_of("dinov2"), 2)
    sizes = {
        f"{half}_{name}": 1 for half in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    AutoModel.from_config(AutoConfig.for_model("whisper", d_model=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a whisper model; text.model expects a text model"):
        load_text_encoder("hf", tmp_path, 1)
