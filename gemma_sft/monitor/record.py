"""workdir/run.json: the inputs of a run, its starts, and how it ended.

    identity        hash of all that decides the result, see `identity`
    config, seed    flat config
    base, data      content hashes of the base and of each split's records
    total_steps, trained_weights, base_weights
    starts          one per start or resume: identity, time, step, seconds,
                    command, commit, dirty, packages, python, devices, hosts
    end             null while it runs or after a kill: time, step, reason
                    (finished, patience, deadline or signal), finished, seconds
                    of all starts, tokens_per_second (median), peak_bytes

It contains paths of the machine, which the summary in an export leaves out
(`exports/summary.py`).
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any
from typing import Mapping
from typing import Sequence

import jax

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import pages
from gemma_sft.monitor import metrics
from gemma_sft.monitor import scrub
from gemma_sft.run import hosts

# Packages whose versions may change what training computes.
PACKAGES = (
    'gemma_sft', 'jax', 'jaxlib', 'jax-cuda12-plugin', 'jax-cuda13-plugin',
    'libtpu', 'numpy', 'flax', 'optax', 'gemma', 'grain', 'orbax-checkpoint',
    'sentencepiece')
_FILE = 'run.json'


def identity(config_leaves: Mapping[str, Any], base_hash: str,
             data_hashes: Mapping[str, str]) -> str:
  """Returns 16 hex digits over everything that decides a run's result.

  Two runs of one identity differ at most by rounding, for example on another
  mesh or device. Logging, checkpoints, deadlines and paths do not count.
  `data_hashes` is {split: `splits.data_hash`} of the splits that are set.
  """
  # Hashed under the old names, so that renaming a key changes no identity.
  first_names = {new: old for old, new in config_lib.RENAMED.items()}
  decisive = {first_names.get(key, key): value for key, value in
              config_lib.result_leaves(config_leaves).items()}
  text = json.dumps([decisive, base_hash, dict(data_hashes)], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(workdir: str) -> dict[str, Any] | None:
  """Returns a run's record; None for an older run, which has none."""
  path = os.path.join(workdir, _FILE)
  try:
    with open(path, encoding='utf-8') as file:
      record = json.load(file)
    record['identity'], record['starts'], record['end']
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
        f'{path} cannot be read: {error!r}', 'the record that training wrote',
        'move it away: the run then resumes without its earlier starts'
    ) from None
  return record


class RunRecord:
  """Keeps workdir/run.json and config.json while a run is in progress.

  It is `active`, and has `contents`, on the first host only, and only if the
  run was not over before this start.
  """

  def __init__(self, run: Any, step: int, *, resumed: bool):
    """Records a start after `step` updates.

    If the run was over before this start, prints so and leaves run.json as it
    is, as does `end`. `resumed` says whether a checkpoint was restored.
    """
    self._run, self.workdir = run, run.workdir
    self.name = os.path.basename(os.path.abspath(run.workdir))
    self.active = jax.process_index() == 0
    if not self.active:
      return
    hashes = {name: split.data_hash for name, split in run.splits.items()}
    leaves = dict(config_lib.leaves(run.config))
    trained, base = run.initial_state.trainable, run.base
    # Imported here because records are read and compared without the library.
    from gemma_sft import model as model_lib

    self.contents = {
        'identity': identity(leaves, run.base_hash, hashes),
        'config': leaves, 'seed': run.config.seed, 'base': run.base_hash,
        'data': hashes, 'total_steps': run.total_steps,
        'trained_weights': model_lib.count_params(trained),
        'base_weights': model_lib.count_params(
            trained if base is None else base),
        'starts': [], 'end': None}
    before = read(run.workdir)
    _write(run.workdir, 'config.json', config_lib.to_json(run.config))
    same = before and before['identity'] == self.contents['identity']
    end = before['end'] if before else None
    if same and resumed and end and end['finished'] and end['step'] == step:
      self.active = False
      hosts.say(f'{_FILE}: this run ended on {end["time"]} ({end["reason"]});'
                ' its record stays')
      return
    self._peak = 0
    if before and (resumed or same and not end):
      self.contents['starts'] = before['starts']
      self._peak = (end or {}).get('peak_bytes', 0)
      _time_killed(before['starts'], run.workdir)
    self.contents['starts'].append({
        'identity': self.contents['identity'], **_start(step, run.started)})
    self._save()

  def end(self, step: int, reason: str) -> None:
    """Records the end of a start; `reason` is one of the module's docstring."""
    if not self.active:
      return
    starts = self.contents['starts']
    starts[-1]['seconds'] = round(time.time() - self._run.started, 1)
    speeds = [row['tokens_per_second'] for row in _rows(self._run.workdir)
              if 'tokens_per_second' in row]
    self.contents['end'] = {
        'time': _iso(time.time()), 'step': step, 'reason': reason,
        'finished': reason in ('finished', 'patience'),
        # Older starts may have none.
        'seconds': round(sum(start['seconds'] or 0 for start in starts), 1),
        'tokens_per_second': statistics.median(speeds) if speeds else None,
        'peak_bytes': max(self._peak, _peak_bytes())}
    self._save()

  def _save(self):
    _write(self._run.workdir, _FILE, json.dumps(
        scrub.scrub(self.contents, paths=False), indent=1, ensure_ascii=False))


def _start(step, began):
  revision, dirty = commit()
  device = jax.devices()[0]
  return {
      'time': _iso(began), 'step': step, 'seconds': None,
      'command': _command(), 'commit': revision, 'dirty': dirty,
      'packages': packages(), 'python': platform.python_version(),
      'devices': {'platform': device.platform, 'kind': device.device_kind,
                  'count': jax.device_count()},
      'hosts': jax.process_count()}


def _time_killed(starts, workdir):
  """Fills in how long a killed start ran: until its last line of metrics."""
  if not starts or starts[-1]['seconds'] is not None:
    return
  began = datetime.datetime.fromisoformat(starts[-1]['time']).timestamp()
  last = max((row['time'] for row in _rows(workdir)), default=began)
  starts[-1]['seconds'] = round(max(0.0, last - began), 1)


def _rows(workdir):
  return metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))


def _iso(seconds):
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(
      timespec='milliseconds')


def _command():
  # `python -m` replaces the module's name with the path of its file.
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  head = ['python', '-m', spec.name] if spec else [
      'python', os.path.basename(sys.argv[0])]
  return [*head, *sys.argv[1:]]


def _peak_bytes():
  """Returns the peak memory of a device, or of the process on a CPU."""
  peaks = [(device.memory_stats() or {}).get('peak_bytes_in_use', 0)
           for device in jax.local_devices()]
  if max(peaks):
    return max(peaks)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def _write(workdir, name, text):
  path = os.path.join(workdir, name)
  try:
    pages.write(path, text)
  except OSError as error:
    raise errors.UserError(
        f'{path} cannot be written: {error.strerror}', 'room on the disk',
        'make room and start the same command again: it resumes from the last'
        ' checkpoint') from error


def commit() -> tuple[str, bool]:
  """Returns the commit of this code, and whether its files differ from it.

  ('', False) without git, and where the repository around this package does not
  track it, such as in the environment of another project.
  """
  try:
    _git('ls-files', '--error-unmatch', '__init__.py')
    changed = _git('status', '--porcelain', '--', '.')
    return _git('rev-parse', 'HEAD'), bool(changed)
  except (OSError, subprocess.SubprocessError):
    return '', False


def _git(*arguments):
  package = pathlib.Path(__file__).parents[1]
  return subprocess.run(
      ['git', '--no-optional-locks', '-C', str(package), *arguments],
      capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def packages(names: Sequence[str] = PACKAGES) -> dict[str, str]:
  """Returns the versions of the packages that are installed."""
  versions = {}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions
