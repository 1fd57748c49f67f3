"""Devices to plan for, there or not, and the compiler that knows them."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
from typing import Any

import jax

from gemma_sft import cache
from gemma_sft import errors
from gemma_sft import slices

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


def devices_of(place: slices.Slice, *, analytic: bool) -> list[Any]:
  """Returns the devices of a slice, as the compiler or a mesh knows them.

  Call it before anything else has made JAX look for devices.

  Args:
    place: From `slices.parse`.
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
    return list(slices.absent_devices(place))
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


def compiler_name(place: slices.Slice) -> str:
  """Returns name and version of what compiles for a slice."""
  if not place.is_tpu:
    return f'XLA of jaxlib {importlib.metadata.version("jaxlib")}'
  folder = pathlib.Path(find_libtpu()).parent.parent
  found = sorted(folder.glob('libtpu-*.dist-info'))
  version = found[-1].name.split('-')[1].removesuffix('.dist') if found else ''
  return f'libtpu {version}'.strip()
