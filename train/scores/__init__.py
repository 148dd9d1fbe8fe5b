"""Metrics of answers, and their intervals and comparisons.

Other rooms use `score`, `Metrics`, `Score`, `read_predictions` and the matching rules (`metrics`), and `accuracy`,
`compare` and `measure_power` (`statistics`).
"""
