"""A simulated accelerator, and the tests that run editlab on it."""
