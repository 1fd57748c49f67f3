"""What training minimises: a file to fork for another loss.

The loss is a sum over trained tokens, returned with their number. Sums are
added over microbatches and hosts, and `train.train_step` divides once. The
cross-entropy that never builds the logits of all tokens is in `nn/head.py`.
"""

from typing import Any

import jax

from gemma_sft import model as model_lib
from gemma_sft.nn import blocks
from gemma_sft.nn import head


def batch_nll(
    model: model_lib.Model,
    params: Any,
    microbatch: dict[str, jax.Array],
    *,
    max_trained: int,
    groups: int,
    frozen_head: bool,
    chunk_size: int = 1024,
    execution: blocks.Execution = blocks.PLAIN,
    **hidden: Any,
) -> tuple[jax.Array, jax.Array]:
  """Returns (nll_sum, n_tokens) of one microbatch: what training minimises.

  Args:
    model: From `make_model`.
    params: The base weights.
    microbatch: Arrays (B, T) of a `batches.Batches` batch.
    max_trained: See `head.masked_nll`.
    groups: See `head.masked_nll`.
    chunk_size: See `head.masked_nll`.
    frozen_head: See `head.masked_nll`.
    execution: See `model.hidden_states`.
    **hidden: Adapters and dropout of `model.hidden_states`.
  """
  x_BTD = model_lib.hidden_states(
      model, params, microbatch['tokens'], microbatch['positions'],
      microbatch['segment_ids'], execution=execution, **hidden)
  return head.masked_nll(
      x_BTD, model_lib.embedding(params), microbatch['targets'],
      microbatch['loss_mask'], max_trained=max_trained, groups=groups,
      chunk_size=chunk_size, frozen_head=frozen_head,
      softcap=model.config.final_logit_softcap, mesh=execution.mesh)
