"""Measures which patches matter to a trained head's answers, and whether they lie where the answer is.

`explain` measures a run and writes `explanation.json` into its folder. `record` is that file, `curves` computes the
deletion and insertion curves, and `agreement` compares kept patches with EgoSynth's known places.
"""
