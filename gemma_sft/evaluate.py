"""Scores a run's weights, and what prompting alone reaches, on a split.

    python -m gemma_sft.evaluate --config=configs/blop.py --workdir=W --base
    python -m gemma_sft.evaluate --workdir=W --baseline=zero,few:4,rag:4
    python -m gemma_sft.evaluate --workdir=W
    python -m gemma_sft.evaluate --workdir=W --gguf=O/gguf/model-q8_0.gguf

1. The untouched base, before there is a run.
2. The best checkpoint, and the base prompted in three ways: as it is, with four
   training examples before each question, and with the four nearest ones.
3. The best checkpoint alone.
4. llama.cpp with an exported file.

All results of a split are shown side by side, with confidence intervals and a
sentence on whether tuning beats prompting. Scores and answers are in
W/evaluation/ (eval.json), the report is W/report/report.html. A second call
judges the cached answers and makes only those that are missing.
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
import contextlib
import dataclasses
import json
import os
import time
from typing import Any
from typing import Sequence

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import pages
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

# Requests to llama-server at a time: more than one uses the cores better.
_PARALLEL = 4


@dataclasses.dataclass(frozen=True)
class _Request:
  """What to score, from the flags."""

  config: Any
  workdir: str
  split: str
  step: int
  limit: int

  @property
  def folder(self) -> str:
    return os.path.join(self.workdir, 'evaluation')

  def open_answers(self):
    """Returns the cache of answers, to be used in a `with`."""
    return contextlib.closing(answers_lib.Answers(
        os.path.join(self.folder, 'answers.jsonl')))


def main(
    config: Any, workdir: str, base: bool, split: str, step: int, limit: int,
    baseline: Sequence[str] = (), gguf: str | None = None,
    llama_server: str | None = None) -> int:
  """Scores and reports; see the module's docstring."""
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  baselines = [prompting.parse(text) for text in baseline]
  if config is None:
    config = cli.load_run_config(workdir)
  config_lib.validate(config)
  splits_lib.check_named(config.data, split)
  if split == 'train' and any(b.n for b in baselines):
    raise errors.UserError(
        f'--split=train with --baseline={",".join(baseline)}',
        'validation or test: examples come from the training split',
        'choose another split, or --baseline=zero')
  if limit < 0:
    raise errors.UserError(
        f'--limit={limit}', '0 for all records, or a number', 'leave it out')
  if gguf and baselines:
    raise errors.UserError(
        '--gguf with --baseline', 'one of them at a time',
        'score the baselines in a command of their own')
  request = _Request(config, workdir, split, step, limit)
  zero = prompting.Baseline('zero', 0)
  if gguf:
    results = [_score_gguf(request, gguf, llama_server)]
  else:
    if base and not baselines:
      baselines = [zero]
    results = _score(request, True, baselines) if baselines else []
    if not base:
      results += _score(request, False, [zero])
  for note in dict.fromkeys(filter(None, (r['judge_note'] for r in results))):
    print(note)
  page = report.write(workdir, split)
  print(report.table(request.folder, split))
  for result in results:
    for sample in result['samples']:
      print(log.quote(sample['prompt'], sample['answer']))
  if sentence := report.sentence(report.read_results(request.folder, split)):
    print(sentence)
  print(f'answers and verdicts: {request.folder}')
  print(f'report: {page}')
  return 0


def _score(request, base, baselines):
  """Scores JAX weights, once for each way of prompting them."""
  config, split = request.config, request.split
  served = restore.load_weights(
      config, request.workdir, base=base, step=-1 if base else request.step)
  # Loaded together, so that no question is one of the training examples.
  splits = splits_lib.load_splits(
      config.data, dict.fromkeys((split, 'train')), served.task,
      served.tokenizer)
  end = request.limit or None
  records, examples = splits[split].records[:end], splits[split].examples[:end]
  training = splits['train'].records
  results = []
  with request.open_answers() as cached:
    for baseline in baselines:
      name = 'tuned' if not base else str(baseline) if baseline.n else 'base'
      print(f'scoring {name} ({served.description}) on {len(records)} records'
            f' of {split}', flush=True)
      identity = _identity(
          served.identity, splits_lib.data_hash(records, served.task),
          config.eval, baseline)
      prompter, prompts, scores = None, config.eval.prompts, {}
      if baseline.n:  # Loss and free prompts are scored without examples.
        prompts, prompter = (), prompting.Prompter(
            baseline, [served.task.to_messages(r) for r in training],
            config.seed)
      else:
        scores = _cached_loss(request, name, identity) or (
            validation.evaluate_loss(
                served.model, served.params, served.source(examples),
                served.mesh, execution=served.execution, accuracy=True))
      start = time.monotonic()
      judged, answers, samples = judge.judge_records(
          served.model, served.params, served.tokenizer, served.task, records,
          section=config.eval, seed=config.seed, prompts=prompts,
          training=training, prompter=prompter,
          as_text=base and config.eval.base_prompt == 'text',
          identity=served.identity, cached=cached,
          progress=judge.show_answered(len(records) + len(prompts)))
      shown = [] if prompter is None else [
          {'shown': [training[i].where for i in prompter.indices(
              served.task.to_messages(record))]} for record in records]
      results.append(_save(
          request, name, records, judged, identity=identity,
          weights=served.description, answers=answers, shown=shown,
          prompts=prompts, samples=samples, scores=scores,
          seconds=time.monotonic() - start))
  return results


def _cached_loss(request, name, identity):
  """Returns the losses of an earlier score of the same weights, or {}."""
  result = report.read_results(request.folder, request.split).get(name, {})
  if result.get('identity') != identity:
    return {}
  return {key: value for key, value in result['scores'].items()
          if not key.startswith('judge/')}


def _score_gguf(request, gguf, llama_server):
  """Returns the judge's scores of llama.cpp's answers."""
  if not os.path.isfile(gguf):
    raise errors.UserError(
        f'--gguf={gguf}: no such file', 'an exported GGUF',
        'python -m gemma_sft.export --workdir=... --out=... writes one')
  server = llama_runtime.find_server(llama_server)
  config, split = request.config, request.split
  task = tasks.load(config.task)
  records = splits_lib.read_split(config.data, split)[:request.limit or None]
  training = splits_lib.read_split(config.data, 'train')
  weights = convert.file_sha256(gguf)
  print(f'scoring llama.cpp ({gguf}) on {len(records)} records of {split}',
        flush=True)
  # Records are answered as in JAX, to compare the scores; free prompts as the
  # exported model will be served.
  as_judged, as_served = (
      {'temperature': section.temperature, 'seed': config.seed,
       'repeat_penalty': section.repetition_penalty}
      for section in (config.eval, config.sampling))
  prompts, max_new_tokens = config.eval.prompts, config.eval.max_new_tokens
  conversations = [
      *((judge.ask(prompt), as_served) for prompt in prompts),
      *((task.to_messages(record), as_judged) for record in records)]
  keys = [answers_lib.make_key(
      weights, repr(conversation), sorted(sampling.items()), max_new_tokens)
          for conversation, sampling in conversations]

  def answer(indices, keep, report):
    with llama_runtime.Server(
        server, gguf, parallel=_PARALLEL, f32_cache=False,
        # As many tokens for the prompt as a training example has.
        context_length=max_new_tokens + config.data.max_length,
    ) as running, futures.ThreadPoolExecutor(_PARALLEL) as pool:
      texts = pool.map(lambda i: _ask_server(
          running, *conversations[i], max_new_tokens), indices)
      for n, (i, text) in enumerate(zip(indices, texts), 1):
        keep(i, text)
        report(n)

  start = time.monotonic()
  with request.open_answers() as cached:
    answers = cached.complete(keys, answer, judge.show_answered(len(keys)))
  free, answers = answers[:len(prompts)], answers[len(prompts):]
  judged = judge.judge_answers(
      task, records, answers, prompts=prompts, free=free, training=training)
  return _save(
      request, 'llama.cpp', records, judged, weights=gguf, answers=answers,
      prompts=prompts, samples=free, seconds=time.monotonic() - start,
      identity=_identity(
          weights, splits_lib.data_hash(records, task), config.eval,
          prompting.Baseline('zero', 0)))


def _ask_server(running, conversation, sampling, max_new_tokens) -> str:
  """Asks as a user's program does, through the template inside the file."""
  if isinstance(conversation, str):  # Plain text is continued.
    return running.complete(
        f'{prompting.question(conversation)}\n', n_predict=max_new_tokens)
  return running.chat(
      [{'role': 'assistant' if m.role == 'model' else m.role,
        'content': m.content} for m in conversation[:-1]],
      max_tokens=max_new_tokens, **sampling)


def _save(
    request, name, records, judged, *, identity, weights, answers, prompts,
    samples, seconds, scores=(), shown=()) -> dict[str, Any]:
  """Writes a result for `report.read_results`, and returns it."""
  config = request.config
  task = tasks.load(config.task)
  conversations = [task.to_messages(r) for r in records]
  result = {
      'identity': identity, 'name': name, 'weights': weights,
      'split': request.split, 'headline': task.HEADLINE,
      'lower_is_better': sorted(task.LOWER_IS_BETTER),
      'records': len(records), 'seed': config.seed,
      'temperature': config.eval.temperature,
      'repetition_penalty': config.eval.repetition_penalty,
      'max_new_tokens': config.eval.max_new_tokens,
      'scores': dict(scores) | {
          f'judge/{key}': value for key, value in judged.metrics.items()},
      'judge_note': judged.note, 'generation_seconds': seconds,
      'samples': [
          {'prompt': p, 'answer': a, 'verdict': v}
          for p, a, v in zip(prompts, samples, judged.free_rows or (
              {},) * len(prompts))],
      'answers': [
          {'where': r.where, 'prompt': prompting.question(c),
           'reference': c if isinstance(c, str) else c[-1].content,
           'answer': a, 'verdict': v, **more}
          for r, c, a, v, more in zip(
              records, conversations, answers, judged.rows,
              shown or ({},) * len(records))],
  }
  os.makedirs(request.folder, exist_ok=True)
  file_name = f'{request.split}-{name.replace(":", "-")}.json'
  pages.write(os.path.join(request.folder, file_name), json.dumps(
      result, indent=1, ensure_ascii=False))
  return result


def _identity(weights, data_hash, section, baseline) -> str:
  """Returns everything that a loss depends on: an equal one is reused."""
  return ' '.join([
      weights, data_hash, str(baseline), str(section.max_new_tokens),
      ' '.join(section.prompts)])
