"""Score, select and aggregate frozen patch tokens in one pass.

`api` validates the arguments, `plan` decides which implementation runs and how, `reference` is the specification and
the fast path on a CPU, and `kernels` launches the CUDA kernels (`schedule`, `columns`, `forward`, `backward`; `parts`
has what they share).
`library` registers both implementations, which never import each other, with autograd and `torch.compile`.
"""

from egopatch.train.ops.select_attend.api import SelectAttendOutput, attend_stacked, select_attend
from egopatch.train.ops.select_attend.plan import Implementation, choose_implementation

__all__ = ["Implementation", "SelectAttendOutput", "attend_stacked", "choose_implementation", "select_attend"]
