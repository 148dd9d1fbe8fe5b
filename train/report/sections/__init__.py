"""Sections of the HTML report beyond the table: charts, the list of all questions, and how to repeat the results.

`page` uses `charts`, `question_list` and `repeat`.
"""
