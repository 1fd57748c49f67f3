"""What would fit: the largest batch and length, and what to change if it does
not.

Memory is linear in the rows of a device, and nearly so in their length; the
largest that fit are where the line meets the limit.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import Iterator
from typing import Mapping

import jax

from gemma_sft import errors
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.weights import architecture


@dataclasses.dataclass(frozen=True)
class Largest:
  """The most that fits.

  Attributes:
    batch_size: Rows of a global batch, the rest of the config as it is.
    length: Tokens of a row, the batch as it is.
    confirmed: Whether the compiler has taken both.
  """

  batch_size: int
  length: int
  confirmed: bool


# (config) -> the memory of its step, or None where it cannot run at all.
Measure = Callable[[Any], estimate.Memory | None]


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
  """Returns a locked copy of a config with some of its leaves changed."""
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(dict(changes))
  return copy.lock()


def largest(
    program: compile_step.Program,
    memory: estimate.Memory,
    measure: Measure | None,
) -> Largest:
  """Returns the largest batch and length that fit.

  Args:
    program: As configured.
    memory: Its memory, with a limit.
    measure: Compiles other sizes, for a line through two points and to confirm
      where it meets the limit; None extrapolates from `memory` alone.
  """
  config, rows, T = program.config, program.rows, program.length
  shares = config.data.batch_size // rows
  context = architecture.context_length(
      program.model.config, program.model.generation)
  # Of what lies there during a step alone some comes once, whatever the batch:
  # weights of a layer in full, for one.
  growing = (memory.peak - memory.held) * _growing_share(program)
  more = max(0.0, 1 + (memory.limit - memory.peak) / max(1.0, growing))

  def of_rows(n):
    return {'data.batch_size': max(0, n) * shares}

  def of_length(n):
    return {'data.max_length': n, 'data.buckets': ()}

  def round_length(n):
    return min(context, int(n) // 128 * 128 if n >= 128 else int(n))

  n_rows, length = int(rows * more), round_length(T * more)
  if measure is None:
    return Largest(n_rows * shares, length, False)
  n_rows = _search(config, memory, rows, n_rows, of_rows, measure)
  length = _search(
      config, memory, T, length, of_length, measure, round_length)
  return Largest(n_rows * shares, length, True)


def _growing_share(program):
  """Returns which share of a step's own memory is in proportion to its rows,
  as estimated from twice the rows."""
  twice = dataclasses.replace(
      program, max_trained=2 * program.max_trained, batch={
          name: jax.ShapeDtypeStruct(
              (a.shape[0], 2 * a.shape[1], *a.shape[2:]), a.dtype,
              sharding=a.sharding)
          for name, a in program.batch.items()})
  one, two = (estimate.memory(p, 0) for p in (program, twice))
  return (two.peak - one.peak) / max(1.0, one.peak - one.held)


def _search(config, memory, here, guess, changes, measure, rounded=int):
  """Returns the largest size that the compiler takes.

  A second point gives the line; where it meets the limit is tried, and a tenth
  less as long as it does not fit.
  """
  if guess != here and guess > 0:
    there = measure(changed(config, changes(guess)))
    if there is not None and there.peak != memory.peak:
      slope = (there.peak - memory.peak) / (guess - here)
      if slope > 0:
        guess = rounded(here + (memory.limit - memory.peak) / slope)
  for _ in range(4):
    if guess <= 0:
      return 0
    if guess == here:
      return here if memory.fits else 0
    there = measure(changed(config, changes(guess)))
    if there is not None and there.fits:
      return guess
    guess = rounded(min(guess - 1, guess * 0.9))
  return max(0, guess if guess < here and memory.fits else 0)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """Changes under which a step fits.

  Attributes:
    changes: Config leaves.
    cost: What they cost, for people.
    memory: Under them.
  """

  changes: dict[str, Any]
  cost: str
  memory: estimate.Memory

  @property
  def flags(self) -> str:
    return ' '.join(f'--config.{k}={v}' for k, v in self.changes.items())


def propose(
    config: Any,
    n_devices: int,
    rows: int,
    measure: Measure,
    confirm: Measure | None,
    tries: int = 3,
) -> Proposal | None:
  """Returns the cheapest changes under which the step fits, or None.

  Args:
    config: Of a step that does not.
    n_devices: Of the slice.
    rows: Of a microbatch on one device.
    measure: Estimates a config's memory.
    confirm: Compiles it; None takes the estimate's word.
    tries: Compilations at most.
  """
  for changes, cost in candidates(config, n_devices, rows):
    memory = measure(changed(config, changes))
    if memory is None or memory.peak > memory.limit * (1 + estimate.MARGIN):
      continue
    if confirm is None:
      # Nobody will look again: with the estimate's error it has to fit too.
      if memory.peak * (1 + estimate.MARGIN) <= memory.limit:
        return Proposal(changes, cost, memory)
      continue
    if tries == 0:
      return None
    tries -= 1
    memory = confirm(changed(config, changes))
    if memory is not None and memory.fits:
      return Proposal(changes, cost, memory)
  return None


def candidates(config: Any, n_devices: int, rows: int
               ) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (changes, what they cost), the cheapest first.

  The order is that of arithmetic (LoRA: body forward 2, backward 2 FLOPs a
  weight and token): smaller microbatches repeat nothing; sharded weights are
  gathered while the layer before computes; a block that is made again is its
  forward once more, half of the body's work; a quantised base is dequantised
  for each product and changes the numbers; adapters for all weights are
  another method.
  """
  A = config.train.gradient_accumulation_steps
  key = 'train.gradient_accumulation_steps'
  split = {key: A * rows} if rows > 1 else {}
  half = {key: 2 * A} if rows > 2 and rows % 2 == 0 else {}
  shard = {'mesh.fsdp': n_devices, 'mesh.data': 1} if (
      n_devices > 1 and config.mesh.fsdp != n_devices) else {}
  light = ({'train.remat': 'elementwise'} if config.train.remat == 'none'
           else {})
  block = {'train.remat': 'block'} if config.train.remat != 'block' else {}
  smaller = 'the same updates from smaller parts: no more arithmetic'
  says = {
      'half': smaller, 'split': smaller,
      'shard': 'each device holds a part of the weights, gathered layer by'
               ' layer: some communication',
      'light': 'norms and activations are computed twice: a few per cent',
      'block': 'the forward pass is computed twice: up to half as much time'
               ' again'}
  parts = {'half': half, 'split': split, 'shard': shard, 'light': light,
           'block': block}
  combinations = [
      ('half',), ('split',), ('light',), ('light', 'split'), ('shard',),
      ('split', 'shard'), ('light', 'split', 'shard'), ('block',),
      ('block', 'split'), ('block', 'shard'), ('block', 'split', 'shard')]
  seen = []

  def ladder(extra, told):
    for names in combinations:
      used = [name for name in names if parts[name]]
      changes = {k: v for name in used for k, v in parts[name].items()} | extra
      if changes and changes not in seen:
        seen.append(changes)
        yield changes, '; '.join([*(says[name] for name in used), *told])

  yield from ladder({}, [])
  if not config.lora.enabled:
    yield from ladder({'lora.enabled': True}, [
        'adapters instead of all weights: another method'])
  elif not config.model.quantization:
    for kind, error in (('int8', '0.65 %'), ('nf4', '9 %')):
      yield from ladder({'model.quantization': kind}, [
          f'the base rounded by {error}: other numbers'])


def measuring(measure: Callable[[Any], estimate.Memory]) -> Measure:
  """Returns a `Measure`: None for a config that cannot run on the devices."""
  def measured(config):
    try:
      return measure(config)
    except errors.UserError:
      return None
  return measured
