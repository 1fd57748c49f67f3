"""The state of steps, stacked, is the state of checkpoints, per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from gemma_sft import optimizer as optimizer_lib
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora


def _state(targets, dora=False):
  adapters = tiny_models.fresh_adapters('3', targets)
  if dora:
    adapters = lora.add_magnitudes(
        adapters, tiny_models.params('3'), transposed_gating=True)
  optimizer = optimizer_lib.make_optimizer(
      optax.constant_schedule(0.1), b1=0.9, b2=0.99, eps=1e-8,
      weight_decay=0.1, max_grad_norm=1.0, b_ratio=4.0)
  return state_lib.make_state(adapters, optimizer), optimizer


def _update(state, optimizer, gradients):
  updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.trainable)
  return state_lib.TrainState(
      state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)


# All layers, and one alone, whose place in the other stays empty.
@pytest.mark.parametrize('dora', (False, True))
@pytest.mark.parametrize('targets', ('attn/|mlp/', 'layer_1/attn'))
def test_updates_are_the_same_in_both_forms(targets, dora):
  state, optimizer = _state(targets, dora)
  stacked = state_lib.stack_layers(state, 2)
  # Going there and back changes no bit.
  jax.tree.map(np.testing.assert_array_equal,
               state_lib.unstack_layers(stacked, state), state)
  rng = np.random.default_rng(0)
  for _ in range(3):
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 1, leaf.shape), jnp.float32),
        state.trainable)
    state = _update(state, optimizer, gradients)
    # As the gradient through the stack is: zero where there is no adapter.
    stacked = _update(stacked, optimizer, {'layers': jax.tree.map(
        jnp.nan_to_num, lora.stack(gradients, 2))})
  back = state_lib.unstack_layers(stacked, state)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(state)):
    # The norm that clips is summed in another order.
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
  for path, leaf in jax.tree_util.tree_leaves_with_path(stacked.trainable):
    if targets.startswith('layer_1'):  # Layer 0 has none, and gets none.
      empty = leaf[0]
      assert np.isnan(empty).all() if path[-1].key == 'm' else not empty.any()
