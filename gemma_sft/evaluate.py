"""Scores a run's weights, or the untouched base, on a split.

    python -m gemma_sft.evaluate --config=configs/blop.py --workdir=W --base
    python -m gemma_sft.evaluate --workdir=W
    python -m gemma_sft.evaluate --workdir=W --gguf=O/gguf/model-q8_0.gguf

The first form scores the base before there is a run; the second the best
checkpoint; the third what llama.cpp answers with an exported file. All are
printed side by side. Scores and all answers are kept in W/evaluation/ and a
report with a picture in W/report/.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run('gemma_sft.evaluate', 'config', 'workdir', 'base', 'split', 'step',
          'limit', 'gguf', 'llama_server', split='test')

from concurrent import futures
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
from gemma_sft import tasks
from gemma_sft.artifacts import llama_runtime
from gemma_sft.weights import convert

# Answers that the server makes at a time: more use the cores better.
_PARALLEL = 4


def main(
    config: Any,
    workdir: str,
    base: bool,
    split: str,
    step: int,
    limit: int,
    gguf: str | None = None,
    llama_server: str | None = None,
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
  folder = os.path.join(workdir, 'evaluation')
  if gguf:
    result = _score_gguf(config, gguf, llama_server, folder, split, limit)
  else:
    result = _score(config, workdir, base, step, folder, split, limit)
  if result is None:
    print(report.table(folder, split))
    return 0
  name = result['name']
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, f'{split}-{name}.json')
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(result, file, indent=1, ensure_ascii=False)
  if result['judge_note']:
    print(result['judge_note'])
  print(report.table(folder, split))
  for sample in result['samples']:
    print(progress.quote(sample['prompt'], sample['answer']))
  print(f'answers and verdicts: {path}')
  if name != 'base':
    print(f'report: {report.write(workdir, split)}')
  return 0


def _score(config, workdir, base, step, folder, split, limit):
  """Returns the scores of JAX weights; None if they are there already."""
  served = runs.load_weights(config, workdir, base=base, step=step)
  name = 'base' if base else 'tuned'
  part = served.split(split)
  records, examples = part.records, part.examples
  if limit:
    records, examples = records[:limit], examples[:limit]
  identity = _identity(served.identity, records, config.eval)
  if _is_known(folder, split, name, identity, records):
    return None
  print(f'scoring {name} ({served.description}) on {len(records)} records of'
        f' {split}', flush=True)
  scores = scoring.evaluate_loss(
      served.model, served.params, served.source(examples), served.mesh,
      execution=served.execution)
  start = time.monotonic()
  total = len(records) + len(config.eval.prompts)
  judged, answers, samples = scoring.judge_records(
      served.model, served.params, served.tokenizer, served.task, records,
      prompts=config.eval.prompts, max_new_tokens=config.eval.max_new_tokens,
      batch_size=config.eval.batch_size, progress=_show_count(total))
  return _result(
      config, split, name, identity, served.description, records, scores,
      judged, answers, samples, time.monotonic() - start)


def _score_gguf(config, gguf, llama_server, folder, split, limit):
  """Returns the judge's scores of llama.cpp's answers; None if known."""
  if not os.path.isfile(gguf):
    raise errors.UserError(
        f'--gguf={gguf}: no such file', 'an exported GGUF',
        'python -m gemma_sft.export --workdir=... --out=... writes one')
  server = llama_runtime.find_server(llama_server)
  task = tasks.load(config.task)
  records = records_lib.read(
      config.data[split], format=config.data.format, split=split,
      columns=config_lib.parse_columns(config.data.columns))
  records = records[:limit] if limit else records
  identity = _identity(convert.file_sha256(gguf), records, config.eval)
  if _is_known(folder, split, 'llama.cpp', identity, records):
    return None
  print(f'scoring llama.cpp ({gguf}) on {len(records)} records of {split}',
        flush=True)
  # What is judged is greedy, as in JAX; what is shown is as it is served.
  greedy = {'temperature': 0.0, 'repeat_penalty': 1.0}
  served = {'temperature': config.sampling.temperature, 'seed': config.seed,
            'repeat_penalty': config.sampling.repetition_penalty}
  conversations = [
      *((scoring.ask(prompt), served) for prompt in config.eval.prompts),
      *((task.to_messages(record), greedy) for record in records)]
  start = time.monotonic()
  show = _show_count(len(conversations))
  answers = []
  # As many tokens for the prompt as a training row has.
  length = config.eval.max_new_tokens + config.data.max_length
  with llama_runtime.Server(
      server, gguf, context_length=length, parallel=_PARALLEL,
      f32_cache=False) as running, futures.ThreadPoolExecutor(
          _PARALLEL) as pool:
    for answer in pool.map(
        lambda c: _ask_server(running, *c, config.eval.max_new_tokens),
        conversations):
      answers.append(answer)
      if len(answers) % 16 == 0:
        show(len(answers))
  n = len(config.eval.prompts)
  judged = task.judge(records, answers[n:])
  return _result(
      config, split, 'llama.cpp', identity, gguf, records, {}, judged,
      answers[n:], answers[:n], time.monotonic() - start)


def _ask_server(running, conversation, sampling, max_new_tokens) -> str:
  """Asks as a user's program does, through the template inside the file."""
  if isinstance(conversation, str):  # Plain text is continued.
    return running.complete(
        conversation.partition('\n')[0] + '\n', n_predict=max_new_tokens)
  return running.chat(
      [{'role': 'assistant' if m.role == 'model' else m.role,
        'content': m.content} for m in conversation[:-1]],
      max_tokens=max_new_tokens, **sampling)


def _is_known(folder, split, name, identity, records) -> bool:
  path = os.path.join(folder, f'{split}-{name}.json')
  if not report.is_current(path, identity):
    return False
  print(f'{name} has been scored on these {len(records)} records before')
  return True


def _result(config, split, name, identity, weights, records, scores, judged,
            answers, samples, seconds) -> dict[str, Any]:
  return {
      'identity': identity, 'name': name, 'weights': weights,
      'split': split,
      'records': len(records), 'seed': config.seed,
      'sampling': 'greedy', 'max_new_tokens': config.eval.max_new_tokens,
      'scores': scores | {f'judge/{k}': v for k, v in judged.metrics.items()},
      'judge_note': judged.note, 'generation_seconds': seconds,
      'samples': [{'prompt': p, 'answer': a}
                  for p, a in zip(config.eval.prompts, samples)],
      'answers': [
          {'where': r.where, 'answer': a, 'verdict': v}
          for r, a, v in zip(records, answers, judged.rows)],
  }


def _identity(weights, records, section) -> str:
  """Returns what an earlier score has to share to stand for this one."""
  return ' '.join([
      weights, records_lib.content_hash(records),
      str(section.max_new_tokens), ' '.join(section.prompts)])


def _show_count(total: int) -> Any:
  def show(done):
    if jax.process_index() == 0:
      print(f'  {done}/{total} answered', flush=True)
  return show
