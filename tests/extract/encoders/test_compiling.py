"""`encoder.compile`: the same tokens from fused arithmetic, and a one-line error without a compiler."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from egopatch.configs.command_line import load_config
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.layers.compiling import compile_encoder
from egopatch.extract.errors import JobFailed
from egopatch.extract.fingerprints import configured
from tests.extract.encoders.networks import relative, sequence, tiny


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, and of every module that it looks into
@pytest.mark.parametrize("arch", ["egovlpv2", "mfas", "lite"])
def test_compiled_tokens_match_the_eager_network(tmp_path: Path, arch: str) -> None:
    checkpoint = None if arch == "lite" else tiny(tmp_path, arch)
    depth = 6 if arch == "lite" else 2
    video = torch.randn(2, 3, 3, 64, 64)
    plain = load_video_encoder(arch, checkpoint, 3, depth, size=64)(video)
    encoder = load_video_encoder(arch, checkpoint, 3, depth, size=64, compile=torch.device("cpu"))
    fused = encoder(video)
    # float32: sums of some hundred terms in another order, over a few layers.
    assert 0 <= relative(sequence(fused), sequence(plain)) < 1e-5
    assert relative(fused.saliency, plain.saliency) < 1e-5
    assert any(module._compiled_call_impl is not None for module in encoder.modules())


@pytest.mark.slow
def test_missing_compiler_is_reported_in_one_line(tmp_path: Path) -> None:
    tiny(tmp_path)
    code = (
        "from egopatch.extract.encoders import load_video_encoder\n"
        "from egopatch.configs.schema import ConfigError\n"
        "from torch import device\n"
        f"try: load_video_encoder('egovlpv2', {str(tmp_path / 'egovlpv2.pth')!r}, 3, 2, compile=device('cpu'))\n"
        "except ConfigError as error: print(error)\n"
    )
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("encoder.compile is true, but torch.compile cannot build code for cpu here (")
    assert line.endswith("install a C++ compiler, or set encoder.compile to false")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of modules that the compiler imports
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])  # of a batch, and of CUDA's start
def test_full_gpu_is_not_reported_as_a_missing_compiler(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 1.00 MiB free. More.\nMore.")

    encoder = load_video_encoder("egovlpv2", tiny(tmp_path), 3, 2)
    monkeypatch.setattr(torch, "zeros", full)
    said = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 1.00 MiB free, while torch.compile was tried on "
    with pytest.raises(JobFailed, match=f"^{said}cuda:0; free some of its memory, or choose another --encoder.device$"):
        compile_encoder(encoder, torch.device("cuda:0"))


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="torch only logs it since 2.14")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of modules that the compiler imports
def test_compiling_suppresses_only_the_tf32_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with tensor cores the compiler recommends TF32, which `encoder.dtype: float32` does not want."""
    from torch._inductor import compile_fx  # imports much

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UserWarning, match="TensorFloat32 tensor cores"):
        compile_fx._warn_tf32_disabled.__wrapped__()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    load_video_encoder("egovlpv2", tiny(tmp_path), 3, 2, compile=torch.device("cpu"))
    compile_fx._warn_tf32_disabled.__wrapped__()
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another warning", stacklevel=1)


def test_compile_option_is_part_of_the_fingerprint() -> None:
    path = Path("configs/demo/egovlpv2.yaml")
    plain, fused = (configured(load_config(path, ["--encoder.compile", value])) for value in ("false", "true"))
    assert fused == plain | {"compile": True}
    assert "compile" not in plain
