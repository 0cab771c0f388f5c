"""Scores of facts, and the metrics that a run measures."""
