"""Metrics of answers, and intervals and tests on them.

Other rooms use `score`, `Metrics`, `Score`, `read_predictions` and the matching rules (`metrics`), and `bootstrap` and
`compare` (`statistics`).
"""
