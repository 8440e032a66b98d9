"""The report: rows of any number of measured models in, one HTML page, a Markdown twin and ``results.json`` out.

Read `write.py` first, then `records.py` (the rows), `compare.py` (the columns) and `summary.py` (the main table).
"""
