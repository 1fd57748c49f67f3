"""The accelerators that people rent: memory, speed, devices and compilers.

A step is planned for a `Slice` (`parse`), on its devices (`devices_of`), which
need not exist here: for arithmetic they are stand-ins with a name, for the
compiler they come from libtpu, which compiles for TPUs without one.

The memory of a chip is what it leaves to programs. For TPUs that is the figure
that libtpu 0.0.50.1 prints when a program asks for too much ("exceeds available
HBM (15.75G)"); for the T4 three quarters of 15,360 MiB, which JAX takes unless
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
  """One device of an accelerator."""

  name: str
  device_kind: str  # As JAX calls it.
  platform: str  # 'tpu' or 'gpu'.
  memory: float  # Bytes that programs may use.
  bandwidth: float  # Bytes per second of its memory.
  compute_capability: float = 0.0  # Of an NVIDIA GPU.

  @property
  def peak_flops(self) -> float:
    """Dense FLOP/s in the dtype that a run computes in there."""
    return metrics.PEAK_FLOPS[self.name]


CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 16 GB, 819 GB/s.
    'v5e': Chip('TPU v5e', 'TPU v5 lite', 'tpu', 15.75 * _GIB, 819e9),
    # cloud.google.com/tpu/docs/v5p: 95 GB, 2,765 GB/s. Two cores, one device.
    'v5p': Chip('TPU v5p', 'TPU v5', 'tpu', 95.73 * _GIB, 2765e9),
    # cloud.google.com/tpu/docs/v6e: 32 GB, 1,640 GB/s.
    'v6e': Chip('TPU v6e', 'TPU v6 lite', 'tpu', 31.24 * _GIB, 1640e9),
    # NVIDIA's data sheet: 320 GB/s, 65 TFLOP/s in float16, the dtype of
    # products there: the card has no bfloat16 (`devices.choose_dtype`).
    't4': Chip('Tesla T4', 'Tesla T4', 'gpu', 0.75 * 15 * _GIB, 320e9, 7.5),
}


# Slices ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices that are rented together, or those of this machine."""

  name: str
  chip: Chip | None  # None for this machine.
  # libtpu's name, such as 'v5e:2x4'; 'cpu' or 'gpu' for this machine; '' where
  # no compiler is available.
  topology: str
  n_devices: int  # 0 for this machine, whose devices are counted when needed.
  hours: float = 0.0  # Longest session; 0 for no limit.
  disk: float = 0.0  # Bytes of the disk that outlives a session; 0: no limit.


# Cloud TPU counts chips in the names of v5e and v6e, cores (two a chip) in v5p.
_SHAPES = {
    **{f'{chip}-{n}': (chip, shape, n) for chip in ('v5e', 'v6e')
       for n, shape in ((1, '1x1'), (4, '2x2'), (8, '2x4'), (16, '4x4'),
                        (32, '4x8'), (64, '8x8'), (128, '8x16'),
                        (256, '16x16'))},
    **{f'v5p-{2 * n}': ('v5p', shape, n)
       for n, shape in ((4, '2x2x1'), (8, '2x2x2'), (16, '2x2x4'),
                        (32, '2x4x4'), (64, '4x4x4'), (128, '4x4x8'))},
}
_CLOUD = {name: Slice(f'Cloud TPU {name}', CHIPS[chip], f'{chip}:{shape}', n)
          for name, (chip, shape, n) in _SHAPES.items()}

# A Kaggle notebook: 9 hours of accelerators a session, and 19.5 GB that stay in
# /kaggle/working, as its users report (github.com/unslothai/unsloth, pull
# request 8439).
_KAGGLE = dict(hours=9.0, disk=19.5e9)

# By the names that `parse` takes, besides topologies like v5e:2x4.
SLICES = {
    'kaggle-tpu': Slice(
        'Kaggle TPU v5e-8', CHIPS['v5e'], 'v5e:2x4', 8, **_KAGGLE),
    'kaggle-t4x2': Slice('Kaggle T4 x2', CHIPS['t4'], '', 2, **_KAGGLE),
    'cpu': Slice('this machine', None, 'cpu', 0),
    'gpu': Slice('this machine', None, 'gpu', 0),
    **_CLOUD,
}
_BY_TOPOLOGY = {target.topology: target for target in _CLOUD.values()}


def parse(name: str) -> Slice:
  """Returns the slice of a name: v5e-8, v5e:2x4, kaggle-tpu, cpu, gpu.

  Raises:
    UserError: for an unknown name, with the nearest and all known ones.
  """
  plain = re.sub('^v5litepod-', 'v5e-', name.strip().lower())
  names = SLICES | _BY_TOPOLOGY
  if plain in names:
    return names[plain]
  raise errors.UserError(
      f'--topology={name}',
      ', '.join(SLICES) + '; a slice also by its shape: v5e:2x4, v5p:2x2x1',
      errors.nearest(plain, tuple(names)) + 'Set --topology.')


# Devices ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
  """A stand-in for a device: a mesh of these has shapes, but no arrays."""

  id: int
  platform: str
  device_kind: str
  compute_capability: float
  process_index: int = 0


def absent_devices(target: Slice) -> list[AbsentDevice]:
  """Returns stand-ins for the devices of a slice."""
  chip = target.chip
  return [
      AbsentDevice(i, chip.platform, chip.device_kind, chip.compute_capability)
      for i in range(target.n_devices)]


def devices_of(target: Slice, *, analytic: bool) -> list[Any]:
  """Returns the devices of a slice, for a mesh or a compiler.

  Call it before anything else has made JAX look for devices. With `analytic`
  nothing will be compiled, so stand-ins are enough.

  Raises:
    UserError: if libtpu is missing, or there is no GPU here.
  """
  if target.topology != 'gpu':
    # Otherwise JAX would occupy the accelerators of this machine.
    jax.config.update('jax_platforms', 'cpu')
  if target.chip is None:
    found = jax.devices()
    if found[0].platform != target.topology:
      raise errors.UserError(
          '--topology=gpu', f'a GPU; JAX finds {found[0].device_kind}',
          "install JAX's GPU version: pip install -e '.[cuda]'; or name what"
          ' you want to rent, such as --topology=kaggle-tpu')
    return list(found)
  if analytic or not target.topology:
    return absent_devices(target)
  return _tpu_devices(target.topology)


@functools.cache
def _tpu_devices(topology: str) -> list[Any]:
  from jax.experimental import topologies

  os.environ['TPU_LIBRARY_PATH'] = find_libtpu()
  # libtpu does not look for a TPU, and does not warn that there is none.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Compiling occupies no TPU, so two processes may load the library.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
  return list(topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices)


def local_memory() -> float:
  """Returns the bytes that a step may use on one device of this machine."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit', 0)
  found = re.search(
      r'MemAvailable: *(\d+)', pathlib.Path('/proc/meminfo').read_text())
  return int(found[1]) * 1024 / jax.local_device_count()


# Compilers -------------------------------------------------------------------


def find_libtpu() -> str:
  """Returns the path of libtpu.so; a UserError says how to install it.

  launch/libtpu.sh puts it into the cache. If it were on the import path of a
  machine without a TPU, JAX would look for one at each start and warn.
  """
  cached = str(cache.folder('libtpu', 'libtpu', 'libtpu.so'))
  candidates = [os.environ.get('TPU_LIBRARY_PATH', ''), cached]
  spec = importlib.util.find_spec('libtpu')
  if spec is not None and spec.origin:
    candidates.append(str(pathlib.Path(spec.origin).parent / 'libtpu.so'))
  for path in candidates:
    if path and os.path.exists(path):
      return path
  raise errors.UserError(
      'the compiler for TPUs, libtpu, is not installed',
      f'{cached}, or TPU_LIBRARY_PATH',
      'bash launch/libtpu.sh (0.2 GB, no TPU needed); or --analytic for an'
      ' estimate without a compiler')


def compiler_name(target: Slice) -> str:
  """Returns the name and version of the compiler for a slice."""
  if target.chip is None:
    return f'XLA of jaxlib {importlib.metadata.version("jaxlib")}'
  folder = pathlib.Path(find_libtpu()).parent.parent
  found = sorted(p.name for p in folder.glob('libtpu-*.dist-info'))
  name = found[-1].removesuffix('.dist-info') if found else 'libtpu'
  return name.replace('-', ' ')
