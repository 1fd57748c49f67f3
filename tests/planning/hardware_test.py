"""The names of what people rent."""

import pytest

from gemma_sft import errors
from gemma_sft.planning import hardware


@pytest.mark.parametrize('name, topology, n, gib', [
    ('v5e:2x4', 'v5e:2x4', 8, 15.75), ('v5e-1', 'v5e:1x1', 1, 15.75),
    ('v5litepod-8', 'v5e:2x4', 8, 15.75), ('V6E-4', 'v6e:2x2', 4, 31.24),
    # Cloud TPU counts the cores of a v5p, of which a device has two.
    ('v5p-8', 'v5p:2x2x1', 4, 95.73), ('kaggle-tpu', 'v5e:2x4', 8, 15.75)])
def test_slices(name, topology, n, gib):
  place = hardware.parse(name)
  assert (place.topology, place.n_devices) == (topology, n)
  assert place.chip.memory == gib * 2**30
  assert place.is_tpu


def test_kaggle_has_nine_hours_and_its_disk():
  for name in ('kaggle-tpu', 'kaggle-t4x2'):
    place = hardware.parse(name)
    assert (place.hours, place.disk) == (9.0, 19.5e9)
  assert not place.is_tpu and not place.topology  # No compiler for it here.


def test_this_machine():
  assert hardware.parse('cpu').chip is None


def test_an_unknown_name_gets_the_nearest_and_all_known():
  with pytest.raises(errors.UserError) as caught:
    hardware.parse('kagle-tpu')
  assert "'kaggle-tpu'" in caught.value.fix
  assert all(name in caught.value.expected for name in hardware.known())
  with pytest.raises(errors.UserError) as caught:
    hardware.parse('v5e:2x5')
  assert "'v5e:2x" in caught.value.fix


def test_devices_that_are_not_there():
  devices = hardware.absent_devices(hardware.parse('kaggle-t4x2'))
  assert [d.id for d in devices] == [0, 1]
  assert devices[0].compute_capability == 7.5
