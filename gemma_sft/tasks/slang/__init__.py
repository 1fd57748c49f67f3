"""New slang terms, judged by rules."""
