"""Small copies of videos that decode fast: short groups, short sides, one file per clip.

`segment` writes and verifies the copy of one clip, `copies` copies a data set with its annotations, and `hint` reports
when copies pay off.
"""
