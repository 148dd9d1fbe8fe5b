"""The results table and the HTML report about a folder of runs.

`table` writes the table and `page` the report. `analysis`, `answers`, `examples`, `integrity` and `sources` find what
they show, `plots` and `sections` draw it, and `templates` holds the HTML, style and script. `kept_picture` draws one
answer.
"""
