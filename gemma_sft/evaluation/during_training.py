"""The evaluation that training runs now and then, and at its end."""

import time
from typing import Any

from gemma_sft import progress
from gemma_sft.evaluation import judge
from gemma_sft.evaluation import validation
from gemma_sft.monitor import log
from gemma_sft.run import hosts
from gemma_sft.run import prepare


def evaluate(run: prepare.Run, state: Any, step: int) -> dict[str, float]:
  """Returns the validation scores of the weights after `step` updates.

  These are the loss on the validation split and, as judge/NAME, the judge's
  scores of the answers to config.eval.judged of its records. All hosts get the
  scores of the first. Prints them, and the answers to config.eval.prompts.

  The untouched base answers nothing here: in turns, which it does not know, it
  never ends, and takes the longest of all. `evaluate --base` asks it in a form
  that it knows. Raises `UserError` if there is no metric config.eval.metric.
  """
  config, scores = run.config, {}
  if run.validation is not None:
    params, adapters = (run.base, state.trainable) if (
        run.settings.lora_enabled) else (run.merged(state.trainable), None)
    scores = validation.evaluate_loss(
        run.model, params, run.validation, run.mesh, adapters=adapters,
        lora_scale=run.settings.lora_scale, execution=run.settings.execution)
  text = ''.join(f' | {k} {v:.4g}' for k, v in scores.items())
  records, answers = [], []
  if 'validation' in run.splits:
    n = config.eval.judged if config.eval.judged >= 0 else None
    records = run.splits['validation'].records[:n]
  untouched = step == 0 and not config.init_from
  if untouched and records:
    # Empty answers show whether there is such a metric, and the judge runs.
    judged = judge.judge_answers(
        run.task, records, [''] * len(records), prompts=(), free=(),
        training=run.splits['train'].records)
    log.check_metric(config.eval, scores | _prefixed(judged))
    text += f' | {judged.note}' if judged.note else ''
  elif not untouched and (records or config.eval.prompts):
    start = time.monotonic()
    judged, _, answers = judge.judge_records(
        run.model, run.merged(state.trainable), run.tokenizer, run.task,
        records, section=config.eval, seed=config.seed,
        prompts=config.eval.prompts, training=run.splits['train'].records,
        progress=judge.show_answered(len(records) + len(config.eval.prompts)))
    if records:
      scores |= _prefixed(judged)
      text += ''.join(f' | {k} {v:.4g}' for k, v in judged.metrics.items())
      text += f' | {judged.note}' if judged.note else ''
    text += f' ({progress.duration(time.monotonic() - start)})'
  if text:
    hosts.say(f'evaluation after {step} updates{text}')
  for prompt, answer in zip(config.eval.prompts, answers):
    hosts.say(log.quote(prompt, answer))
  return hosts.from_first(scores)


def _prefixed(judged):
  return {f'judge/{k}': v for k, v in judged.metrics.items()}
