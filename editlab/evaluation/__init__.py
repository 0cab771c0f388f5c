"""Scores of facts, free answers, and the metrics that a run measures."""
