"""The frame index of a video: times and key frames, frames that nothing refers to, and copies kept for other clips.

Other rooms use `index` and `cache`.
"""
