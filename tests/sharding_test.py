"""One rule for every array of every model, and the same numbers on any mesh."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import tiny_models

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks

# 31B has k_einsum, E2B per-layer inputs, 7B qkv_einsum.
_NAMES = ('gemma1_7b', 'gemma2_9b', 'gemma3_1b', 'gemma4_e2b', 'gemma4_31b')


@functools.cache
def _abstract_state(name, full):
  """Returns (base weights, state) of a preset, as shapes."""
  model = model_lib.make_model(name)
  base = model_lib.abstract_params(model)
  optimizer = optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0)))
  trainable = (lambda p: p) if full else functools.partial(
      lora.init_adapters, rank=4, targets='attn/|mlp/', seed=0,
      transposed_gating=model.transposed_gating)
  return base, jax.eval_shape(
      lambda p: state_lib.make_state(trainable(p), optimizer), base)


def _paths(tree):
  return [jax.tree_util.keystr(path, simple=True, separator='/')
          for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize('name, full', (
    *((name, False) for name in _NAMES),
    # The optimizer repeats the names of the weights: one of a kind.
    ('gemma1_7b', True), ('gemma4_e2b', True)))
def test_every_array_has_one_rule(name, full, mesh):
  trees = _abstract_state(name, full)
  placed = sharding.tree_shardings(trees, mesh)  # Raises on none or several.
  # The dimensions of a placed array are divided evenly.
  jax.tree.map(lambda leaf, s: s.shard_shape(leaf.shape), trees, placed)


def test_every_rule_is_used():
  names = [path for name in _NAMES for path in _paths(
      _abstract_state(name, False))]
  for rule, _ in sharding.RULES:
    assert any(re.search(rule, path) for path in names), rule


def _specs(name, mesh):
  placed = sharding.tree_shardings(_abstract_state(name, False)[0], mesh)
  return {path: s.spec for path, s in zip(
      _paths(placed), jax.tree.leaves(placed))}


def test_where_the_weights_lie(mesh):
  specs = _specs('gemma2_9b', mesh)
  for name, spec in (
      ('embedder/input_embedding', P('tensor', 'fsdp')),
      ('layer_0/attn/q_einsum/w', P('tensor', 'fsdp')),
      ('layer_0/attn/kv_einsum/w', P(None, 'tensor', 'fsdp')),
      ('layer_0/attn/attn_vec_einsum/w', P('tensor', None, 'fsdp')),
      ('layer_0/mlp/gating_einsum', P(None, 'tensor', 'fsdp')),
      ('layer_0/mlp/linear', P('tensor', 'fsdp')),
      ('layer_0/pre_attention_norm/scale', P())):
    assert specs[name] == spec
  # What does not divide stays whole: one key-value head, tensor axis of 2.
  assert _specs('gemma3_1b', mesh)['layer_0/attn/kv_einsum/w'] == P(
      None, None, 'fsdp')


def test_a_sharding_is_written_as_xla_writes_it(mesh):
  # Or the step would be compiled a second time for what it returned itself.
  one = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  assert set(_specs('gemma2_9b', one).values()) == {P()}
  stacked = jax.eval_shape(blocks.stack, _abstract_state('gemma3_1b', False)[0])
  placed = sharding.tree_shardings(stacked, mesh)
  layers = placed['layers']
  assert layers['attn']['kv_einsum']['w'].spec == P(None, None, None, 'fsdp')
  assert layers['mlp']['linear'].spec == P(None, 'tensor', 'fsdp')
  assert layers['pre_ffw_norm']['scale'].spec == P()


@pytest.mark.parametrize('tree, rules, message', (
    ({'layer_0': {'attn': {'new_einsum': {'w': jnp.zeros((2, 2))}}}}, (),
     r'no sharding rule covers layer_0/attn/new_einsum/w \(2, 2\)'),
    ({'mlp': {'linear': jnp.zeros((2, 2))}}, ((r'mlp/', P()),),
     r"mlp/linear is covered by .*'mlp/'")))
def test_a_name_without_a_rule_or_with_two_is_an_error(
    tree, rules, message, mesh, monkeypatch):
  monkeypatch.setattr(sharding, 'RULES', (*sharding.RULES, *rules))
  with pytest.raises(ValueError, match=message):
    sharding.tree_shardings(tree, mesh)


@pytest.mark.parametrize('sizes, expected', (
    ((8, 1, 1), (8, 1, 1)), ((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)),
    ((2, 2, -1), (2, 2, 2)), ((2, 4, -1), (2, 4, 1))))
def test_mesh_sizes(sizes, expected):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes)))
  assert tuple(mesh.shape.values()) == expected
  assert sharding.batch_groups(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize('sizes', (
    (1, 1, 1), (3, 1, 1), (4, 4, 1), (-1, -1, 1), (-1, 3, 1), (-1, 16, 1)))
def test_a_mesh_that_does_not_fit_is_refused(sizes):
  with pytest.raises(errors.UserError, match='and there are 8 devices'):
    sharding.make_mesh(**dict(zip(sharding.AXES, sizes)))


def test_rows_are_split_over_data_and_fsdp(mesh):
  array = jax.device_put(np.arange(2 * 8 * 3).reshape(2, 8, 3),
                         sharding.batch_sharding(mesh))
  assert {s.data.shape for s in array.addressable_shards} == {(2, 2, 3)}
  # Shards are runs of rows, in order: `data` bounds each run.
  starts = sorted({s.index[1].start or 0 for s in array.addressable_shards})
  assert starts == [0, 2, 4, 6]
  one = jax.device_put(np.ones((2, 3)), sharding.replicated(mesh))
  assert {s.data.shape for s in one.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize('generation', ('3', '4'))
def test_the_mesh_does_not_change_the_numbers(generation, mesh):
  model = tiny_models.model(generation)
  params = tiny_models.params(generation)
  tokens_BT = np.random.default_rng(0).integers(3, 512, (8, 12), np.int32)
  positions_BT = np.tile(np.arange(12, dtype=np.int32), (8, 1))

  @jax.jit
  def hidden(params, tokens_BT, positions_BT):
    return model_lib.hidden_states(
        model, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))

  results = []
  for each in (sharding.single_device_mesh(), mesh,
               sharding.make_mesh(data=8, fsdp=1, tensor=1)):
    placed = jax.device_put(params, sharding.tree_shardings(params, each))
    rows = jax.sharding.NamedSharding(each, P(('data', 'fsdp')))
    results.append(np.asarray(hidden(
        placed, *jax.device_put((tokens_BT, positions_BT), rows))))
  # Sums of f32 products, split over devices.
  tiny_models.assert_close(results[1:], 2 * results[:1], 1e-5)
