"""One training step: M stacked heads, their flat parameters and optimiser, and the CUDA graph that replays it on a GPU.

`stacked_heads` runs it, with `loss` and `optim`; `captured` makes the graph.
"""
