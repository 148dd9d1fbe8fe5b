"""EgoSynth, a synthetic data set in EgoTaskQA's file layout, drawn from a seed.

`scene` draws what happens in a clip, `frames` draws its pictures, `questions` asks about it, `splits` divides the
questions, and `render` writes the whole set. `places` says where objects stand.
"""
