"""FLOPs and saved bytes of traces, against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from gemma_sft.planning import flops


def _flops(fn, *shapes, **options):
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return flops.product_flops(jax.jit(fn).trace(*arrays).jaxpr, **options)


def test_a_loop_counts_as_often_as_it_runs():
  def fn(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

  assert _flops(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert _flops(fn, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5
  # XLA's own count is that of one turn: the trap this module is for.
  compiled = jax.jit(fn).lower(jnp.ones((3, 5)), jnp.ones((5, 5))).compile()
  assert compiled.cost_analysis()['flops'] < 3 * 2 * 3 * 5 * 5


def test_branches():
  def fn(flag, x, w):
    return jax.lax.cond(flag[0] > 0, lambda: x @ w, lambda: (x @ w) @ (w @ w))

  one, more = 2 * 3 * 5 * 5, 2 * 3 * 5 * 5 * 2 + 2 * 5**3
  shapes = ((1,), (3, 5), (5, 5))
  assert _flops(fn, *shapes) == more
  # Branch 0 is that of False.
  assert _flops(fn, *shapes, branch_shares=(0.25, 0.75)) == pytest.approx(
      0.25 * more + 0.75 * one)


def test_what_is_recomputed_counts_again():
  def loss(x, w):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

  plain, again = (_flops(jax.grad(fn), (3, 5), (5, 5))
                  for fn in (loss, jax.checkpoint(loss)))
  assert again > plain == 4 * 2 * 3 * 5 * 5


def test_work_on_each_device_adds_up():
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = map(jax.sharding.PartitionSpec, ('data', None))
  fn = jax.shard_map(
      jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  assert _flops(fn, (16, 5), (5, 7)) == 2 * 16 * 5 * 7


def test_saved_bytes_are_those_that_the_backward_scan_reads():
  def loss(x, w_LDD):
    def body(x, w):
      return jnp.sin(x @ w), None  # Keeps x and x @ w: 2 (4, 8) a layer.

    return jax.lax.scan(body, x, w_LDD)[0].sum()

  trace = jax.jit(jax.grad(loss)).trace(jnp.ones((4, 8)), jnp.ones((5, 8, 8)))
  # For the gradient of x alone, the cosine is enough.
  assert flops.residual_bytes(trace.jaxpr, 5) == 5 * 4 * 8 * 4
  assert flops.residual_bytes(trace.jaxpr, 7) == 0
