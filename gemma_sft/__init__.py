"""gemma_sft: fine-tune Gemma on a domain of your own, in pure JAX."""
