"""Answers your own question about a video: chooses a head, encodes the video, and says how far to trust the answer."""
