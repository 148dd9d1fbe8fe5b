"""Stage two: heads trained on cached features, their evaluation, tables and reports."""
