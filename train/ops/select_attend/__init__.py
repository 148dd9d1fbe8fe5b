"""Score, select and aggregate frozen patch tokens in one pass.

`api.py` validates and dispatches, `reference.py` is the specification and the fast path on a CPU, `triton.py` launches
the CUDA kernels (`triton_forward.py`, `triton_backward.py`) as `launch.py` cuts them, `library.py` makes operators of
both that autograd and `torch.compile` know. The two never import each other.
"""

from egopatch.train.ops.select_attend.api import (
    Implementation,
    SelectAttendOutput,
    choose_implementation,
    select_attend,
)

__all__ = ["Implementation", "SelectAttendOutput", "choose_implementation", "select_attend"]
