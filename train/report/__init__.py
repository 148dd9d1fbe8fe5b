"""The results table and the HTML report about a folder of runs.

Other rooms use `write_table` (`table`), `write_report` (`page`), `draw_prediction` (`kept_picture`), and from
`sources`, `answers` and `plots` the functions for sweeps. `templates` holds the page's HTML, style and script.
"""
