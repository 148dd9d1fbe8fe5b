"""Sweeps: many settings of one head, trained on one reading of the features, and their results.

`axes` says what varies, `sweep` trains the combinations, and `sweep_results` writes `sweep.json`, `sweep.csv` and
`sweep.png`.
"""
