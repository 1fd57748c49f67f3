"""What a traced step costs: FLOPs of its products, and bytes of residuals.

XLA's `cost_analysis` counts the body of a loop once, whatever its length: for
a step that scans over its layers it counts one layer. Here a loop counts as
often as it runs.
"""

import math
from typing import Any
from typing import Iterator

import jax
from jax.extend import core


def product_flops(jaxpr: Any, *, branch_shares: tuple[float, ...] = ()
                  ) -> float:
  """Returns the FLOPs of all matrix products of a program, over all devices.

  Products that are recomputed in the backward pass count again. The body of a
  `while` loop counts once, because its length is not known; the training step
  has none. A Pallas kernel counts all blocks of its grid, masked ones too.

  `branch_shares` says how often each branch of a `cond` with that many branches
  is taken. Of any other `cond` the most expensive branch counts.
  """
  total = 0.0
  for eqn in _open(jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      total += 2 * eqn.outvars[0].aval.size * math.prod(
          eqn.invars[0].aval.shape[axis] for axis in contracted)
      continue
    inner = [product_flops(program, branch_shares=branch_shares)
             for program in _inner_programs(eqn)]
    if name == 'cond':
      if len(inner) == len(branch_shares):
        total += sum(n * share for n, share in zip(inner, branch_shares))
      else:
        total += max(inner, default=0.0)
      continue
    times = 1
    if name == 'scan':
      times = params['length']
    elif name == 'shard_map':
      times = params['mesh'].size
    elif name == 'pallas_call':
      times = math.prod(
          n for n in params['grid_mapping'].grid if isinstance(n, int))
      # A `cond` inside a kernel skips blocks; the branch that works counts.
      inner = [product_flops(program) for program in _inner_programs(eqn)]
    total += times * sum(inner)
  return total


def residual_bytes(jaxpr: Any, n_layers: int) -> int:
  """Returns what the forward scan over the layers saves for the backward pass.

  Over all devices, for one microbatch: the stacked outputs of the first scan of
  that length. 0 if there is no such scan (layers in a Python loop).
  """
  for eqn in _all_equations(jaxpr):
    if eqn.primitive.name == 'scan' and eqn.params['length'] == n_layers:
      stacked = [v.aval for v in eqn.outvars
                 if v.aval.shape[:1] == (n_layers,)]
      if stacked:
        return sum(a.size * a.dtype.itemsize for a in stacked)
  return 0


def _all_equations(jaxpr: Any) -> Iterator[Any]:
  for eqn in _open(jaxpr).eqns:
    yield eqn
    for program in _inner_programs(eqn):
      yield from _all_equations(program)


def _open(jaxpr):
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _inner_programs(eqn) -> list[Any]:
  """Returns the jaxprs among an equation's parameters."""
  def is_program(x):
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))

  return [leaf for value in eqn.params.values()
          for leaf in jax.tree.leaves(value, is_leaf=is_program)
          if is_program(leaf)]
