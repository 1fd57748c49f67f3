"""Song lyrics in several scripts, judged by form."""
