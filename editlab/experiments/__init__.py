"""Experiments: many runs, their tables and figures."""
