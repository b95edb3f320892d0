"""Measurements: one timer, the cases, the writer of tables."""
