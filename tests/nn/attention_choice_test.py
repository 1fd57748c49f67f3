"""A kernel is taken where the device has it and it is right, or not at all."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gemma_sft import errors
from gemma_sft import sharding
from gemma_sft.nn import attention
from gemma_sft.nn import attention_choice

# (platform, kind, compute capability).
_CPU = ('cpu', 'cpu', 0.0)
_V5E = ('tpu', 'TPU v5 lite', 0.0)
_V3 = ('tpu', 'TPU v3', 0.0)
_T4 = ('gpu', 'Tesla T4', 7.5)
_A100 = ('gpu', 'NVIDIA A100-SXM4-40GB', 8.0)
_H200 = ('gpu', 'NVIDIA H200', 9.0)
_RTX = ('gpu', 'NVIDIA GeForce RTX 5090', 12.0)
_AMD = ('gpu', 'AMD Instinct MI300X', 0.0)


def _choose(name, device, check=None, **facts):
  facts = dict(
      head_dim=256, softcap=None, packed=False, dtype=jnp.bfloat16) | facts
  return attention_choice.choose(
      name, check=check, **facts, **dict(zip(
          ('platform', 'device_kind', 'compute_capability'), device)))


@pytest.mark.parametrize('kernel, device, facts, reason', (
    ('einsum', _CPU, {}, ''),
    ('einsum', _H200, {}, ''),
    ('chunked', _T4, dict(dtype=jnp.float16), ''),
    ('splash', _V5E, dict(softcap=50.0, packed=True), ''),
    ('splash', _V5E, dict(dtype=jnp.float32), ''),
    ('splash', _V5E, dict(dtype=jnp.float16), 'not float16'),
    ('splash', _V3, {}, 'TPU v3 has no matrix product'),
    ('splash', _CPU, {}, 'for TPUs'),
    ('cudnn', _H200, {}, ''),
    ('cudnn', _H200, dict(dtype=jnp.float32), 'not float32'),
    ('cudnn', _H200, dict(softcap=50.0), 'no softcap'),
    ('cudnn', _H200, dict(packed=True), 'one example a row'),
    ('cudnn', _H200, dict(head_dim=512), 'up to 256 wide'),
    ('cudnn', _A100, {}, 'up to 128 wide'),
    ('cudnn', _A100, dict(head_dim=128), ''),
    ('cudnn', _T4, dict(head_dim=128), 'compute capability 8.0, not 7.5'),
    ('cudnn', _AMD, {}, 'NVIDIA'),
    ('tokamax', _A100, {}, 'compute capability 9.0 or 10.x, not 8.0'),
    ('tokamax', _RTX, {}, 'not 12.0'),
    ('tokamax', _V5E, {}, 'NVIDIA')))
def test_a_named_kernel_is_taken_or_refused(kernel, device, facts, reason):
  with (pytest.raises(errors.UserError, match=reason) if reason else
        contextlib.nullcontext()) as caught:
    assert _choose(kernel, device, **facts) == (kernel, 'as asked')
  if caught:
    assert caught.value.got.startswith(
        f'the attention kernel {kernel} cannot be used on {device[1]}: ')
    automatic, _ = _choose('auto', device, **facts)
    assert caught.value.fix == f'use auto, which takes {automatic}'


@pytest.mark.parametrize('device, facts, kernel', (
    (_CPU, {}, 'chunked'),
    (_V5E, dict(softcap=50.0, packed=True), 'splash'),
    (_V3, {}, 'chunked'),
    (_T4, dict(dtype=jnp.float16), 'chunked'),
    (_A100, {}, 'chunked'),
    (_A100, dict(head_dim=64), 'cudnn'),
    (_H200, {}, 'cudnn'),
    (_AMD, {}, 'chunked')))
def test_auto_takes_the_best(device, facts, kernel):
  got, why = _choose('auto', device, **facts)
  assert got == kernel and why


def _installed(monkeypatch, installed):
  monkeypatch.setattr(
      attention.importlib.util, 'find_spec', lambda name: installed or None)


def test_auto_goes_on_to_tokamax(monkeypatch):
  facts = dict(softcap=50.0, packed=True)
  _installed(monkeypatch, False)
  got, why = _choose('auto', _H200, **facts)
  assert got == 'chunked' and 'tokamax is not installed' in why
  _installed(monkeypatch, True)
  assert _choose('auto', _H200, **facts)[0] == 'tokamax'


def test_auto_falls_through_what_fails_or_is_wrong(monkeypatch):
  _installed(monkeypatch, True)
  errors_of = {'cudnn': (1e-3, 0.3), 'tokamax': (1e-3, 1e-3)}
  got, why = _choose('auto', _H200, errors_of.get)
  assert got == 'tokamax' and '3.0e-01' in why

  def broken(kernel):
    raise NotImplementedError(f'{kernel} ran out of registers\nand more')

  got, why = _choose('auto', _H200, broken)
  assert got == 'chunked'
  assert 'NotImplementedError: tokamax ran out of registers' in why
  assert 'and more' not in why


def test_f32_is_held_to_more_than_bf16():
  # On a TPU XLA's own products of f32 are rounded.
  for dtype, platform, wanted in (
      (jnp.float32, 'gpu', 1e-4), (jnp.bfloat16, 'gpu', 2e-2),
      (jnp.float32, 'tpu', 2e-2)):
    assert attention_choice.tolerance(dtype, platform) == wanted
  nan = float('nan')
  for wrong in ((nan, 0.0), (0.0, nan), (0.03, 0.0)):
    assert _choose('auto', _V5E, lambda kernel, e=wrong: e)[0] == 'chunked'


def _check(kernel, mesh=None):
  return attention_choice.check(
      kernel, N=2, K=1, H=16, window=24, softcap=5.0, dtype=jnp.float32, T=96,
      mesh=mesh)


@pytest.mark.parametrize('kernel', ('chunked', 'splash'))
def test_the_check_of_right_kernels(kernel):
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
  assert max(_check(kernel, mesh)) < 1e-5  # f32 sums in another order.


def _nan_in_padding(*args):
  out = attention._einsum(*args)
  return jnp.where(args[4][:, :, None, None] > 0, out, jnp.nan)


# Arguments: q, k, v, positions, segments, window, softcap, mesh.
@pytest.mark.parametrize('wrong', (
    lambda *args: attention._einsum(
        *args[:5], None if args[5] is None else args[5] + 1, *args[6:]),
    lambda *args: attention._einsum(*args[:6], None, args[7]),
    lambda *args: attention._einsum(
        *args[:4], jnp.minimum(args[4], 1), *args[5:]),
    lambda q, *rest: attention._einsum(
        0.9 * q + jax.lax.stop_gradient(0.1 * q), *rest),
    _nan_in_padding,
), ids=('sees one more', 'no softcap', 'mixes examples', 'wrong gradient',
        'NaN in padding'))
def test_a_wrong_kernel_is_refused(wrong, monkeypatch):
  monkeypatch.setitem(attention.KERNELS, 'splash', dataclasses.replace(
      attention.KERNELS['splash'], run=wrong))
  found = _check('splash')
  got, why = _choose('auto', _V5E, lambda kernel: found)
  assert got == 'chunked' and 'is off by' in why
  with pytest.raises(errors.UserError, match='is off by'):
    _choose('splash', _V5E, lambda kernel: found)
