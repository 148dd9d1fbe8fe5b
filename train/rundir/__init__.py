"""The folder of one run: `card` has config, card and weights, `log` the training log, `resume` the state to resume
from, `lease` lets one process at a time write, and `results` reads finished runs.

Stage two writes no other files into a run's folder, and reads a run back only through these modules.
"""
