"""The one closed form of an edit, and the methods that are presets of it."""
