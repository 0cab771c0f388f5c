"""Edited weights, one batch of edits, and the ledger of all edits of a run."""
