"""Scores of a set of weights, and the pages that show them."""
