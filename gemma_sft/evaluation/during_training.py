"""The evaluation that training runs now and then, and at its end."""

import time
from typing import Any

from gemma_sft.evaluation import judge
from gemma_sft.evaluation import validation
from gemma_sft.monitor import log
from gemma_sft.monitor import metrics
from gemma_sft.run import hosts
from gemma_sft.run import prepare


def evaluate(run: prepare.Run, state: Any, step: int) -> dict[str, float]:
  """Returns the validation scores of the weights after `step` updates.

  These are the loss on the validation split and, as judge/NAME, the judge's
  scores of the answers to config.eval.judged of its records. All hosts get the
  scores of the first. Prints them, and the answers to config.eval.prompts.
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
  if records or config.eval.prompts:
    start = time.monotonic()
    judged, _, answers = judge.judge_records(
        run.model, run.merged(state.trainable), run.tokenizer, run.task,
        records, section=config.eval, seed=config.seed,
        prompts=config.eval.prompts, training=run.splits['train'].records)
    if records:
      scores |= {f'judge/{k}': v for k, v in judged.metrics.items()}
      text += ''.join(f' | {k} {v:.4g}' for k, v in judged.metrics.items())
      text += f' | {judged.note}' if judged.note else ''
    text += f' ({metrics.duration(time.monotonic() - start)})'
  if text:
    hosts.say(f'evaluation after {step} updates{text}')
  for prompt, answer in zip(config.eval.prompts, answers):
    hosts.say(log.quote(prompt, answer))
  return hosts.from_first(scores)
