"""The frame index of a video: times and key frames, frames that nothing refers to, and copies kept for other clips.

`index` makes it, with `disposable` and `declared_size`; `cache` keeps it.
"""
