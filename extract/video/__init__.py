"""Video files: finding and decoding the frames of a clip, and preparing them for a network.

`container` reads one video file, by its `index` of frames and what it knows of `disposable` ones, `frames` chooses a
clip's frames, `transforms` resizes and normalises them. `nvdec` decodes on a GPU, `decord_frames` compares decord with
PyAV. A decoding process has `limits` for each clip; what serves all clips of a video is found `once`. Other rooms use
`frames.read_frames`, `once.OncePerVideo` and `transforms.Transform`.
"""
