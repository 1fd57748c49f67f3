"""The largest batch and length that fit, and what to change if a step does not.

Memory is linear in the rows of a device, and nearly so in their length; the
largest sizes that fit are where that line meets the limit.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import Iterator
from typing import Mapping

import jax

from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.weights import architecture


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest batch that fits, and the longest rows."""

  batch_size: int  # Rows of a global batch, the rest of the config unchanged.
  length: int  # Tokens of a row, the rest of the config unchanged.
  confirmed: bool  # Whether the compiler accepted both.


# (config) -> the memory of its step, or None if it cannot run at all.
Measure = Callable[[Any], estimate.Memory | None]


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
  """Returns a locked copy of a config with {key: value} changed."""
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(dict(changes))
  return copy.lock()


def largest(
    program: compile_step.Program, memory: estimate.Memory,
    measure: Measure | None) -> Largest:
  """Returns the largest batch and length that fit.

  `measure` compiles other sizes, to draw a line through two points and to
  confirm where it meets the limit; None extrapolates from `memory` alone, which
  is that of `program`.
  """
  config, rows, T = program.config, program.rows, program.length
  # Microbatches times devices.
  n_parts = config.data.batch_size // rows
  context = architecture.context_length(
      program.model.config, program.model.generation)
  # Part of a step's temporary memory does not grow with the batch: the full
  # weights of a layer, for instance.
  growing = (memory.peak - memory.resident) * _growing_share(program)
  factor = max(0.0, 1 + (memory.limit - memory.peak) / max(1.0, growing))

  def round_length(n):
    return min(context, int(n) // 128 * 128 if n >= 128 else int(n))

  n_rows, length = int(rows * factor), round_length(T * factor)
  if measure is not None:
    n_rows = _search(memory, rows, n_rows, lambda n: measure(changed(
        config, {'data.batch_size': n * n_parts})))
    length = _search(memory, T, length, lambda n: measure(changed(
        config, {'data.max_length': n, 'data.buckets': ()})), round_length)
  return Largest(n_rows * n_parts, length, measure is not None)


def _growing_share(program):
  """Estimates the share of a step's temporary memory that grows with rows."""
  doubled = dataclasses.replace(
      program, max_trained=2 * program.max_trained, batch={
          name: jax.ShapeDtypeStruct(
              (a.shape[0], 2 * a.shape[1], *a.shape[2:]), a.dtype,
              sharding=a.sharding)
          for name, a in program.batch.items()})
  one, two = (estimate.memory(p, 0) for p in (program, doubled))
  return (two.peak - one.peak) / max(1.0, one.peak - one.resident)


def _search(memory, size, guess, measure, rounded=int):
  """Returns the largest size that the compiler accepts.

  The memory at the configured size and that at the guess, where the estimate
  meets the limit, give a line. The size where the line meets the limit is
  tried, then a tenth less while that does not fit. `rounded` rounds down.
  """
  if guess != size and guess > 0:
    second = measure(guess)
    if second is not None and second.peak != memory.peak:
      slope = (second.peak - memory.peak) / (guess - size)
      if slope > 0:
        guess = rounded(size + (memory.limit - memory.peak) / slope)
  for _ in range(4):
    if guess <= 0:
      return 0
    if guess == size:
      return size if memory.fits else 0
    tried = measure(guess)
    if tried is not None and tried.fits:
      return guess
    guess = rounded(min(guess - 1, guess * 0.9))
  return max(0, guess if guess < size and memory.fits else 0)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """Changes with which a step fits, what they cost, and its memory then."""

  changes: dict[str, Any]  # {key of the config: value}.
  cost: str
  memory: estimate.Memory

  @property
  def flags(self) -> str:
    return ' '.join(f'--config.{k}={v}' for k, v in self.changes.items())


def propose(
    config: Any, n_devices: int, rows: int, measure: Measure,
    confirm: Measure | None, tries: int = 3) -> Proposal | None:
  """Returns the cheapest changes with which the step fits, or None.

  Args:
    rows: Of a microbatch on one device.
    measure: Estimates a config's memory.
    confirm: Compiles a config; None trusts the estimate.
    tries: Largest number of compilations.
  """
  for changes, cost in candidates(config, n_devices, rows):
    memory = measure(changed(config, changes))
    if memory is None or memory.peak > memory.limit * (1 + estimate.MARGIN):
      continue
    if confirm is None:
      # Nothing confirms it, so it has to fit with the estimate's error too.
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


_SMALLER = 'the same updates from smaller microbatches: no more arithmetic'
_COSTS = {
    'half': _SMALLER,
    'split': _SMALLER,
    'shard': 'each device holds a part of the weights, which are gathered layer'
             ' by layer: some communication',
    'light': 'norms and activations are computed twice: a few per cent',
    'block': 'the forward pass is computed twice: up to half as much time'
             ' again'}
_COMBINATIONS = (
    ('half',), ('split',), ('light',), ('light', 'split'), ('shard',),
    ('split', 'shard'), ('light', 'split', 'shard'), ('block',),
    ('block', 'split'), ('block', 'shard'), ('block', 'split', 'shard'))


def candidates(config: Any, n_devices: int, rows: int
               ) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (changes, what they cost), the cheapest first.

  The order follows the arithmetic of LoRA, 2 FLOPs per weight and token forward
  and 2 backward: smaller microbatches repeat nothing; sharded weights are
  gathered while the layer before computes; recomputing a block is half of its
  work again; a quantised base changes the numbers; adapters instead of all
  weights are another method.
  """
  A, remat = config.train.gradient_accumulation_steps, config.train.remat
  accumulation = 'train.gradient_accumulation_steps'
  steps = {
      'split': {accumulation: A * rows} if rows > 1 else {},
      'half': {accumulation: 2 * A} if rows > 2 and rows % 2 == 0 else {},
      'shard': {'mesh.fsdp': n_devices, 'mesh.data': 1} if (
          n_devices > 1 and config.mesh.fsdp != n_devices) else {},
      'light': {'train.remat': 'elementwise'} if remat == 'none' else {},
      'block': {'train.remat': 'block'} if remat != 'block' else {}}
  seen = []

  def combine(extra, cost):
    for names in _COMBINATIONS:
      used = [name for name in names if steps[name]]
      changes = {k: v for name in used for k, v in steps[name].items()} | extra
      if changes and changes not in seen:
        seen.append(changes)
        yield changes, '; '.join([*(_COSTS[name] for name in used), *cost])

  yield from combine({}, [])
  if not config.lora.enabled:
    yield from combine({'lora.enabled': True}, [
        'adapters instead of all weights: another method'])
  elif not config.model.quantization:
    for kind, error in (('int8', '0.65 %'), ('nf4', '9 %')):
      yield from combine({'model.quantization': kind}, [
          f'the base rounded by {error}: other numbers'])
