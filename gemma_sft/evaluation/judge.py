"""Scores of a set of weights: loss on a split, and the judge's on answers."""

import dataclasses
from typing import Any
from typing import Callable
from typing import Sequence

from gemma_sft import chat
from gemma_sft import model as model_lib
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
