"""The results table and the HTML report about a folder of runs.

Other rooms use `write_table` (`table`), `write_report` (`page`), and from `sources` and `plots` the functions for
sweeps. `templates` holds the page's HTML, style and script.
"""
