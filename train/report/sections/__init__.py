"""Sections of the HTML report beyond the table: its charts, the list of all questions, and what repeats the results.

`page` uses `charts`, `question_list` and `repeat`.
"""
