"""Scores a run's weights, or the untouched base, on a split.

    python -m gemma_sft.evaluate --config=configs/blop.py --workdir=W --base
    python -m gemma_sft.evaluate --workdir=W

The first form scores the base before there is a run; the second the best
checkpoint, and prints both side by side. Scores and all answers are kept in
W/evaluation/ and a report with a picture in W/report/.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run('gemma_sft.evaluate', 'config', 'workdir', 'base', 'split', 'step',
          'limit', split='test')

import json
import os
import time
from typing import Any

import jax

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import progress
from gemma_sft import records as records_lib
from gemma_sft import report
from gemma_sft import runs
from gemma_sft import scoring


def main(
    config: Any, workdir: str, base: bool, split: str, step: int, limit: int
) -> int:
  """Scores and reports; see the module's docstring."""
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  if config is None:
    config = cli.load_run_config(workdir)
  config_lib.validate(config)
  if split not in ('train', 'validation', 'test') or not config.data[split]:
    known = [s for s in ('train', 'validation', 'test') if config.data[s]]
    raise errors.UserError(
        f'--split={split}', f'a split that the config names: {known}',
        f'set --config.data.{split} or choose another split')
  if limit < 0:
    raise errors.UserError(
        f'--limit={limit}', '0 for all records, or a number', 'leave it out')
  served = runs.load_weights(config, workdir, base=base, step=step)
  folder = os.path.join(workdir, 'evaluation')
  os.makedirs(folder, exist_ok=True)
  name = 'base' if base else 'tuned'
  part = served.split(split)
  records, examples = part.records, part.examples
  if limit:
    records, examples = records[:limit], examples[:limit]
  path = os.path.join(folder, f'{split}-{name}.json')
  identity = _identity(served, records, config.eval)
  if report.is_current(path, identity):
    print(f'{name} has been scored on these {len(records)} records before')
    print(report.table(folder, split))
    return 0
  print(f'scoring {name} ({served.description}) on {len(records)} records of'
        f' {split}', flush=True)
  scores = scoring.evaluate_loss(
      served.model, served.params, served.source(examples), served.mesh)
  start = time.monotonic()
  total = len(records) + len(config.eval.prompts)
  judged, answers, samples = scoring.judge_records(
      served.model, served.params, served.tokenizer, served.task, records,
      prompts=config.eval.prompts, max_new_tokens=config.eval.max_new_tokens,
      batch_size=config.eval.batch_size, progress=_show_count(total))
  result = {
      'identity': identity, 'name': name, 'weights': served.description,
      'split': split,
      'records': len(records), 'seed': config.seed,
      'sampling': 'greedy', 'max_new_tokens': config.eval.max_new_tokens,
      'scores': scores | {f'judge/{k}': v for k, v in judged.metrics.items()},
      'judge_note': judged.note, 'generation_seconds': time.monotonic() - start,
      'samples': [{'prompt': p, 'answer': a}
                  for p, a in zip(config.eval.prompts, samples)],
      'answers': [
          {'where': r.where, 'answer': a, 'verdict': v}
          for r, a, v in zip(records, answers, judged.rows)],
  }
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(result, file, indent=1, ensure_ascii=False)
  if judged.note:
    print(judged.note)
  print(report.table(folder, split))
  for prompt, answer in zip(config.eval.prompts, samples):
    print(progress.quote(prompt, answer))
  print(f'answers and verdicts: {path}')
  if not base:
    print(f'report: {report.write(workdir, split)}')
  return 0


def _identity(served, records, section) -> str:
  """Returns what an earlier score has to share to stand for this one."""
  return ' '.join([
      served.identity, records_lib.content_hash(records),
      str(section.max_new_tokens), ' '.join(section.prompts)])


def _show_count(total: int) -> Any:
  def show(done):
    if jax.process_index() == 0:
      print(f'  {done}/{total} answered', flush=True)
  return show
