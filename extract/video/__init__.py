"""Video files: finding and decoding the frames of a clip, and preparing them for a network.

`files` reads one video file, `frames` chooses a clip's frames, `transforms` resizes and normalises them, and
`decode` does all of it in child processes that can be killed. A child has `limits` for each clip; what serves all clips
of a video is found `once`. Other rooms use `frames.read_frames`, `decode.DecodePool`, `decode.prepare_clip`,
`once.OncePerVideo` and `transforms.Transform`.
"""
