"""The accelerators that people rent, their limits, and their compilers.

Memory is what is left for programs: for TPUs the figure that libtpu 0.0.50.1
itself names when a program asks for too much ("exceeds available HBM
(15.75G)"), for the T4 three quarters of 15,360 MiB, which JAX takes unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax

from gemma_sft import cache
from gemma_sft import errors
from gemma_sft.monitor import metrics

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    name: For people.
    device_kind: As JAX names it.
    platform: 'tpu' or 'gpu'.
    memory: Bytes that programs may use.
    peak_flops: Dense FLOP/s in the dtype that a run takes there.
    bandwidth: Bytes a second of its memory, from the vendor's data sheet.
    compute_capability: Of an NVIDIA GPU, else 0.
  """

  name: str
  device_kind: str
  platform: str
  memory: float
  peak_flops: float
  bandwidth: float
  compute_capability: float = 0.0


CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 16 GB, 819 GB/s.
    'v5e': Chip('TPU v5e', 'TPU v5 lite', 'tpu', 15.75 * _GIB,
                metrics.PEAK_FLOPS['TPU v5e'], 819e9),
    # cloud.google.com/tpu/docs/v5p: 95 GB, 2,765 GB/s. Two cores, one device.
    'v5p': Chip('TPU v5p', 'TPU v5', 'tpu', 95.73 * _GIB,
                metrics.PEAK_FLOPS['TPU v5p'], 2765e9),
    # cloud.google.com/tpu/docs/v6e: 32 GB, 1,640 GB/s.
    'v6e': Chip('TPU v6e', 'TPU v6 lite', 'tpu', 31.24 * _GIB,
                metrics.PEAK_FLOPS['TPU v6e'], 1640e9),
    # NVIDIA's data sheet: 320 GB/s, 65 TFLOP/s in float16, which products are
    # made in there: the card has no bfloat16 (`devices.choose_dtype`).
    't4': Chip('Tesla T4', 'Tesla T4', 'gpu', 0.75 * 15 * _GIB,
               metrics.PEAK_FLOPS['Tesla T4'], 320e9, 7.5),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices that are rented together.

  Attributes:
    name: For people.
    chip: Of `CHIPS`; None for the devices of this machine.
    topology: libtpu's name, such as 'v5e:2x4'; of this machine 'cpu' or 'gpu',
      and '' where no compiler is at hand.
    n_devices: Of the slice; 0 for those of this machine.
    hours: Longest session; 0 for no limit.
    disk: Bytes of the disk that is kept; 0 for no limit.
  """

  name: str
  chip: Chip | None
  topology: str
  n_devices: int
  hours: float = 0.0
  disk: float = 0.0

  @property
  def is_tpu(self) -> bool:
    return self.chip is not None and self.chip.platform == 'tpu'


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
  """A device that is not there: a mesh of these has shapes, no arrays."""

  id: int
  platform: str
  device_kind: str
  compute_capability: float
  process_index: int = 0


# Cloud TPU's names: of v5e and v6e by chips, of v5p by cores, two a chip.
_TOPOLOGIES = {
    **{f'{chip}-{n}': (chip, shape, n) for chip in ('v5e', 'v6e')
       for n, shape in ((1, '1x1'), (4, '2x2'), (8, '2x4'), (16, '4x4'),
                        (32, '4x8'), (64, '8x8'), (128, '8x16'),
                        (256, '16x16'))},
    **{f'v5p-{2 * n}': ('v5p', shape, n)
       for n, shape in ((4, '2x2x1'), (8, '2x2x2'), (16, '2x2x4'),
                        (32, '2x4x4'), (64, '4x4x4'), (128, '4x4x8'))},
}
_SLICES = {
    name: Slice(f'Cloud TPU {name}', CHIPS[chip], f'{chip}:{shape}', n)
    for name, (chip, shape, n) in _TOPOLOGIES.items()}

# A Kaggle notebook: 9 hours of accelerators a session and 19.5 GB that are
# kept, /kaggle/working, as its users report them (github.com/unslothai/unsloth,
# pull request 8439).
_KAGGLE = dict(hours=9.0, disk=19.5e9)

_PLATFORMS = {
    'kaggle-tpu': Slice(
        'Kaggle TPU v5e-8', CHIPS['v5e'], 'v5e:2x4', 8, **_KAGGLE),
    'kaggle-t4x2': Slice('Kaggle T4 x2', CHIPS['t4'], '', 2, **_KAGGLE),
    'cpu': Slice('this machine', None, 'cpu', 0),
    'gpu': Slice('this machine', None, 'gpu', 0),
}
_BY_TOPOLOGY = {place.topology: place for place in _SLICES.values()}


def known() -> tuple[str, ...]:
  """Returns the names that `parse` takes, without the chips' shapes."""
  return (*_PLATFORMS, *_SLICES)


def parse(name: str) -> Slice:
  """Returns the slice of a name: v5e-8, v5e:2x4, kaggle-tpu, cpu, gpu.

  Raises:
    UserError: naming the nearest, and all that are known.
  """
  plain = re.sub('^v5litepod-', 'v5e-', name.strip().lower())
  for table in (_PLATFORMS, _SLICES, _BY_TOPOLOGY):
    if plain in table:
      return table[plain]
  shapes = tuple(_BY_TOPOLOGY)
  raise errors.UserError(
      f'--topology={name}',
      ', '.join(known()) + '; a slice also by its shape: v5e:2x4, v5p:2x2x1',
      errors.nearest(plain, (*known(), *shapes)) + 'Set --topology.')


def absent_devices(place: Slice) -> list[AbsentDevice]:
  """Returns stand-ins for the devices of a slice."""
  chip = place.chip
  return [
      AbsentDevice(i, chip.platform, chip.device_kind, chip.compute_capability)
      for i in range(place.n_devices)]


# Compilers -------------------------------------------------------------------

# The compiler for TPUs. Not a requirement of the package: where it is on the
# import path of a machine without a TPU, every start of JAX looks for one, and
# says on stderr that there is none. launch/libtpu.sh puts it in the cache.
LIBTPU = 'libtpu==0.0.50.*'


def local_memory() -> float:
  """Returns the bytes that a step may have on a device of this machine."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit', 0)
  lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
  available = {line.partition(':')[0]: int(line.split()[1]) * 1024
               for line in lines}['MemAvailable']
  return available / jax.local_device_count()


def devices_of(place: Slice, *, analytic: bool) -> list[Any]:
  """Returns the devices of a slice, as the compiler or a mesh knows them.

  Call it before anything else has made JAX look for devices.

  Args:
    place: From `parse`.
    analytic: Stand-ins will do: nothing is compiled.

  Raises:
    UserError: if libtpu is missing, or there is no GPU here.
  """
  if place.topology != 'gpu':
    # Or JAX would take the accelerators of this machine for itself.
    jax.config.update('jax_platforms', 'cpu')
  if place.chip is None:
    found = jax.devices()
    if found[0].platform != place.topology:
      raise errors.UserError(
          '--topology=gpu', f'a GPU; JAX finds {found[0].device_kind}',
          "install JAX's GPU version: pip install -e '.[cuda]'; or name what"
          ' is to be rented, such as --topology=kaggle-tpu')
    return list(found)
  if analytic or not place.topology:
    return list(absent_devices(place))
  return _tpu_devices(place.topology)


@functools.cache
def _tpu_devices(topology: str) -> list[Any]:
  from jax.experimental import topologies

  os.environ['TPU_LIBRARY_PATH'] = find_libtpu()
  # No TPU is looked for, and nobody is told that there is none.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Compiling takes no TPU, so two processes may.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
  return list(topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices)


def find_libtpu() -> str:
  """Returns the path of libtpu.so.

  Raises:
    UserError: if it is in none of its places.
  """
  places = [os.environ.get('TPU_LIBRARY_PATH', ''),
            str(cache.folder('libtpu', 'libtpu', 'libtpu.so'))]
  spec = importlib.util.find_spec('libtpu')
  if spec is not None and spec.origin:
    places.append(str(pathlib.Path(spec.origin).parent / 'libtpu.so'))
  for path in places:
    if path and os.path.exists(path):
      return path
  raise errors.UserError(
      'the compiler for TPUs, libtpu, is not there',
      f'{places[1]}, or TPU_LIBRARY_PATH',
      'bash launch/libtpu.sh (0.2 GB, no TPU needed); or --analytic for'
      ' figures without a compiler')


def compiler_name(place: Slice) -> str:
  """Returns name and version of what compiles for a slice."""
  if not place.is_tpu:
    return f'XLA of jaxlib {importlib.metadata.version("jaxlib")}'
  folder = pathlib.Path(find_libtpu()).parent.parent
  found = sorted(folder.glob('libtpu-*.dist-info'))
  version = found[-1].name.split('-')[1].removesuffix('.dist') if found else ''
  return f'libtpu {version}'.strip()
