"""The parts of `gemma_sft.curate`, which cleans raw text collections.

`characters`, `words` and `romanise` change single texts; `table` applies them
to rows and logs every change and removal. `duplicates`, `splits` and `augment`
work on whole collections.
"""
