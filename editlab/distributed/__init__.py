"""Work shared among several processes."""
