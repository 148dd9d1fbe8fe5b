"""Sections of the HTML report: `charts`, all questions (`question_list`), and how to `repeat` the results."""
