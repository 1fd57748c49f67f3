"""Scores of a set of weights: loss on a split, and the judge's on answers."""

import functools
from typing import Any
from typing import Callable
from typing import Sequence

import jax
import jax.numpy as jnp

from gemma_sft import blocks
from gemma_sft import chat
from gemma_sft import data
from gemma_sft import generate
from gemma_sft import loss as loss_lib
from gemma_sft import metrics
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import tasks


def put_batch(
    batch: data.Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts this host's rows of a batch on the mesh; returns the arrays alone."""
  place = sharding.batch_sharding(mesh)
  return {
      name: jax.make_array_from_process_local_data(place, batch[name])
      for name in ('tokens', 'targets', 'positions', 'segment_ids',
                   'loss_mask', 'rows')}


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
    microbatch: Arrays (B, T) of a `data.Batches` batch.
    max_trained: See `loss.masked_nll`.
    groups: See `loss.masked_nll`.
    chunk_size: See `loss.masked_nll`.
    frozen_head: See `loss.masked_nll`.
    execution: See `model.hidden_states`.
    **hidden: Adapters and dropout of `model.hidden_states`.
  """
  x_BTD = model_lib.hidden_states(
      model, params, microbatch['tokens'], microbatch['positions'],
      microbatch['segment_ids'], execution=execution, **hidden)
  return loss_lib.masked_nll(
      x_BTD, model_lib.embedding(params), microbatch['targets'],
      microbatch['loss_mask'], max_trained=max_trained, groups=groups,
      chunk_size=chunk_size, frozen_head=frozen_head,
      softcap=model.config.final_logit_softcap, mesh=execution.mesh)


def evaluate_loss(
    model: model_lib.Model,
    params: Any,
    source: data.Batches,
    mesh: jax.sharding.Mesh,
    *,
    adapters: Any = None,
    lora_scale: float = 1.0,
    execution: blocks.Execution = blocks.PLAIN,
) -> dict[str, float]:
  """Returns loss, perplexity and bits per byte over one pass of a source."""
  nll_sum = n_tokens = 0.0
  for i in range(source.batches_per_epoch):
    batch = source[i]
    nll, n = _nll_of_batch(
        model, params, adapters, put_batch(batch, mesh), lora_scale,
        int(batch['max_trained']), sharding.batch_groups(mesh), execution)
    nll_sum += float(nll)
    n_tokens += float(n)
  return metrics.summarise(nll_sum, n_tokens, source.target_bytes())


@functools.partial(jax.jit, static_argnames=(
    'model', 'lora_scale', 'max_trained', 'groups', 'execution'))
def _nll_of_batch(
    model, params, adapters, batch, lora_scale, max_trained, groups,
    execution):

  def add(total, microbatch):
    nll, n = batch_nll(
        model, params, microbatch, max_trained=max_trained, groups=groups,
        frozen_head=True, adapters=adapters, lora_scale=lora_scale,
        execution=execution)
    return (total[0] + nll, total[1] + n), None

  zero = (jnp.float32(0), jnp.float32(0))
  return jax.lax.scan(add, zero, batch)[0]


def answer_records(
    model: model_lib.Model,
    params: Any,
    tokenizer: chat.Tokenizer,
    conversations: Sequence[Sequence[chat.Message] | str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
  """Answers the last question of each conversation greedily.

  Plain text is continued from its first line.

  Args:
    model: From `make_model`.
    params: Weights with the adapters merged in.
    tokenizer: Of the model.
    conversations: As tasks make them, the reference answer last.
    max_new_tokens: Of an answer.
    batch_size: Rows at a time.
    progress: See `generate.generate`.
  """
  prompts = [
      [tokenizer.bos_id, *tokenizer.encode(c.partition('\n')[0] + '\n')]
      if isinstance(c, str) else chat.render_prompt(c[:-1], tokenizer)
      for c in conversations]
  answers = generate.generate(
      model, params, prompts,
      generate.Sampling(max_new_tokens=max_new_tokens),
      stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
      batch_size=batch_size, progress=progress)
  return [tokenizer.decode(a) for a in answers]


def ask(prompt: str) -> list[chat.Message]:
  """Returns a single question as a conversation for `answer_records`."""
  return [chat.Message('user', prompt), chat.Message('model', '')]


def judge_records(
    model: model_lib.Model,
    params: Any,
    tokenizer: chat.Tokenizer,
    task: Any,
    records: Sequence[Any],
    *,
    prompts: Sequence[str] = (),
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[tasks.Judged, list[str], list[str]]:
  """Answers records and free prompts in one go, and judges the former.

  Returns:
    (verdict on the records' answers, those answers, the prompts' answers).
  """
  conversations = [task.to_messages(r) for r in records]
  answers = answer_records(
      model, params, tokenizer, [*map(ask, prompts), *conversations],
      max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
  free, judged = answers[:len(prompts)], answers[len(prompts):]
  return task.judge(records, judged), judged, free
