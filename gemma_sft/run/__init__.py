"""Builds a run from its config, prepares it, saves it and resumes it."""
