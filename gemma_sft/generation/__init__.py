"""Prompts, decoding, and answers kept from earlier runs."""
