"""Scores of a set of weights: loss on a split, and the judge's on answers."""

import dataclasses
import functools
from typing import Any
from typing import Callable
from typing import Sequence

import jax
import jax.numpy as jnp

from gemma_sft import answers as answers_lib
from gemma_sft import blocks
from gemma_sft import chat
from gemma_sft import data
from gemma_sft import generate
from gemma_sft import loss as loss_lib
from gemma_sft import metrics
from gemma_sft import model as model_lib
from gemma_sft import prompting
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
  x_BTD = _hidden(model, params, microbatch, execution=execution, **hidden)
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
    accuracy: bool = False,
) -> dict[str, float]:
  """Returns loss, perplexity and bits over one pass of a source.

  Args:
    model: From `make_model`.
    params: The base weights, or merged ones.
    source: One pass of it is scored.
    mesh: Over all devices.
    adapters: Of the base, or None.
    lora_scale: Of the adapters.
    execution: See `model.hidden_states`.
    accuracy: Next-token accuracy too, for a second pass over the head.
  """
  nll_sum = n_tokens = n_hits = 0.0
  for i in range(source.batches_per_epoch):
    batch = source[i]
    nll, n, hits = _nll_of_batch(
        model, params, adapters, put_batch(batch, mesh), lora_scale,
        int(batch['max_trained']), sharding.batch_groups(mesh), execution,
        accuracy)
    nll_sum += float(nll)
    n_tokens += float(n)
    n_hits += float(hits)
  scores = metrics.summarise(
      nll_sum, n_tokens, source.target_bytes(), source.target_characters())
  return scores | ({'accuracy': n_hits / n_tokens} if accuracy else {})


def _hidden(model, params, microbatch, **arguments):
  return model_lib.hidden_states(
      model, params, microbatch['tokens'], microbatch['positions'],
      microbatch['segment_ids'], **arguments)


@functools.partial(jax.jit, static_argnames=(
    'model', 'lora_scale', 'max_trained', 'groups', 'execution', 'accuracy'))
def _nll_of_batch(
    model, params, adapters, batch, lora_scale, max_trained, groups,
    execution, accuracy):
  """Returns (nll sum, trained tokens, hits or 0) of a batch."""

  def add(total, microbatch):
    x_BTD = _hidden(
        model, params, microbatch, adapters=adapters, lora_scale=lora_scale,
        execution=execution)
    trained = dict(max_trained=max_trained, groups=groups)
    where = (x_BTD, model_lib.embedding(params), microbatch['targets'],
             microbatch['loss_mask'])
    nll, n = loss_lib.masked_nll(
        *where, **trained, frozen_head=True,
        softcap=model.config.final_logit_softcap, mesh=execution.mesh)
    hits = loss_lib.masked_hits(*where, **trained) if accuracy else 0.0
    return (total[0] + nll, total[1] + n, total[2] + hits), None

  zero = (jnp.float32(0),) * 3
  return jax.lax.scan(add, zero, batch)[0]


def answer_records(
    model: model_lib.Model,
    params: Any,
    tokenizer: chat.Tokenizer,
    conversations: Sequence[Sequence[chat.Message] | str],
    *,
    sampling: generate.Sampling,
    batch_size: int,
    seed: int = 0,
    prompter: prompting.Prompter | None = None,
    as_text: bool = False,
    identity: str = '',
    kept: answers_lib.Answers | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
  """Answers the last question of each conversation.

  Plain text is continued from its first line.

  Args:
    model: From `make_model`.
    params: Weights with the adapters merged in.
    tokenizer: Of the model.
    conversations: As tasks make them, the reference answer last.
    sampling: How; at temperature 0 the likeliest token each time.
    batch_size: Rows at a time.
    seed: Of the sampling; an answer depends on it and its place, not on which
      others are kept.
    prompter: Puts examples before each question.
    as_text: As a transcript, without turns, see `prompting.transcript`.
    identity: Of the weights, for `kept`.
    kept: Earlier answers, which are taken, and new ones, which are kept.
    progress: See `generate.generate`.
  """
  examples = [prompter.choose(c) if prompter else [] for c in conversations]
  prompts = []
  for shown, c in zip(examples, conversations):
    if isinstance(c, str) or as_text:
      prompts.append([tokenizer.bos_id, *tokenizer.encode(
          prompting.transcript(shown, c))])
    else:
      prompts.append(chat.render_prompt(
          prompting.before(shown, c[:-1]), tokenizer))
  settings = dataclasses.astuple(sampling)
  if sampling.temperature:
    settings += (seed,)
  keys = [answers_lib.make_key(
      identity, p, *settings, *([i] if sampling.temperature else []))
          for i, p in enumerate(prompts)]
  known = {key: kept.find(key) for key in keys} if kept else {}
  # Prompts that are asked twice are answered once.
  due = {key: i for i, key in reversed(list(enumerate(keys)))
         if known.get(key) is None}
  due_keys = sorted(due, key=due.get)

  def decode(tokens):
    text = tokenizer.decode(tokens)
    return prompting.first_answer(text) if as_text else (text, False)

  def keep(number, tokens):
    key = due_keys[number]
    known[key] = decode(tokens)[0]
    if kept:
      kept.add(key, known[key])

  generate.generate(
      model, params, [prompts[due[key]] for key in due_keys], sampling,
      seed=seed, row_ids=[due[key] for key in due_keys],
      stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
      batch_size=batch_size, on_answer=keep,
      is_done=(lambda _, tokens: decode(tokens)[1]) if as_text else None,
      progress=None if progress is None else (
          lambda n: progress(len(conversations) - len(due) + n)))
  return [known[key] for key in keys]


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
    section: Any,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    training: Sequence[Any] = (),
    prompter: prompting.Prompter | None = None,
    **answering: Any,
) -> tuple[tasks.Judged, list[str], list[str]]:
  """Answers records and free prompts in one go, and judges them.

  Args:
    model: From `make_model`.
    params: Weights with the adapters merged in.
    tokenizer: Of the model.
    task: A module of `gemma_sft.tasks`.
    records: To be answered.
    section: `config.eval`: its prompts, how many tokens, at what temperature.
    seed: Of the sampling.
    prompts: Free ones instead of the section's.
    training: What the model was tuned on, for the judge.
    prompter: Puts examples before the records' questions.
    **answering: See `answer_records`.

  Returns:
    (verdict on the answers, the records' answers, the prompts' answers).
  """
  conversations = [task.to_messages(r) for r in records]
  prompts = list(section.prompts) if prompts is None else list(prompts)
  settings = dict(
      sampling=generate.Sampling(
          temperature=section.temperature,
          repetition_penalty=section.repetition_penalty,
          max_new_tokens=section.max_new_tokens),
      batch_size=section.batch_size, seed=seed, **answering)
  if prompter is None:  # In one go: their batches are fuller.
    answers = answer_records(
        model, params, tokenizer, [*map(ask, prompts), *conversations],
        **settings)
  else:
    # A free prompt is asked as it stands: it is of another kind than records.
    answers = answer_records(
        model, params, tokenizer, list(map(ask, prompts)), **settings)
    answers += answer_records(
        model, params, tokenizer, conversations, prompter=prompter, **settings)
  free, judged = answers[:len(prompts)], answers[len(prompts):]
  verdict = judge_answers(
      task, records, judged, prompts=prompts, free=free, training=training)
  return verdict, judged, free


def judge_answers(
    task: Any,
    records: Sequence[Any],
    answers: Sequence[str],
    *,
    prompts: Sequence[str],
    free: Sequence[str],
    training: Sequence[Any],
) -> tasks.Judged:
  """Returns the task's verdict, on the free prompts too if it has one.

  Args:
    task: A module of `gemma_sft.tasks`.
    records: That were answered.
    answers: To them.
    prompts: Free ones.
    free: Answers to those.
    training: What the model was tuned on.
  """
  judged = task.judge(records, answers, training)
  if prompts and hasattr(task, 'judge_prompts'):
    about = task.judge_prompts(prompts, free)
    counts = {k: v for k, v in about.metrics.items() if k != 'n'}
    judged = dataclasses.replace(
        # A rate over records is not to be replaced by that of a prompt or two.
        judged, metrics=counts | judged.metrics, free_rows=about.rows)
  return judged
