"""Video files: finding and decoding the frames of a clip, and preparing them for a network.

`container` reads one video file by its `index` of frames and skips `disposable` ones, `frames` chooses a clip's frames,
and `transforms` says how they are resized and normalised. A frame is turned upright (`orientation`) and becomes RGB, or
stays as it was decoded (`planes`). `nvdec` decodes on a GPU, `decord_frames` compares decord with PyAV. `cache` keeps
what all clips of a video share. Other rooms use `frames.read_frames`, `cache.VideoCache` and `transforms.Transform`.
"""
