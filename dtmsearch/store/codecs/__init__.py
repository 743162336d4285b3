"""Rows to objects and back, one file a table."""
