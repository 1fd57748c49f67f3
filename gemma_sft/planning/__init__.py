"""Predicts whether a run fits and how long it takes."""
