"""The closed form of an edit: constraints, preservation metric, solve, and the methods that are presets of it."""
