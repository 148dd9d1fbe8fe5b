"""Metrics of answers, and their intervals and comparisons.

`metrics` matches and counts answers, `statistics` has the intervals, and `text_metrics` compares answers as texts.
"""
