"""Reads files into records and renders them into audited splits."""
