"""Our head: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Other rooms use `PSA` from `psa`, and `PatchSelection` and `implementation_in_use` from `selection`.
"""
