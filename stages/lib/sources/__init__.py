"""Bytes from outside become canonical rows: files, data sets, layouts. Nothing is judged or mixed here."""
