"""Our head: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Other rooms use `PSA` from `psa`, `PatchSelection` and `implementation_in_use` from `selection`, and `kernel_width`
from `coarse`.
"""
