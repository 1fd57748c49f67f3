"""Copies a run's metrics, config and record to Weights & Biases.

config.track.wandb names the project. The package is an extra (`pip install
gemma_sft[wandb]`) with its own login and variables (WANDB_MODE=offline,
WANDB_BASE_URL, ...). Numbers and the record are sent, but no files, code or
host names. A failing network never stops a training run.
"""

import hashlib
from typing import Any
from typing import Mapping

import flax.traverse_util
import jax

from gemma_sft import errors
from gemma_sft.monitor import scrub
from gemma_sft.run import hosts

# Seconds. A run that cannot be registered is kept on the disk, and so is what
# has not been sent when training ends.
_INIT_TIMEOUT = 30.0
_FINISH_TIMEOUT = 60.0


def check(target: str) -> None:
  """Checks, without a prompt, that a run can be tracked.

  `target` is 'project', 'entity/project', or '' for none. Raises `UserError` if
  the package is missing or nobody is logged in.
  """
  if not target or jax.process_index() != 0:
    return
  wandb = _import(target)
  wandb.setup(settings=_settings(wandb))
  if wandb.setup().settings.mode != 'online':
    return
  try:
    # From the environment or .netrc; no prompt, and no request to a server.
    logged_in = wandb.login(prompt=False, verify=False)
  except wandb.Error as error:
    raise _no_login(target, scrub.scrub(str(error), paths=False)) from None
  if not logged_in:
    raise _no_login(target, 'no login of Weights & Biases was found')


def start(target: str, record: Any) -> 'Mirror | None':
  """Returns the copy of a run at Weights & Biases, or None without one.

  A run that is resumed is the same run there. `record` is a `RunRecord`. Raises
  `UserError` if the login is refused.
  """
  if not target or not record.active:
    return None
  wandb = _import(target)
  first = record.contents['starts'][0]
  entity, _, project = target.rpartition('/')
  shown = scrub.scrub(record.contents)
  options = dict(
      project=project, entity=entity or None, dir=record.workdir,
      id=hashlib.sha256(
          f'{first["time"]} {first["identity"]}'.encode()).hexdigest()[:16],
      name=record.name, config=flax.traverse_util.unflatten_dict(
          shown.pop('config'), sep='.') | {'run': shown},
      resume='allow', allow_val_change=True, settings=_settings(wandb))
  # An offline run is merged with earlier starts when it is sent.
  for offline in ({}, {'mode': 'offline'}):
    try:
      if offline:
        wandb.teardown()  # The failed run still holds the id.
      run = wandb.init(**options | offline)
    except Exception as error:  # Network, disk or service may raise anything.
      if not offline and isinstance(error, (
          wandb.errors.AuthenticationError, wandb.errors.UsageError)):
        raise _no_login(target, scrub.scrub(str(error), paths=False)) from None
      hosts.say(f'warning: Weights & Biases: {_short(error)}')
      continue
    hosts.say('tracked on the disk; to send it: wandb sync '
              + run.settings.sync_dir if run.offline else f'tracked: {run.url}')
    return Mirror(run, record)
  hosts.say('the run is not tracked at Weights & Biases; metrics.jsonl has all')
  return None


class Mirror:
  """Sends what `metrics.Writer` writes to a run of `wandb.init`."""

  def __init__(self, run: Any, record: Any):
    self._run, self._record = run, record
    self._failed = False

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends the numbers of a step; a step that was sent before is ignored."""
    self._attempt(lambda: self._run.log(dict(values), step=step))

  def close(self) -> None:
    """Sends how the run ended; waits, for a limited time, until all is sent."""
    end = scrub.scrub(self._record.contents['end'] or {})
    self._attempt(lambda: self._run.summary.update({'end': end}))
    self._attempt(self._run.finish)

  def _attempt(self, send):
    try:
      send()
    except Exception as error:  # It must not end the training run.
      if not self._failed:
        self._failed = True
        hosts.say(f'warning: Weights & Biases: {_short(error)}; training'
                  ' continues, and metrics.jsonl has everything')


def _import(target):
  try:
    import wandb

    if hasattr(wandb, 'init'):
      return wandb
    # What was imported is a folder named wandb, as the package writes them.
    why = 'the package wandb is not installed'
  except ImportError as error:
    why = f'wandb cannot be imported ({error})'
  raise errors.UserError(
      f'config.track.wandb is {target!r}, but {why}', 'the package wandb',
      'pip install wandb, or set --config.track.wandb=')


def _settings(wandb):
  return wandb.Settings(
      silent=True, console='off', host='', init_timeout=_INIT_TIMEOUT,
      finish_timeout=_FINISH_TIMEOUT, disable_git=True, disable_code=True,
      save_code=False, x_disable_meta=True, x_disable_machine_info=True,
      x_save_requirements=False)


def _no_login(target, got):
  return errors.UserError(
      f'config.track.wandb is {target!r}: {got}', 'a login, or offline mode',
      'run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline keeps the run'
      ' on the disk; --config.track.wandb= tracks nothing there')


def _short(error):
  text = scrub.scrub(str(error) or repr(error), paths=False)
  return ' '.join(text.split())[:200]
