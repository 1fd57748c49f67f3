"""Schedules at their corners, and one step of AdamW by hand."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_sft import optimizer

_F32 = 1e-6  # Relative; optax computes in f32.


def _schedule(**changes):
  return optimizer.make_schedule(**dict(
      learning_rate=0.1, schedule='cosine', warmup_ratio=0.0, final_share=0.0,
      total_steps=100) | changes)


_LINEAR, _CONSTANT = dict(schedule='linear'), dict(schedule='constant')


@pytest.mark.parametrize('changes, values', (
    # Without a warm-up the first update has the peak; with one it has a rate.
    *((dict(schedule=name), {0: 0.1})
      for name in ('constant', 'linear', 'cosine')),
    *((dict(schedule=name, warmup_ratio=0.04),
       {0: 0.1 / 5, 1: 0.2 / 5, 2: 0.3 / 5, 3: 0.4 / 5, 4: 0.1})
      for name in ('constant', 'linear', 'cosine')),
    (_CONSTANT | dict(warmup_ratio=0.1),
     {10: 0.1, 50: 0.1, 99: 0.1, 1000: 0.1}),
    (_LINEAR, {25: 0.075, 99: 0.001, 100: 0.0, 1000: 0.0}),
    (_LINEAR | dict(warmup_ratio=0.2, final_share=0.5),
     {20: 0.1, 60: 0.075, 100: 0.05, 1000: 0.05}),
    ({}, {25: 0.05 * (1 + math.sqrt(0.5)), 50: 0.05, 100: 0.0, 1000: 0.0}),
    (dict(warmup_ratio=0.2, final_share=0.1),
     {20: 0.1, 60: 0.055, 100: 0.01, 1000: 0.01})))
def test_schedules(changes, values):
  schedule = _schedule(**changes)
  for step, value in values.items():
    np.testing.assert_allclose(
        float(schedule(step)), value, rtol=_F32, atol=1e-9, err_msg=str(step))


def test_the_last_update_still_has_a_rate():
  assert 2e-5 < float(_schedule()(99)) < 3e-5


@pytest.mark.parametrize('share', (0.0, 0.5, 1.0))
@pytest.mark.parametrize('total_steps', (1, 2, 3))
def test_runs_of_a_few_updates_have_a_rate(total_steps, share):
  schedule = _schedule(total_steps=total_steps, warmup_ratio=share)
  for step in range(total_steps):
    assert 0 < float(schedule(step)) <= 0.1 * (1 + _F32)


def _adamw(rate=0.1, **changes):
  return optimizer.make_optimizer(optax.constant_schedule(rate), **dict(
      b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, max_grad_norm=0.0) | changes)


def _steps(adamw, weight, gradients):
  """Returns the weight after each gradient."""
  params, weights = {'w': jnp.asarray(weight)}, []
  state = adamw.init(params)
  for gradient in gradients:
    updates, state = adamw.update({'w': jnp.asarray(gradient)}, state, params)
    params = optax.apply_updates(params, updates)
    weights.append(np.asarray(params['w']))
  return weights


def test_two_steps_of_adamw_by_hand():
  first, second = _steps(_adamw(weight_decay=0.5), [2.0], [[4.0], [-1.0]])
  # m / (1 - b1) = g and v / (1 - b2) = g^2, so the step is the sign, and the
  # decay is the rate times 0.5 times the weight.
  w1 = 2.0 - 0.1 * (1.0 + 0.5 * 2.0)
  np.testing.assert_allclose(first, [w1], rtol=_F32)
  m = (0.9 * 0.1 * 4.0 + 0.1 * -1.0) / (1 - 0.9 ** 2)
  v = (0.99 * 0.01 * 16.0 + 0.01 * 1.0) / (1 - 0.99 ** 2)
  w2 = w1 - 0.1 * (m / (math.sqrt(v) + 1e-8) + 0.5 * w1)
  # f32, with 1 - b2^2 of 0.02.
  np.testing.assert_allclose(second, [w2], rtol=1e-5)


def test_eps_and_decay_rates_are_used():
  base = _steps(_adamw(), [2.0], [[4.0], [-1.0]])[1]
  for change in (dict(b1=0.5), dict(b2=0.5), dict(eps=1.0)):
    assert abs(_steps(_adamw(**change), [2.0], [[4.0], [-1.0]])[1] - base) > (
        1e-3), change


def test_clipping_is_by_the_global_norm():
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  gradient = {'a': jnp.asarray([30.0]), 'b': jnp.asarray([40.0])}
  # Adam does not see a scale, so its first moment is read: 0.1 * gradient.
  for max_grad_norm, expected in (
      (0.0, (3.0, 4.0)), (5.0, (0.3, 0.4)), (60.0, (3.0, 4.0))):
    adamw = _adamw(max_grad_norm=max_grad_norm)
    _, state = adamw.update(gradient, adamw.init(params), params)
    mu = optax.tree_utils.tree_get(state, 'mu')
    np.testing.assert_allclose((mu['a'][0], mu['b'][0]), expected, rtol=_F32)


def test_lora_plus_gives_b_a_rate_of_its_own():
  params, grads = (
      {'q': {'a': jnp.asarray([x]), 'b': jnp.asarray([x])}} for x in (2.0, 0.5))

  def updates(rate=0.1, **changes):
    adamw = _adamw(rate, weight_decay=0.1, **changes)
    return adamw.update(grads, adamw.init(params), params)[0]['q']

  # As if A and B had optimizers of their own at 0.1 and 1.6 (arXiv 2402.12354),
  # decay included.
  got, plain = updates(b_ratio=16.0), updates()
  np.testing.assert_allclose(got['a'], plain['a'], rtol=_F32)
  np.testing.assert_allclose(got['b'], updates(1.6)['b'], rtol=_F32)
  np.testing.assert_allclose(plain['a'], plain['b'], rtol=_F32)
