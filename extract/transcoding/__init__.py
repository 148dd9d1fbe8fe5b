"""Small copies of videos that decode fast: short groups, short sides, one file a clip.

`segment` writes and verifies the copy of one clip, `copies` those of a data set, together with its annotations, and
`hint` says when it pays. Other rooms use `copies.transcode` and `hint.long_groups_hint`.
"""
