"""Our head: partition the frame, select patches by the question, aggregate patch -> frame -> video.

`psa` is the head, with the levels `selection` (fine) and `coarse`, and the start of the spatial `prior`.
"""
