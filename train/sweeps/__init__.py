"""Sweeps: many settings of one head, trained on one reading of the features, and their results.

Other rooms use `run_sweep` (`sweep`), which reads the axes with `axes` and writes `sweep.json`, `sweep.csv` and
`sweep.png` with `sweep_results`.
"""
