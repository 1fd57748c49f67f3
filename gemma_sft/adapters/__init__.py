"""Adapters of the attention projections: one file an adapter kind."""
