"""What the notebooks of this folder do besides running gemma_sft.

The standard library alone, for Python 3.10 and newer: this runs in the kernel
that Kaggle or Colab brings, whose packages stay as they are. gemma_sft has an
environment of its own and runs in processes, each of which gives the
accelerator back when it ends.
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

# What a version of a Kaggle notebook keeps; gemma_sft/planning/hardware.py has
# its source.
KEPT_BYTES = 19.5e9
_UV = 'uv==0.13.8'
_ACCELERATORS = {'tpu': ['jax[tpu]'], 'gpu': ['jax[cuda12]'], 'cpu': []}
# Of the kernel, and wrong for another Python: Kaggle's own modules, a backend
# of matplotlib that draws into the notebook, the image's own libtpu.
_NOT_INHERITED = ('PYTHONPATH', 'PYTHONHOME', 'MPLBACKEND', 'TPU_LIBRARY_PATH')
# Of a training that has saved before its last update
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
  """A notebook's session.

  Attributes:
    project: Folder of the project, with setup.py.
    input: Folder below which attached models, data and outputs lie.
    output: Folder that outlives the session.
    scratch: Folder that does not, and has more room.
    hosted: Whether this is Kaggle or Colab.
    python: Interpreter of gemma_sft's environment, once `install` has run.
  """

  project: str
  input: str
  output: str
  scratch: str
  hosted: bool
  python: str = ''

  # The environment ------------------------------------------------------------

  def install(self, accelerator: str) -> None:
    """Makes gemma_sft's environment, in the versions of requirements.txt.

    Where it is installed in the kernel's own Python, that one is taken.

    Args:
      accelerator: tpu, gpu or cpu.
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
      print(f'{venv} is there already')
      return
    start = time.time()
    uv = [sys.executable, '-m', 'uv']
    pins = [f'--constraint={self.project}/launch/{name}/requirements.txt'
            for name in ('gpu', 'kaggle')]
    for command in (
        [sys.executable, '-m', 'pip', 'install', '--quiet', _UV],
        # uv brings this Python along where there is none.
        [*uv, 'venv', '--quiet', '--clear', '--python=3.12', venv],
        [*uv, 'pip', 'install', '--quiet', f'--python={self.python}', *pins,
         '--editable', f'{self.project}[base,export]',
         *_ACCELERATORS[accelerator]]):
      self.execute(command)
    pathlib.Path(done).touch()
    print(f'installed in {time.time() - start:.0f} s')

  def run(self, entry_point: str, *arguments: str) -> None:
    """Runs `python -m gemma_sft.ENTRY_POINT ARGUMENTS`; shows what it prints.

    Raises:
      Stop: if it fails.
    """
    print('$ ' + shlex.join(
        ['python', '-m', f'gemma_sft.{entry_point}', *arguments]), flush=True)
    self.execute([self.python, '-m', f'gemma_sft.{entry_point}', *arguments])

  def execute(self, command: list) -> None:
    """Runs a command in the project's folder; shows what it prints.

    An interrupt of the cell becomes a SIGTERM, on which training saves.

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
                 'run this cell again: training goes on from there') from None
    if status not in (0, UNFINISHED):
      raise Stop(f'status {status} of {shlex.join(command[:3])}', 'status 0',
                 'its last lines stand above this one')

  # Inputs ---------------------------------------------------------------------

  def weights(self, wanted: str) -> str:
    """Returns what config.model.weights takes.

    Args:
      wanted: 'attached' for the one model among the inputs; 'kagglehub:' and a
        handle, such as kagglehub:google/gemma-3/flax/gemma3-1b-it; or what the
        key takes itself.
    """
    if wanted.startswith('kagglehub:'):
      import kagglehub  # Kaggle and Colab have it.

      return kagglehub.model_download(wanted.removeprefix('kagglehub:'))
    if wanted != 'attached':
      return wanted
    found = _find_models(self.input)
    if len(found) != 1:
      raise Stop(
          f'{len(found)} models below {self.input}'
          + ''.join(f' {path}' for path in found), 'one',
          'attach it under "Add input", Models, or name one as WEIGHTS in the'
          ' first cell')
    return found[0]

  def bring_back(self, run: str) -> str:
    """Returns the workdir of a run, with what an earlier session left of it.

    That is in its place if the session's files were kept, or below the inputs
    if the last version's output is attached; then the copy with the newest
    checkpoint is taken.

    Args:
      run: Name of the workdir.
    """
    workdir = os.path.join(self.output, run)
    if os.path.isdir(os.path.join(workdir, 'checkpoints')):
      print(f'{workdir} goes on after {_newest_step(workdir)} updates')
      return workdir
    earlier = [folder for folder, folders, files in os.walk(self.input)
               if os.path.basename(folder) == run and 'config.json' in files
               and 'checkpoints' in folders]
    if not earlier:
      print(f'{workdir} begins')
      return workdir
    newest = max(earlier, key=_newest_step)
    _copy(newest, workdir)
    print(f'{workdir} goes on after {_newest_step(workdir)} updates; copied'
          f' from {newest}')
    return workdir

  # Time and disk --------------------------------------------------------------

  def minutes_left(self, hours: float, reserve: float) -> float:
    """Returns the minutes that training may take.

    Args:
      hours: Of the whole session.
      reserve: Minutes to keep for the scores and the export.
    """
    began = _container_start() if self.hosted else _STARTED
    used = (time.time() - began) / 60
    left = 60 * hours - used - reserve
    if left <= 0:
      raise Stop(f'{used:.0f} minutes of this session are over',
                 f'fewer than {60 * hours - reserve:.0f}',
                 'begin a new session; the run goes on there')
    print(f'{used:.0f} minutes of this session are over; training has'
          f' {left:.0f}, then it saves')
    return left

  def finished(self, workdir: str) -> bool:
    """Whether a run has taken its last update; says what to do if not."""
    path = pathlib.Path(workdir, 'run.json')
    end = json.loads(path.read_text('utf-8'))['end']
    if end and end['finished']:
      return True
    print('The run is not finished: the scores and the export come with the'
          ' session that ends it. Begin a new one, with the output of this one'
          ' attached as its input.')
    return False

  def keep(self, folder: str, limit: float = KEPT_BYTES) -> str:
    """Copies a finished folder to the output, if the output then fits.

    Args:
      folder: Whose name it keeps; what stood under that name goes.
      limit: Bytes that the output may have.

    Returns:
      The copy.
    """
    kept = os.path.join(self.output, os.path.basename(folder))
    more, there = _bytes(folder), _bytes(self.output) - _bytes(kept)
    if more + there > limit:
      raise Stop(
          f'{more / 1e9:.2f} GB beside {there / 1e9:.2f} GB in {self.output}',
          f'{limit / 1e9:.1f} GB together',
          f'fewer FORMATS, or remove something; all of it is in {folder} until'
          ' the session ends')
    _copy(folder, kept)
    print(f'{kept}: {more / 1e9:.2f} GB; {self.output} has'
          f' {(more + there) / 1e9:.2f} of {limit / 1e9:.1f} GB')
    return kept

  # Pictures -------------------------------------------------------------------

  def show_report(self, workdir: str) -> None:
    """Shows the loss curves and the table of the last evaluation."""
    from IPython import display  # Of the kernel.

    report = pathlib.Path(workdir, 'report')
    said, *_ = report.joinpath('report.md').read_text('utf-8').partition('![')
    display.display(display.Image(filename=str(report / 'training.png')),
                    display.Markdown(said))


def begin(project: str, input: str = '', output: str = '') -> Session:
  """Returns the session of this machine: Kaggle, Colab or your own.

  Args:
    project: Folder of the project.
    input: Another than the machine's usual one.
    output: The same.
  """
  scratch = os.path.join(tempfile.gettempdir(), 'gemma_sft')
  if os.path.isdir('/kaggle/working'):
    places = '/kaggle/input', '/kaggle/working'
  elif os.path.isdir('/content'):
    drive = '/content/drive/MyDrive'
    places = '/content/input', os.path.join(
        drive if os.path.isdir(drive) else '/content', 'gemma_sft_output')
  else:
    places = (os.path.join(project, 'workdirs', 'input'),
              os.path.join(project, 'workdirs', 'notebook'))
  session = Session(
      project, input or places[0], output or places[1], scratch,
      hosted=places[0][:8] in ('/kaggle/', '/content'))
  os.makedirs(session.output, exist_ok=True)
  os.makedirs(scratch, exist_ok=True)
  return session


def _container_start() -> float:
  """Returns when process 1 began, which is when the session did (proc(5))."""
  with open('/proc/1/stat', encoding='utf-8') as file:
    # The second field, a name in brackets, may have spaces.
    ticks = int(file.read().rpartition(')')[2].split()[19])
  with open('/proc/uptime', encoding='utf-8') as file:
    uptime = float(file.read().split()[0])
  return time.time() - uptime + ticks / os.sysconf('SC_CLK_TCK')


def _find_models(root: str) -> list:
  """Returns Orbax checkpoints, folders of safetensors and GGUFs of models."""
  found = []
  for folder, folders, files in os.walk(root):
    if {'_METADATA', 'manifest.ocdbt'} & set(files) or any(
        name.endswith('.safetensors') for name in files):
      found.append(folder)
      folders.clear()
      continue
    found += [os.path.join(folder, name) for name in files
              if name.endswith('.gguf')]
    # Of earlier runs: not models to begin with.
    folders[:] = sorted(set(folders) - {'checkpoints', 'export'})
  return sorted(found)


def _newest_step(workdir: str) -> int:
  names = os.listdir(os.path.join(workdir, 'checkpoints'))
  return max([int(name) for name in names if name.isdigit()], default=-1)


def _copy(source: str, target: str) -> None:
  """Copies a folder; the name stands for all of it or is not there."""
  partial = target + '.partial'
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(source, partial)
  shutil.rmtree(target, ignore_errors=True)
  os.rename(partial, target)


def _bytes(folder: str) -> int:
  return sum(os.path.getsize(os.path.join(where, name))
             for where, _, names in os.walk(folder) for name in names)
