"""Blop, a small language for the web, judged by compiling and running it."""
