"""The parts of `gemma_sft.curate`, which cleans raw text collections.

`characters` repairs texts, `words` divides them, `romanise` writes Indic
scripts in Latin letters: these are pure functions. `table` applies them to rows
and logs every change and removal. `duplicates`, `splits` and `augment` work on
whole collections, `report` writes the report, `settings` checks the config.
"""
