"""Helpers of the notebooks: environment, inputs, time and disk space.

This module runs in the kernel of Kaggle or Colab, so it needs only Python 3.10
and the standard library. gemma_sft has its own environment and runs in separate
processes, each of which releases the accelerator when it ends.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# Limit of the output of a Kaggle notebook; gemma_sft/planning/hardware.py names
# the source.
KEPT_BYTES = 19.5e9
_UV = 'uv==0.13.8'
_ACCELERATORS = {'tpu': ['jax[tpu]'], 'gpu': ['jax[cuda12]'], 'cpu': []}
# Variables of the kernel that are wrong for another Python: Kaggle's modules,
# matplotlib's notebook backend, the libtpu of the image.
_NOT_INHERITED = ('PYTHONPATH', 'PYTHONHOME', 'MPLBACKEND', 'TPU_LIBRARY_PATH')
# Exit status of a training that was stopped and saved before its last update
# (gemma_sft/monitor/stop.py).
UNFINISHED = 75
_STARTED = time.time()


class Stop(Exception):
  """Ends a cell with one line instead of a traceback."""

  def __init__(self, got: str, expected: str, fix: str):
    super().__init__(f'got: {got}; expected: {expected}; fix: {fix}')

  def _render_traceback_(self):  # IPython asks for it by this name.
    return [str(self)]


@dataclasses.dataclass
class Session:
  """A session of a notebook.

  Attributes:
    project: Folder that contains setup.py.
    input: Folder of the attached models, data and outputs.
    output: Folder that is kept when the session ends.
    scratch: Folder with more space that is lost when the session ends.
    hosted: Whether this is Kaggle or Colab.
    python: Interpreter of gemma_sft's environment; `install` sets it.
  """

  project: str
  input: str
  output: str
  scratch: str
  hosted: bool
  python: str = ''

  # The environment ------------------------------------------------------------

  def install(self, accelerator: str) -> None:
    """Makes gemma_sft's environment with the versions of requirements.txt.

    If the kernel's Python has gemma_sft installed, that Python is used instead.
    `accelerator` is tpu, gpu or cpu.
    """
    if accelerator not in _ACCELERATORS:
      raise Stop(f'ACCELERATOR={accelerator!r}', 'tpu, gpu or cpu',
                 'correct the first cell')
    try:
      importlib.metadata.version('gemma_sft')
      self.python = sys.executable
      print(f'gemma_sft is installed in {self.python}')
      return
    except importlib.metadata.PackageNotFoundError:
      pass
    venv = os.path.join(self.scratch, 'venv')
    self.python = os.path.join(venv, 'bin', 'python')
    done = os.path.join(venv, f'.installed-{accelerator}')
    if os.path.exists(done):
      print(f'{venv} exists already')
      return
    start = time.time()
    uv = [sys.executable, '-m', 'uv']
    pins = [f'--constraint={self.project}/launch/{name}/requirements.txt'
            for name in ('gpu', 'kaggle')]
    for command in (
        [sys.executable, '-m', 'pip', 'install', '--quiet', _UV],
        # uv downloads this Python if the machine lacks it.
        [*uv, 'venv', '--quiet', '--clear', '--python=3.12', venv],
        [*uv, 'pip', 'install', '--quiet', f'--python={self.python}', *pins,
         '--editable', f'{self.project}[base,export]',
         *_ACCELERATORS[accelerator]]):
      self.execute(command)
    pathlib.Path(done).touch()
    print(f'installed in {time.time() - start:.0f} s')

  def run(self, entry_point: str, *arguments: str) -> None:
    """Runs `python -m gemma_sft.ENTRY_POINT ARGUMENTS` with `execute`."""
    command = ['-m', f'gemma_sft.{entry_point}', *arguments]
    print('$ ' + shlex.join(['python', *command]), flush=True)
    self.execute([self.python, *command])

  def execute(self, command: list) -> None:
    """Runs a command in the project's folder and shows its output.

    Interrupting the cell sends a SIGTERM, on which training saves.

    Raises:
      Stop: if it fails or is interrupted.
    """
    environment = {key: value for key, value in os.environ.items()
                   if key not in _NOT_INHERITED}
    environment['PYTHONUNBUFFERED'] = '1'
    if self.hosted:
      environment.setdefault(
          'GEMMA_SFT_CACHE', os.path.join(self.scratch, 'cache'))
    process = subprocess.Popen(
        command, cwd=self.project, env=environment, text=True, errors='replace',
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    try:
      for line in process.stdout:
        print(line, end='', flush=True)
      status = process.wait()
    except KeyboardInterrupt:
      process.send_signal(signal.SIGTERM)
      print(process.communicate()[0], end='', flush=True)
      raise Stop('an interrupt', 'a command that ends by itself',
                 'run this cell again: training continues') from None
    if status not in (0, UNFINISHED):
      raise Stop(f'status {status} of {shlex.join(command[:3])}', 'status 0',
                 'read its last lines above')

  # Inputs ---------------------------------------------------------------------

  def weights(self, wanted: str) -> str:
    """Returns the value of config.model.weights.

    Args:
      wanted: 'attached' for the one model among the inputs; 'kagglehub:' and a
        handle, such as kagglehub:google/gemma-3/flax/gemma3-1b-it; or any value
        of config.model.weights.
    """
    if wanted.startswith('kagglehub:'):
      import kagglehub  # Part of the kernels of Kaggle and Colab.

      return kagglehub.model_download(wanted.removeprefix('kagglehub:'))
    if wanted != 'attached':
      return wanted
    found = _find_models(self.input)
    if len(found) != 1:
      raise Stop(
          ' '.join([f'{len(found)} models under {self.input}', *found]), 'one',
          'attach one under "Add input", Models, or set WEIGHTS in the first'
          ' cell')
    return found[0]

  def restore(self, run: str) -> str:
    """Returns the workdir of a run, with the files of an earlier session.

    If the output still has the workdir, it is used as it is. Otherwise the copy
    with the newest checkpoint is taken from the attached outputs, if any.
    """
    workdir = os.path.join(self.output, run)
    copied = ''
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
      earlier = [folder for folder, folders, files in os.walk(self.input)
                 if os.path.basename(folder) == run and 'config.json' in files
                 and 'checkpoints' in folders]
      if not earlier:
        print(f'{workdir} is a new run')
        return workdir
      newest = max(earlier, key=_newest_step)
      _copy(newest, workdir)
      copied = f'; copied from {newest}'
    print(f'{workdir} continues after {_newest_step(workdir)} updates{copied}')
    return workdir

  # Time and disk --------------------------------------------------------------

  def minutes_left(self, hours: float, reserve: float) -> float:
    """Returns the minutes that training may take.

    Args:
      hours: Length of the whole session.
      reserve: Minutes to keep for the scores and the export.
    """
    start = _container_start() if self.hosted else _STARTED
    used = (time.time() - start) / 60
    left = 60 * hours - used - reserve
    if left <= 0:
      raise Stop(f'{used:.0f} minutes of this session have passed',
                 f'fewer than {60 * hours - reserve:.0f}',
                 'start a new session, which continues the run')
    print(f'{used:.0f} minutes of this session have passed; training saves and'
          f' stops after {left:.0f} more')
    return left

  def finished(self, workdir: str) -> bool:
    """Whether a run has taken its last update; prints what to do if not."""
    path = pathlib.Path(workdir, 'run.json')
    end = json.loads(path.read_text('utf-8'))['end']
    if end and end['finished']:
      return True
    print('The run is not finished, so there are no scores and no export yet.'
          ' Start a new session with the output of this one as its input.')
    return False

  def keep(self, folder: str, limit: float = KEPT_BYTES) -> str:
    """Copies a folder to the output and returns the copy.

    A copy that an earlier call made is replaced.

    Raises:
      Stop: if the output would then have more than `limit` bytes.
    """
    kept = os.path.join(self.output, os.path.basename(folder))
    added, present = _bytes(folder), _bytes(self.output) - _bytes(kept)
    if added + present > limit:
      raise Stop(
          f'{added / 1e9:.2f} GB and {present / 1e9:.2f} GB in {self.output}',
          f'{limit / 1e9:.1f} GB together',
          f'choose fewer FORMATS, or remove files; {folder} exists until the'
          ' session ends')
    _copy(folder, kept)
    print(f'{kept}: {added / 1e9:.2f} GB; {self.output} has'
          f' {(added + present) / 1e9:.2f} of {limit / 1e9:.1f} GB')
    return kept

  # Pictures -------------------------------------------------------------------

  def show_report(self, workdir: str) -> None:
    """Shows the loss curves and the table of the last evaluation."""
    from IPython import display  # Part of the kernel.

    report = pathlib.Path(workdir, 'report')
    text, *_ = report.joinpath('report.md').read_text('utf-8').partition('![')
    display.display(display.Image(filename=str(report / 'training.png')),
                    display.Markdown(text))


def begin(project: str, input: str = '', output: str = '') -> Session:
  """Returns the session of this machine: Kaggle, Colab or your own.

  Args:
    project: Folder of the project.
    input: Folder of the inputs; '' takes the usual one of the machine.
    output: Folder of the output; '' takes the usual one of the machine.
  """
  scratch = os.path.join(tempfile.gettempdir(), 'gemma_sft')
  hosted = True
  if os.path.isdir('/kaggle/working'):
    usual = '/kaggle/input', '/kaggle/working'
  elif os.path.isdir('/content'):
    drive = '/content/drive/MyDrive'
    usual = '/content/input', os.path.join(
        drive if os.path.isdir(drive) else '/content', 'gemma_sft_output')
  else:
    hosted = False
    usual = (os.path.join(project, 'workdirs', 'input'),
             os.path.join(project, 'workdirs', 'notebook'))
  session = Session(
      project, input or usual[0], output or usual[1], scratch, hosted)
  os.makedirs(session.output, exist_ok=True)
  os.makedirs(scratch, exist_ok=True)
  return session


def _container_start() -> float:
  """Returns the start of process 1, and so of the session; see proc(5)."""
  with open('/proc/1/stat', encoding='utf-8') as file:
    # The second field, a name in brackets, may contain spaces.
    ticks = int(file.read().rpartition(')')[2].split()[19])
  with open('/proc/uptime', encoding='utf-8') as file:
    uptime = float(file.read().split()[0])
  return time.time() - uptime + ticks / os.sysconf('SC_CLK_TCK')


def _find_models(root: str) -> list:
  """Returns the models under a folder: Orbax, safetensors or GGUF."""
  found = []
  for folder, folders, files in os.walk(root):
    if {'_METADATA', 'manifest.ocdbt'} & set(files) or any(
        name.endswith('.safetensors') for name in files):
      found.append(folder)
      folders.clear()
      continue
    found += [os.path.join(folder, name) for name in files
              if name.endswith('.gguf')]
    # Checkpoints and exports of earlier runs are not base models.
    folders[:] = sorted(set(folders) - {'checkpoints', 'export'})
  return sorted(found)


def _newest_step(workdir: str) -> int:
  names = os.listdir(os.path.join(workdir, 'checkpoints'))
  return max([int(name) for name in names if name.isdigit()], default=-1)


def _copy(source: str, target: str) -> None:
  """Copies a folder; `target` exists only once the copy is complete."""
  partial = target + '.partial'
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(source, partial)
  shutil.rmtree(target, ignore_errors=True)
  os.rename(partial, target)


def _bytes(folder: str) -> int:
  return sum(os.path.getsize(os.path.join(parent, name))
             for parent, _, names in os.walk(folder) for name in names)
