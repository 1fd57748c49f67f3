"""What a traced step does: FLOPs of its products, and what autodiff keeps.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length:
of a step that scans over its layers it sees one. Here loops count as often as
they run.
"""

import math
from typing import Any
from typing import Iterator

import jax
from jax.extend import core


def product_flops(jaxpr: Any, *, branch_shares: tuple[float, ...] = ()
                  ) -> float:
  """Returns the FLOPs of all matrix products of a program, over all devices.

  What is computed a second time in the backward pass counts again. The body of
  a `while` counts once, since its length is not known; the step has none. Of a
  Pallas kernel all blocks of its grid count, masked ones too.

  Args:
    jaxpr: Of `jax.jit(...).trace(...)`.
    branch_shares: How often each branch of a `cond` is taken, for those with as
      many branches; others count their dearest one.
  """
  total = 0.0
  for eqn in _plain(jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      total += 2 * eqn.outvars[0].aval.size * math.prod(
          eqn.invars[0].aval.shape[axis] for axis in contracted)
      continue
    parts = [product_flops(inner, branch_shares=branch_shares)
             for inner in _inside(eqn)]
    if name == 'cond':
      if len(parts) == len(branch_shares):
        total += sum(n * share for n, share in zip(parts, branch_shares))
      else:
        total += max(parts, default=0.0)
      continue
    times = 1
    if name == 'scan':
      times = params['length']
    elif name == 'shard_map':
      times = params['mesh'].size
    elif name == 'pallas_call':
      times = math.prod(
          n for n in params['grid_mapping'].grid if isinstance(n, int))
      # Blocks are skipped by conditions inside: the dearest branch counts.
      parts = [product_flops(inner) for inner in _inside(eqn)]
    total += times * sum(parts)
  return total


def kept_bytes(jaxpr: Any, n_layers: int) -> int:
  """Returns what the forward scan over the layers leaves for the backward one.

  Over all devices, of one microbatch: the stacked results of the first scan of
  that length. 0 where there is none (layers in a loop).
  """
  for eqn in _walk(jaxpr):
    if eqn.primitive.name == 'scan' and eqn.params['length'] == n_layers:
      stacked = [v.aval for v in eqn.outvars
                 if v.aval.shape[:1] == (n_layers,)]
      if stacked:
        return sum(a.size * a.dtype.itemsize for a in stacked)
  return 0


def _walk(jaxpr: Any) -> Iterator[Any]:
  for eqn in _plain(jaxpr).eqns:
    yield eqn
    for inner in _inside(eqn):
      yield from _walk(inner)


def _plain(jaxpr):
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _inside(eqn) -> list[Any]:
  """Returns the programs among an equation's parameters."""
  def is_program(x):
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))

  return [leaf for value in eqn.params.values()
          for leaf in jax.tree.leaves(value, is_leaf=is_program)
          if is_program(leaf)]
