"""The results table and the HTML report about a folder of runs.

Other rooms use `write_table` (`table`), `write_report` (`page`), and of `sources` and `plots` what reads and draws a
sweep. `templates` holds the page's HTML, style and script.
"""
