"""Adapters of the projections: what they add to a layer, and their merging."""
