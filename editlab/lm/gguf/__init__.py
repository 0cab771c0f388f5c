"""Writing an edited model as a GGUF file, the format of llama.cpp, with the package ``gguf``, and reading it back."""
