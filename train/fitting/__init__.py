"""Training and evaluating heads: opening an experiment, run groups of stacked heads, and the loop over their batches.

`fit` is the loop. It opens an `experiment`, trains each `run_group` with heads from `build_heads`, writes each `run`
and scores its `answers`. `trained` opens a trained head again, `predict` asks it any question, `published` evaluates a
published network, and `shortage` explains why memory or disk space ran out.
"""
