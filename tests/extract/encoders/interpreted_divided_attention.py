"""The kernel of divided attention against the plain form, in float32.

`test_divided_attention.py` runs these on a GPU, and in Triton's interpreter, in a process of their own since the
interpreter is chosen when the kernel is imported.
"""

import pytest
import torch

from egopatch.extract.encoders.layers.spacetime import Attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize(("frames", "patches", "heads"), [(4, 9, 2), (16, 20, 1), (3, 70, 2), (1, 1, 1)])
def test_kernel_matches_the_plain_implementation(frames: int, patches: int, heads: int, axis: str) -> None:
    torch.manual_seed(0)
    attention = Attention(64 * heads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    # Both compute from the same float16 numbers.
    attention = attention.half().float()
    x, residual = torch.randn(2, 2, 1 + frames * patches, 64 * heads).half()
    with torch.no_grad():
        exact, exact_logits = attention(x.float(), frames, axis, tap=True, residual=residual.float())
        attention = attention.half().to(DEVICE)
        ours, logits = attention._attend_whole(x.to(DEVICE), frames, axis, True, residual.to(DEVICE))
    assert logits is not None
    torch.testing.assert_close(ours.float().cpu(), exact, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(logits.cpu(), exact_logits, rtol=1e-3, atol=1e-3)


def test_changed_patch_affects_only_its_attention_group() -> None:
    """In space a patch is seen by its own frame alone, in time by its own position alone."""
    frames, patches = 3, 5
    torch.manual_seed(0)
    attention = Attention(64).half().to(DEVICE)
    x = torch.randn(1, 1 + frames * patches, 64).half().to(DEVICE)
    changed = x.clone()
    changed[0, 1 + 1 * patches + 2] += 1  # frame 1, position 2
    seen = {"space": {(1, n) for n in range(patches)}, "time": {(t, 2) for t in range(frames)}}
    with torch.no_grad():
        for axis, expected in seen.items():
            before, after = (attention._attend_whole(y, frames, axis, False, None)[0] for y in (x, changed))
            moved = (before != after).any(dim=2)[0, 1:].view(frames, patches)
            assert {(t, n) for t, n in moved.nonzero().tolist()} == expected
