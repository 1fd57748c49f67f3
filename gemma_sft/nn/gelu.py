"""The gated GELU of Gemma's MLPs: gelu(gate) * up.

Value and derivative are computed in float32 and rounded once. The library
rounds to the dtype of its inputs after each operation, which on a CPU costs
more than the products beside it in bfloat16: there, XLA fuses the derivative
with the two pads that join the gradients of gate and up, 41 % of a step of the
270M (tests/benchmarks/RESULTS.md).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gated_gelu(gate_up: jax.Array) -> jax.Array:
  """Returns gelu(gate) * up (..., F) of gate and up (..., 2, F).

  The GELU is that by tanh (arXiv 1606.08415), as in the library.
  """
  gate, up = _halves(gate_up)
  return (jax.nn.gelu(gate) * up).astype(gate_up.dtype)


def _halves(gate_up):
  gate_up = gate_up.astype(jnp.float32)
  return gate_up[..., 0, :], gate_up[..., 1, :]


def _bwd(gate_up, d):
  gate, up = _halves(gate_up)
  d = d.astype(jnp.float32)
  gelu, vjp = jax.vjp(jax.nn.gelu, gate)
  halves = [half.astype(gate_up.dtype) for half in (*vjp(d * up), d * gelu)]
  # On a CPU, so that XLA joins results instead of computing them twice.
  halves = jax.lax.platform_dependent(
      *halves, cpu=lambda *x: jax.lax.optimization_barrier(x),
      default=lambda *x: x)
  return (jnp.stack(halves, axis=-2),)


gated_gelu.defvjp(lambda gate_up: (gated_gelu(gate_up), gate_up), _bwd)
