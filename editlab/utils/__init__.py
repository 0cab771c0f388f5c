"""Files, validation, random states, progress bars: what every other package builds on."""
