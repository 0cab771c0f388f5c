"""The files of a run: curves, tables, checkpoints, deltas, reports."""
