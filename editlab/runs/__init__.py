"""What a run leaves on disk: curves, tables, checkpoints, deltas, reports."""
