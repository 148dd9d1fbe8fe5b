"""Each kernel once on small shapes, forward and backward, for `compute-sanitizer` to watch.

    compute-sanitizer --tool racecheck python benchmarks/gpu_small.py
    compute-sanitizer --tool memcheck python benchmarks/gpu_small.py

On the CPU in Triton's interpreter with TRITON_INTERPRET=1, to see that it runs.
"""

import argparse
import sys
from pathlib import Path

import torch
from triton import knobs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from egopatch.extract.encoders.layers.divided_attention import divided_attention
from egopatch.train.ops.select_attend import select_attend
from tests.train.ops.cases import make_case
from tests.train.ops.interpreter import skip_idle_work

# N, D, H, dtype: one block and several, wide and narrow programs, tokens that are multiplied as they are or decoded.
SHAPES = (
    (33, 64, 2, torch.float16), (196, 128, 4, torch.float16), (300, 64, 2, torch.float16),
    (49, 64, 4, torch.float32), (49, 64, 4, torch.int8),
)  # fmt: skip


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if knobs.runtime.interpret:
        skip_idle_work()
    for patches, width, heads, dtype in SHAPES:
        case = make_case(2, 5, 2, patches, width, heads, dtype, device=device)
        leaves = case.leaves()
        out = select_attend(case.tokens, case.clip_index, *leaves, max(1, patches // 4), implementation="triton")
        (out.pooled.sum() + out.lse.sum()).backward()
        print(f"select_attend N={patches} D={width} H={heads} {dtype}: done", flush=True)
    qkv = torch.randn(1, 1 + 4 * 9, 3 * 128, device=device).half()
    for axis in ("time", "space"):
        divided_attention(qkv, 4, axis)
    print("divided attention: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
