"""Sharing the work of one run among several processes (ranks)."""
