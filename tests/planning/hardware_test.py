"""The names of what people rent."""

import pytest

from gemma_sft import errors
from gemma_sft.planning import hardware


@pytest.mark.parametrize('name, topology, n, gib', [
    ('v5e:2x4', 'v5e:2x4', 8, 15.75), ('v5e-1', 'v5e:1x1', 1, 15.75),
    ('v5litepod-8', 'v5e:2x4', 8, 15.75), ('V6E-4', 'v6e:2x2', 4, 31.24),
    # Cloud TPU counts the cores of a v5p, of which a device has two.
    ('v5p-8', 'v5p:2x2x1', 4, 95.73), ('kaggle-tpu', 'v5e:2x4', 8, 15.75),
    # No compiler for it here.
    ('kaggle-t4x2', '', 2, 11.25)])
def test_slices(name, topology, n, gib):
  place = hardware.parse(name)
  assert (place.topology, place.n_devices) == (topology, n)
  assert place.chip.memory == gib * 2**30
  assert place.chip.platform == ('tpu' if topology else 'gpu')
  # Nine hours a session, and the disk that outlives it.
  assert (place.hours, place.disk) == (
      (9.0, 19.5e9) if name.startswith('kaggle') else (0, 0))


@pytest.mark.parametrize('name, nearest', [
    ('kagle-tpu', "'kaggle-tpu'"), ('v5e:2x5', "'v5e:2x")])
def test_an_unknown_name_gets_the_nearest_and_all_known(name, nearest):
  with pytest.raises(errors.UserError) as caught:
    hardware.parse(name)
  assert nearest in caught.value.fix
  assert all(name in caught.value.expected for name in hardware.SLICES)


def test_devices_that_are_not_there_and_this_machine():
  devices = hardware.absent_devices(hardware.parse('kaggle-t4x2'))
  assert [d.id for d in devices] == [0, 1]
  assert devices[0].compute_capability == 7.5
  assert hardware.parse('cpu').chip is None


@pytest.mark.parametrize('name, message', [
    ('v5e-16', 'launch/libtpu.sh'), ('gpu', '--topology=gpu')])
def test_what_is_missing_is_named(monkeypatch, tmp_path, name, message):
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path))
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(errors.UserError, match=message):
    hardware.devices_of(hardware.parse(name), analytic=False)
