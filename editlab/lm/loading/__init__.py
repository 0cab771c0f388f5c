"""Loading a causal language model: from a hub, a folder, a GGUF file, or the built-in one."""
