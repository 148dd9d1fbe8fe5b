"""Random numbers as a function of seed, place, position and row, equal on CPU and GPU.

`api` chooses by the device, `reference` is the specification and what a CPU runs, `kernels` draws on a GPU, and
`library` registers the kernels with torch.
"""

from egopatch.train.ops.philox.api import dropout, uniform
from egopatch.train.ops.philox.reference import Draw

__all__ = ["Draw", "dropout", "uniform"]
