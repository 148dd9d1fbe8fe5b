"""A question of one's own about a video: which head answers it, the video's features, and what the answer is worth."""
