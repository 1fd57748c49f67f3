"""What training minimises: a file to fork for another loss.

The loss is the sum of -log p(target) over the trained tokens, returned with
their number. Sums are added over microbatches and hosts, and `train.train_step`
divides once. `nn/head.py` computes the cross-entropy without the logits.
"""

from typing import Any

import jax

from gemma_sft import model as model_lib
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import head


def batch_nll(
    trainable: Any,
    base: Any,
    microbatch: dict[str, jax.Array],
    step: jax.Array,
    *,
    settings: state_lib.StepSettings,
    max_trained: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of -log p(target), number of trained tokens), both float32.

  Args:
    trainable: The adapters, or all weights in float32.
    base: The frozen weights; None when all weights are trained.
    microbatch: Arrays (B, T) of a batch from `batches.Batches`.
    step: int32 (), updates applied before this one; it seeds the dropout.
    settings: What the program is compiled for.
    max_trained: Static bound on the trained positions of a device's rows.
  """
  params, adapters = base, trainable
  if not settings.lora_enabled:
    # Float32 master weights; the forward pass runs in the device's dtype.
    params, adapters = jax.tree.map(
        lambda leaf: leaf.astype(settings.compute_dtype), trainable), None
  x_BTD = model_lib.hidden_states(
      settings.model, params, microbatch['tokens'], microbatch['positions'],
      microbatch['segment_ids'], adapters=adapters,
      lora_scale=settings.lora_scale, dropout=lora.make_dropout(
          settings.dropout, settings.seed, step, microbatch['rows']),
      execution=settings.execution)
  return head.masked_nll(
      x_BTD, model_lib.embedding(params), microbatch['targets'],
      microbatch['loss_mask'], max_trained=max_trained, groups=settings.groups,
      chunk_size=settings.loss_chunk, frozen_head=settings.lora_enabled,
      softcap=settings.model.config.final_logit_softcap,
      mesh=settings.execution.mesh)
