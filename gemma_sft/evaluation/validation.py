"""Loss, perplexity and bits per byte over one pass of a split."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import batches
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft.monitor import metrics
from gemma_sft.nn import blocks
from gemma_sft.nn import head


def evaluate_loss(
    model: model_lib.Model,
    params: Any,
    source: batches.Batches,
    mesh: jax.sharding.Mesh,
    *,
    adapters: Any = None,
    lora_scale: float = 1.0,
    execution: blocks.Execution = blocks.PLAIN,
    accuracy: bool = False,
) -> dict[str, float]:
  """Returns the scores of `metrics.summarise` over one pass of a source.

  Next-token accuracy takes a second pass over the head. With merged weights
  there are no adapters.
  """
  sums = np.zeros(3)
  for i in range(source.batches_per_epoch):
    batch = source[i]
    sums += [float(x) for x in _nll_of_batch(
        model, params, adapters, sharding.put_batch(batch, mesh), lora_scale,
        int(batch['max_trained']), sharding.batch_groups(mesh), execution,
        accuracy)]
  nll_sum, n_tokens, n_hits = sums.tolist()
  scores = metrics.summarise(
      nll_sum, n_tokens, source.target_bytes(), source.target_characters())
  return scores | ({'accuracy': n_hits / n_tokens} if accuracy else {})


@functools.partial(jax.jit, static_argnames=(
    'model', 'lora_scale', 'max_trained', 'groups', 'execution', 'accuracy'))
def _nll_of_batch(
    model, params, adapters, batch, lora_scale, max_trained, groups,
    execution, accuracy):
  """Returns (NLL sum, number of trained tokens, hits or 0) of a batch."""

  def add(total, microbatch):
    x_BTD = model_lib.hidden_states(
        model, params, microbatch['tokens'], microbatch['positions'],
        microbatch['segment_ids'], adapters=adapters, lora_scale=lora_scale,
        execution=execution)
    trained = dict(max_trained=max_trained, groups=groups)
    where = (x_BTD, model_lib.embedding(params), microbatch['targets'],
             microbatch['loss_mask'])
    nll, n = head.masked_nll(
        *where, **trained, frozen_head=True,
        softcap=model.config.final_logit_softcap, mesh=execution.mesh)
    hits = head.masked_hits(*where, **trained) if accuracy else 0.0
    return (total[0] + nll, total[1] + n, total[2] + hits), None

  zero = (jnp.float32(0),) * 3
  return jax.lax.scan(add, zero, batch)[0]
