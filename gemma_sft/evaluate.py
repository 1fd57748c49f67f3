"""Scores a run's weights, and what prompting alone reaches, on a split.

    python -m gemma_sft.evaluate --config=configs/blop.py --workdir=W --base
    python -m gemma_sft.evaluate --workdir=W --baseline=zero,few:4,rag:4
    python -m gemma_sft.evaluate --workdir=W
    python -m gemma_sft.evaluate --workdir=W --gguf=O/gguf/model-q8_0.gguf

The first form scores the untouched base before there is a run; the second the
best checkpoint, and the base as it is, with four examples of the training split
before each question, and with the four nearest ones; the third the best
checkpoint alone; the fourth what llama.cpp answers with an exported file. All
are shown side by side, with intervals and with a sentence on whether tuning
beats prompting. Scores and all answers are kept in W/evaluation/ (eval.json),
and answers are made once: a second call judges those that are there. The report
is W/report/report.html.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.evaluate', cli.CONFIG, cli.WORKDIR, cli.BASE, cli.STEP,
      cli.LLAMA_SERVER, cli.split('test'),
      cli.words(
          'baseline', [], 'Ways of prompting the base, separated by commas:'
          ' zero, few:4 (examples of the training split, drawn by the seed),'
          ' rag:4 (the nearest by BM25).'),
      cli.integer(
          'limit', 0, 'Judge only the first so many records; 0 for all.'),
      cli.text(
          'gguf', None, "Judge the answers of llama.cpp's server running this"
          ' exported file instead.'))

from concurrent import futures
import json
import os
import time
from typing import Any
from typing import Sequence

import jax

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.evaluation import judge
from gemma_sft.evaluation import report
from gemma_sft.evaluation import validation
from gemma_sft.exports import llama_runtime
from gemma_sft.generation import answers as answers_lib
from gemma_sft.generation import prompting
from gemma_sft.inputs import splits as splits_lib
from gemma_sft.monitor import log
from gemma_sft.run import restore
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
    baseline: Sequence[str] = (),
    gguf: str | None = None,
    llama_server: str | None = None,
) -> int:
  """Scores and reports; see the module's docstring."""
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  baselines = [prompting.parse(text) for text in baseline]
  if config is None:
    config = cli.load_run_config(workdir)
  config_lib.validate(config)
  if split not in ('train', 'validation', 'test') or not config.data[split]:
    known = [s for s in ('train', 'validation', 'test') if config.data[s]]
    raise errors.UserError(
        f'--split={split}', f'a split that the config names: {known}',
        f'set --config.data.{split} or choose another split')
  if split == 'train' and any(b.n for b in baselines):
    raise errors.UserError(
        f'--split=train with --baseline={",".join(baseline)}',
        'validation or test: examples come from the training split',
        'choose another split, or --baseline=zero')
  if limit < 0:
    raise errors.UserError(
        f'--limit={limit}', '0 for all records, or a number', 'leave it out')
  folder = os.path.join(workdir, 'evaluation')
  if gguf:
    if baselines:
      raise errors.UserError(
          '--gguf with --baseline', 'one of them at a time',
          'score the baselines in a command of their own')
    results = [_score_gguf(config, gguf, llama_server, folder, split, limit)]
  else:
    if base and not baselines:
      baselines = [prompting.Baseline('zero', 0)]
    results = []
    if baselines:
      results += _score(config, workdir, True, -1, folder, split, limit,
                        baselines)
    if not base:
      results += _score(config, workdir, False, step, folder, split, limit,
                        [prompting.Baseline('zero', 0)])
  notes = dict.fromkeys(r['judge_note'] for r in results if r['judge_note'])
  for note in notes:
    print(note)
  page = report.write(workdir, split)
  print(report.table(folder, split))
  for result in results:
    for sample in result['samples']:
      print(log.quote(sample['prompt'], sample['answer']))
  if said := report.sentence(report.read_results(folder, split)):
    print(said)
  print(f'answers and verdicts: {folder}')
  print(f'report: {page}')
  return 0


def _score(config, workdir, base, step, folder, split, limit, baselines):
  """Scores JAX weights, once for each way of prompting them."""
  served = restore.load_weights(config, workdir, base=base, step=step)
  # Together, so that no question of the split is one of the training examples.
  splits = splits_lib.load_splits(
      config.data, dict.fromkeys((split, 'train')), served.task,
      served.tokenizer)
  part, training = splits[split], splits['train'].records
  records, examples = part.records, part.examples
  if limit:
    records, examples = records[:limit], examples[:limit]
  kept = answers_lib.Answers(os.path.join(folder, 'answers.jsonl'))
  results = []
  for baseline in baselines:
    name = 'tuned' if not base else 'base' if not baseline.n else str(baseline)
    identity = _identity(
        served.identity, splits_lib.data_hash(records, served.task),
        config.eval, baseline)
    print(f'scoring {name} ({served.description}) on {len(records)} records of'
          f' {split}', flush=True)
    scores = {}
    if not baseline.n:
      scores = _kept_loss(_path(folder, split, name), identity)
    if not scores and not baseline.n:
      scores = validation.evaluate_loss(
          served.model, served.params, served.source(examples), served.mesh,
          execution=served.execution, accuracy=True)
    prompter = prompting.Prompter(
        baseline, [served.task.to_messages(r) for r in training], config.seed
    ) if baseline.n else None
    prompts = () if baseline.n else config.eval.prompts
    start = time.monotonic()
    judged, answers, samples = judge.judge_records(
        served.model, served.params, served.tokenizer, served.task, records,
        section=config.eval, seed=config.seed, prompts=prompts,
        training=training, prompter=prompter,
        as_text=base and config.eval.base_prompt == 'text',
        identity=served.identity, kept=kept,
        progress=_show_count(len(records) + len(prompts)))
    result = _result(
        config, split, name, identity, served, records, scores, judged,
        answers, prompts, samples, time.monotonic() - start)
    if prompter is not None:
      for row, record in zip(result['answers'], records):
        row['shown'] = [training[i].where for i in prompter.places(
            served.task.to_messages(record))]
    results.append(_save(folder, result))
  kept.close()
  return results


def _path(folder, split, name):
  return os.path.join(folder, f'{split}-{name.replace(":", "-")}.json')


def _save(folder, result):
  os.makedirs(folder, exist_ok=True)
  path = _path(folder, result['split'], result['name'])
  with open(path + '.tmp', 'w', encoding='utf-8') as file:
    json.dump(result, file, indent=1, ensure_ascii=False)
  os.replace(path + '.tmp', path)
  return result


def _kept_loss(path, identity):
  """Returns the losses of an earlier score of the same weights, or {}."""
  if not report.is_current(path, identity):
    return {}
  with open(path, encoding='utf-8') as file:
    scores = json.load(file)['scores']
  return {k: v for k, v in scores.items() if not k.startswith('judge/')}


def _score_gguf(config, gguf, llama_server, folder, split, limit):
  """Returns the judge's scores of llama.cpp's answers."""
  if not os.path.isfile(gguf):
    raise errors.UserError(
        f'--gguf={gguf}: no such file', 'an exported GGUF',
        'python -m gemma_sft.export --workdir=... --out=... writes one')
  server = llama_runtime.find_server(llama_server)
  task = tasks.load(config.task)
  records = splits_lib.read_split(config.data, split)
  training = splits_lib.read_split(config.data, 'train')
  records = records[:limit] if limit else records
  weights = convert.file_sha256(gguf)
  identity = _identity(
      weights, splits_lib.data_hash(records, task), config.eval,
      prompting.Baseline('zero', 0))
  print(f'scoring llama.cpp ({gguf}) on {len(records)} records of {split}',
        flush=True)
  # What is judged is as in JAX; what is shown is as it is served.
  judged_as = {'temperature': config.eval.temperature, 'seed': config.seed,
               'repeat_penalty': config.eval.repetition_penalty}
  served = {'temperature': config.sampling.temperature, 'seed': config.seed,
            'repeat_penalty': config.sampling.repetition_penalty}
  conversations = [
      *((judge.ask(prompt), served) for prompt in config.eval.prompts),
      *((task.to_messages(record), judged_as) for record in records)]
  kept = answers_lib.Answers(os.path.join(folder, 'answers.jsonl'))
  keys = [answers_lib.make_key(
      weights, repr(c), sorted(sampling.items()), config.eval.max_new_tokens)
          for c, sampling in conversations]
  due = [i for i, key in enumerate(keys) if kept.find(key) is None]
  start = time.monotonic()
  show = _show_count(len(conversations))
  if due:
    # As many tokens for the prompt as a training row has.
    length = config.eval.max_new_tokens + config.data.max_length
    with llama_runtime.Server(
        server, gguf, context_length=length, parallel=_PARALLEL,
        f32_cache=False) as running, futures.ThreadPoolExecutor(
            _PARALLEL) as pool:
      answers = pool.map(lambda i: _ask_server(
          running, *conversations[i], config.eval.max_new_tokens), due)
      for count, (i, answer) in enumerate(zip(due, answers), 1):
        kept.add(keys[i], answer)
        if count % 16 == 0:
          show(len(conversations) - len(due) + count)
  kept.close()
  n = len(config.eval.prompts)
  free, answers = (
      part for part in ([kept.find(k) for k in keys[:n]],
                        [kept.find(k) for k in keys[n:]]))
  judged = judge.judge_answers(
      task, records, answers, prompts=config.eval.prompts, free=free,
      training=training)
  return _save(folder, _result(
      config, split, 'llama.cpp', identity, None, records, {}, judged,
      answers, config.eval.prompts, free, time.monotonic() - start,
      weights=gguf))


def _ask_server(running, conversation, sampling, max_new_tokens) -> str:
  """Asks as a user's program does, through the template inside the file."""
  if isinstance(conversation, str):  # Plain text is continued.
    return running.complete(
        conversation.partition('\n')[0] + '\n', n_predict=max_new_tokens)
  return running.chat(
      [{'role': 'assistant' if m.role == 'model' else m.role,
        'content': m.content} for m in conversation[:-1]],
      max_tokens=max_new_tokens, **sampling)


def _result(config, split, name, identity, served, records, scores, judged,
            answers, prompts, samples, seconds, weights='') -> dict[str, Any]:
  task = tasks.load(config.task)
  conversations = [task.to_messages(r) for r in records]
  return {
      'identity': identity, 'name': name,
      'weights': weights or served.description, 'split': split,
      'headline': task.HEADLINE,
      'lower_is_better': sorted(task.LOWER_IS_BETTER),
      'records': len(records), 'seed': config.seed,
      'temperature': config.eval.temperature,
      'repetition_penalty': config.eval.repetition_penalty,
      'max_new_tokens': config.eval.max_new_tokens,
      'scores': scores | {f'judge/{k}': v for k, v in judged.metrics.items()},
      'judge_note': judged.note, 'generation_seconds': seconds,
      'samples': [
          {'prompt': p, 'answer': a, 'verdict': v}
          for p, a, v in zip(prompts, samples, judged.free_rows or (
              {},) * len(prompts))],
      'answers': [
          {'where': r.where, 'prompt': prompting.question(c),
           'reference': c if isinstance(c, str) else c[-1].content,
           'answer': a, 'verdict': v}
          for r, c, a, v in zip(records, conversations, answers, judged.rows)],
  }


def _identity(weights, data_hash, section, baseline) -> str:
  """Returns what an earlier loss has to share to stand for this one."""
  return ' '.join([
      weights, data_hash, str(baseline),
      str(section.max_new_tokens), ' '.join(section.prompts)])


def _show_count(total: int) -> Any:
  def show(done):
    if jax.process_index() == 0:
      print(f'  {done}/{total} answered', flush=True)
  return show
