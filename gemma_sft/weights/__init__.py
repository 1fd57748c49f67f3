"""Weights of the library, Hugging Face and GGUF: one name table each."""
