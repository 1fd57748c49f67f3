"""Prompts, decoding, and the cache of answers."""
