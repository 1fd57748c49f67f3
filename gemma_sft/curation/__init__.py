"""Cleaning of raw text collections: what `gemma_sft.curate` is made of.

`characters` repairs a text, `words` divides one, `romanise` writes Indic
scripts in Latin letters; all three are pure functions. `table` applies them to
rows and keeps account of every change and removal, `duplicates`, `splits` and
`augment` work on whole collections, `summary` writes the report.
"""
