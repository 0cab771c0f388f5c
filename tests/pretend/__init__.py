"""A pretend accelerator, and the tests that run editlab on it."""
