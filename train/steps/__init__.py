"""One training step: M stacked heads, their flat parameters and optimiser, and the CUDA graph that replays it on a GPU.

Other rooms use `StackedHeads`, `LearnedStep` and `deterministic` (`stacked_heads`), and `learning_rate` (`optim`).
"""
