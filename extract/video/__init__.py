"""Video files: finding and decoding the frames of a clip, and preparing them for a network.

`container` reads one video file, by its `index` of frames and what it knows of `disposable` ones, `frames` chooses a
clip's frames, `transforms` resizes and normalises them. A frame is turned upright (`orientation`) and becomes RGB, or
stays as it was decoded (`planes`). `nvdec` decodes on a GPU, `decord_frames` compares decord with PyAV. What serves all
clips of a video is in its `cache`. Other rooms use `frames.read_frames`, `cache.VideoCache` and `transforms.Transform`.
"""
