"""Training and evaluating heads: opening an experiment, run groups of stacked heads, and the loop over their batches.

Other rooms use `fit`, `evaluate`, `train_together` and `evaluate_groups` (`fit`), `open_experiment` and `pick_device`
(`experiment`), `RunGroup` (`run_group`), `predict_clips` (`predict`), `trained`, which opens a trained head again, and
`shortage`, which explains why training ran out of memory or disk space.
"""
