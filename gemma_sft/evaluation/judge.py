"""Answers of a model to records, and the task's verdict on them."""

import dataclasses
from typing import Any
from typing import Callable
from typing import Sequence

import jax

from gemma_sft import chat
from gemma_sft import model as model_lib
from gemma_sft import progress as progress_lib
from gemma_sft import tasks
from gemma_sft.generation import answers as answers_lib
from gemma_sft.generation import generate
from gemma_sft.generation import prompting


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
    cached: answers_lib.Answers | None = None,
    progress: Callable[[float], None] = lambda n: None,
) -> list[str]:
  """Answers the last question of each conversation.

  When sampling, an answer depends on the seed and on its index here, not on
  which other answers are in the cache.

  Args:
    params: Weights with the adapters merged in.
    conversations: From the task, each ending with the reference answer. Plain
      text is continued from its first line.
    as_text: Prompts without turns, see `prompting.transcript`.
    identity: Content hash of the weights, for the keys of `cached`.
    progress: See `Answers.complete`.
  """
  prompts = [
      prompting.render(
          tokenizer, prompter.choose(c) if prompter else [],
          c if isinstance(c, str) else c[:-1], as_text=as_text)
      for c in conversations]
  settings = dataclasses.astuple(sampling)
  keys = [answers_lib.make_key(
      identity, prompt, *settings,
      *([seed, i] if sampling.temperature else []))
          for i, prompt in enumerate(prompts)]

  def decode(tokens):
    text = tokenizer.decode(tokens)
    return prompting.first_answer(text) if as_text else (text, False)

  def answer(indices, keep, report):
    generate.generate(
        model, params, [prompts[i] for i in indices], sampling, seed=seed,
        row_ids=indices, stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size, batch_size=batch_size,
        on_answer=lambda row, tokens: keep(indices[row], decode(tokens)[0]),
        is_done=lambda _, tokens: as_text and decode(tokens)[1],
        progress=report)

  return (cached or answers_lib.Answers()).complete(keys, answer, progress)


def show_answered(total: int) -> Callable[[float], None]:
  """Returns a `progress` that the first host prints, and no other."""
  if jax.process_index():
    return lambda done: None
  return progress_lib.Progress(total, 'answered')


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
    prompts: Sequence[str],
    training: Sequence[Any],
    **answering: Any,
) -> tuple[tasks.Judged, list[str], list[str]]:
  """Answers records and free prompts, and judges the answers.

  With a `prompter` there should be no free prompts: they would get examples of
  another kind. The section is `config.eval`; `answering` are more arguments of
  `answer_records`. Returns (verdict on the answers, answers to the records,
  answers to the prompts).
  """
  answers = answer_records(
      # In one call, which fills the batches better.
      model, params, tokenizer,
      [*map(ask, prompts), *map(task.to_messages, records)],
      sampling=generate.Sampling(
          temperature=section.temperature,
          repetition_penalty=section.repetition_penalty,
          max_new_tokens=section.max_new_tokens),
      batch_size=section.batch_size, **answering)
  free, judged = answers[:len(prompts)], answers[len(prompts):]
  verdict = judge_answers(
      task, records, judged, prompts=prompts, free=free, training=training)
  return verdict, judged, free


def judge_answers(
    task: Any, records: Sequence[Any], answers: Sequence[str], *,
    prompts: Sequence[str], free: Sequence[str], training: Sequence[Any],
) -> tasks.Judged:
  """Returns the task's verdict on the answers to records and free prompts.

  The `training` records are those that the model was tuned on.
  """
  judged = task.judge(records, answers, training)
  if not prompts or not hasattr(task, 'judge_prompts'):
    return judged
  about = task.judge_prompts(prompts, free)
  counts = {k: v for k, v in about.metrics.items() if k != 'n'}
  # On a clash of names the rate over the records wins: they are more.
  return dataclasses.replace(
      judged, metrics=counts | judged.metrics, free_rows=about.rows)
