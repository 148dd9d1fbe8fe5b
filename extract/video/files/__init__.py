"""One video file: its index of frames, and the pixels of wanted ones.

`container` opens a file, and holds what the decoder returns to the `index`, which also knows the `disposable` frames.
`orientation` turns frames upright. `nvdec` decodes on a GPU instead; `decord` is compared with PyAV.
"""
