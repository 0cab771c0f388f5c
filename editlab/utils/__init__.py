"""Helpers that every other package uses: files, validation, random states, progress bars."""
