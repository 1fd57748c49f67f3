"""A kernel is taken where the device has it and it is right, or not at all."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gemma_sft import errors
from gemma_sft.nn import attention
from gemma_sft.nn import attention_choice

_CPU = dict(platform='cpu', device_kind='cpu', compute_capability=0.0)
_V5E = dict(platform='tpu', device_kind='TPU v5 lite', compute_capability=0.0)
_V3 = dict(platform='tpu', device_kind='TPU v3', compute_capability=0.0)
_T4 = dict(platform='gpu', device_kind='Tesla T4', compute_capability=7.5)
_A100 = dict(platform='gpu', device_kind='NVIDIA A100-SXM4-40GB',
             compute_capability=8.0)
_H200 = dict(platform='gpu', device_kind='NVIDIA H200', compute_capability=9.0)
_RTX = dict(platform='gpu', device_kind='NVIDIA GeForce RTX 5090',
            compute_capability=12.0)
_AMD = dict(platform='gpu', device_kind='AMD Instinct MI300X',
            compute_capability=0.0)


def _facts(device, head_dim=256, softcap=None, packed=False,
           dtype=jnp.bfloat16):
  return dict(device, head_dim=head_dim, softcap=softcap, packed=packed,
              dtype=dtype)


@pytest.mark.parametrize('kernel, facts, reason', (
    ('einsum', _facts(_CPU), ''),
    ('chunked', _facts(_T4, dtype=jnp.float16), ''),
    ('splash', _facts(_V5E, softcap=50.0, packed=True), ''),
    ('splash', _facts(_V5E, dtype=jnp.float32), ''),
    ('splash', _facts(_V5E, dtype=jnp.float16), 'not float16'),
    ('splash', _facts(_V3), 'TPU v3 has no matrix product'),
    ('splash', _facts(_CPU), 'for TPUs'),
    ('cudnn', _facts(_H200), ''),
    ('cudnn', _facts(_H200, dtype=jnp.float32), 'not float32'),
    ('cudnn', _facts(_H200, softcap=50.0), 'no softcap'),
    ('cudnn', _facts(_H200, packed=True), 'one example a row'),
    ('cudnn', _facts(_H200, head_dim=512), 'up to 256 wide'),
    ('cudnn', _facts(_A100), 'up to 128 wide'),
    ('cudnn', _facts(_A100, head_dim=128), ''),
    ('cudnn', _facts(_T4, head_dim=128), 'compute capability 8.0, not 7.5'),
    ('cudnn', _facts(_AMD), 'NVIDIA'),
    ('tokamax', _facts(_A100), 'compute capability 9.0 or 10.x, not 8.0'),
    ('tokamax', _facts(_RTX), 'not 12.0'),
    ('tokamax', _facts(_V5E), 'NVIDIA'),
))
def test_what_a_device_has(kernel, facts, reason):
  # Asked for by name, a kernel is taken or refused with the reason.
  with (pytest.raises(errors.UserError, match=reason) if reason else
        contextlib.nullcontext()):
    assert attention_choice.choose(kernel, **facts) == (kernel, 'as asked')


@pytest.mark.parametrize('facts, kernel', (
    (_facts(_CPU), 'chunked'),
    (_facts(_V5E, softcap=50.0, packed=True), 'splash'),
    (_facts(_V3), 'chunked'),
    (_facts(_T4, dtype=jnp.float16), 'chunked'),
    (_facts(_A100), 'chunked'),
    (_facts(_A100, head_dim=64), 'cudnn'),
    (_facts(_H200), 'cudnn'),
    (_facts(_AMD), 'chunked'),
))
def test_auto_takes_the_best(facts, kernel):
  got, why = attention_choice.choose('auto', **facts)
  assert got == kernel and why


def _installed(monkeypatch, installed):
  monkeypatch.setattr(
      attention.importlib.util, 'find_spec',
      lambda name: installed or None)


def test_auto_goes_on_to_tokamax(monkeypatch):
  facts = _facts(_H200, softcap=50.0, packed=True)
  _installed(monkeypatch, False)
  got, why = attention_choice.choose('auto', **facts)
  assert got == 'chunked' and 'tokamax is not installed' in why
  _installed(monkeypatch, True)
  assert attention_choice.choose('auto', **facts)[0] == 'tokamax'


def test_auto_falls_through_what_fails_or_is_wrong(monkeypatch):
  _installed(monkeypatch, True)
  errors_of = {'cudnn': (1e-3, 0.3), 'tokamax': (1e-3, 1e-3)}
  got, why = attention_choice.choose(
      'auto', check=errors_of.get, **_facts(_H200))
  assert got == 'tokamax' and '3.0e-01' in why

  def broken(kernel):
    raise NotImplementedError(f'{kernel} ran out of registers\nand more')

  got, why = attention_choice.choose('auto', check=broken, **_facts(_H200))
  assert got == 'chunked'
  assert 'NotImplementedError: tokamax ran out of registers' in why
  assert 'and more' not in why


def test_f32_is_held_to_more_than_bf16():
  for dtype, got in ((jnp.float32, 'chunked'), (jnp.bfloat16, 'cudnn')):
    assert attention_choice.tolerance(dtype, 'gpu') == (
        1e-4 if got == 'chunked' else 2e-2)
  # On a TPU XLA's own products of f32 are rounded.
  assert attention_choice.tolerance(jnp.float32, 'tpu') == 2e-2
  nan = float('nan')
  for value, gradient in ((nan, 0.0), (0.0, nan), (0.03, 0.0)):
    assert attention_choice.choose(
        'auto', check=lambda kernel, e=(value, gradient): e,
        **_facts(_V5E))[0] == 'chunked'


def test_a_named_kernel_is_taken_or_refused():
  assert attention_choice.choose('einsum', **_facts(_H200)) == (
      'einsum', 'as asked')
  assert attention_choice.choose('splash', **_facts(_V5E))[0] == 'splash'
  with pytest.raises(errors.UserError) as caught:
    attention_choice.choose('cudnn', **_facts(_A100))
  message = str(caught.value)
  assert 'cudnn' in message and 'A100' in message
  assert 'up to 128 wide' in message and 'takes chunked' in message
  with pytest.raises(errors.UserError, match="Did you mean 'splash'"):
    attention_choice.choose('spalsh', **_facts(_V5E))


def _check(kernel, mesh=None):
  return attention_choice.check(
      kernel, N=2, K=1, H=16, window=24, softcap=5.0, dtype=jnp.float32, T=96,
      mesh=mesh)


def test_the_check_of_right_kernels():
  mesh = jax.make_mesh(
      (2, 1, 1), ('data', 'fsdp', 'tensor'), devices=jax.devices()[:2],
      axis_types=(jax.sharding.AxisType.Auto,) * 3)
  for kernel in ('chunked', 'splash'):
    assert max(_check(kernel, mesh)) < 1e-5  # f32 sums in another order.


def _sees_one_more(*args):
  *qkv, positions, segments, window, softcap, mesh = args
  window = None if window is None else window + 1
  return attention._einsum(*qkv, positions, segments, window, softcap, mesh)


def _no_softcap(*args):
  *rest, _, mesh = args
  return attention._einsum(*rest, None, mesh)


def _mixes_examples(*args):
  *qkv, positions, segments, window, softcap, mesh = args
  return attention._einsum(*qkv, positions, jnp.minimum(segments, 1), window,
                           softcap, mesh)


def _wrong_gradient(q, *rest):
  return attention._einsum(
      0.9 * q + jax.lax.stop_gradient(0.1 * q), *rest)


def _nan_in_padding(*args):
  out = attention._einsum(*args)
  return jnp.where(args[4][:, :, None, None] > 0, out, jnp.nan)


@pytest.mark.parametrize('wrong', (
    _sees_one_more, _no_softcap, _mixes_examples, _wrong_gradient,
    _nan_in_padding))
def test_a_wrong_kernel_is_refused(wrong, monkeypatch):
  monkeypatch.setitem(attention.KERNELS, 'splash', dataclasses.replace(
      attention.KERNELS['splash'], run=wrong))
  got, why = attention_choice.choose('auto', check=_check, **_facts(_V5E))
  assert got == 'chunked' and 'is off by' in why
  with pytest.raises(errors.UserError, match='is off by'):
    attention_choice.choose('splash', check=_check, **_facts(_V5E))
