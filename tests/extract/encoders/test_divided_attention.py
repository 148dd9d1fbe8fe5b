"""Divided attention on a GPU: its kernel in Triton's interpreter, and encoders on a GPU."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.layers import spacetime
from tests.child_pytest import run_pytest
from tests.extract.encoders.networks import dev_frames, formula_checkpoint, recorded, relative, sequence


def run(**environment: str) -> None:
    result = run_pytest("tests/extract/encoders/interpreted_divided_attention.py", **environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "9 passed" in result.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_kernel_tests_pass_in_the_triton_interpreter() -> None:
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


def test_gpu_without_triton_attends_by_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spacetime, "triton_fault", lambda _: "no compiler")
    spacetime._triton_runs.cache_clear()
    tokens = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=(2, 33, 64), dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            assert not any(spacetime._fits_kernel(tokens, 4, axis) for axis in ("time", "space"))  # type: ignore[arg-type]
    finally:
        spacetime._triton_runs.cache_clear()
    assert capsys.readouterr().out == "note: attention uses PyTorch's slower kernels: no compiler\n"


@pytest.mark.cuda
def test_kernel_tests_pass_on_a_gpu(cuda: torch.device) -> None:
    run()


@pytest.mark.cuda
def test_gpu_encoder_matches_the_recorded_tokens(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = spacetime.Attention._attend_whole
    monkeypatch.setattr(spacetime.Attention, "_attend_whole", lambda *call: calls.append(call[3]) or whole(*call))
    encoder = load_video_encoder("egovlpv2", formula_checkpoint("egovlpv2"), 16, 6, "fused", dtype=torch.bfloat16)
    encoder = encoder.to(cuda)
    tokens = encoder(dev_frames(16).to(cuda))
    assert calls == ["time", "space"] * 6
    expected = recorded("egovlpv2")
    assert relative(sequence(tokens).cpu()[:, expected["positions"]], expected["fused6"]) < 1e-2
    # Two clips at a time take other matrix products, which round bfloat16 differently.
    both = encoder(dev_frames(16).to(cuda).expand(2, -1, -1, -1, -1))
    assert relative(both.patches[1:].float(), tokens.patches.float()) < 1e-2
