"""Parts of `gemma_sft.sweep`: what is run, how, and what comes of it."""
