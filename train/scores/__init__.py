"""Metrics of answers, and their intervals and comparisons.

Other rooms use `score`, `Metrics`, `Score`, `read_predictions` and the matching rules (`metrics`), `accuracy`,
`compare` and `measure_power` (`statistics`), and `text_metrics`.
"""
