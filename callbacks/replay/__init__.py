"""Memory replay: earlier edits take part in the solve of each batch."""
