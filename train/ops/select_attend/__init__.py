"""Score, select and aggregate frozen patch tokens in one pass.

`api.py` validates and dispatches, `reference.py` is the specification and the fast path on a CPU, `triton.py` the CUDA
kernels, `library.py` makes operators of both that autograd and `torch.compile` know. The two never import each other.
"""

from train.ops.select_attend.api import Implementation, SelectAttendOutput, select_attend

__all__ = ["Implementation", "SelectAttendOutput", "select_attend"]
