"""Which patches matter to a trained head's answers, and whether they are where the answer is.

`explain` measures a run and writes `explanation.json` into its folder. `record` is that file, `curves` the deletion and
insertion curves, `agreement` the comparison with EgoSynth's known places. The report reads `record` and `agreement`.
"""
