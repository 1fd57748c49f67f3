"""Writes the notebooks from notebooks.py, which is where to change them.

    python launch/kaggle/generate.py            # after a change
    python launch/kaggle/generate.py --check    # says whether they are current
"""

import pathlib
import sys

import jupytext
import nbformat
from nbformat import v4

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = ('tpu_v5e8', 'gpu_t4x2', 'tutorial')


def generate(name: str) -> str:
  """Returns the text of a notebook; the same for the same source."""
  source = jupytext.read(FOLDER / 'notebooks.py', fmt='py:percent')
  make = {'markdown': v4.new_markdown_cell, 'code': v4.new_code_cell}
  cells = []
  for cell in source.cells[1:]:  # The first is about the file.
    if name not in cell.metadata.get('only', name).split():
      continue
    tags = {key: cell.metadata[key] for key in ('tags',)
            if key in cell.metadata}
    # nbformat draws ids at random.
    cells.append(make[cell.cell_type](
        cell.source, id=f'cell-{len(cells):02d}', metadata=tags))
  notebook = v4.new_notebook(cells=cells, metadata={
      'kernelspec': {'name': 'python3', 'language': 'python',
                     'display_name': 'Python 3'},
      'language_info': {'name': 'python'}})
  nbformat.validate(notebook)
  return nbformat.writes(notebook) + '\n'


def path(name: str) -> pathlib.Path:
  return FOLDER / name / 'notebook.ipynb'


def main(arguments: list[str]) -> int:
  stale = [name for name in NAMES if not path(name).exists()
           or path(name).read_text('utf-8') != generate(name)]
  if arguments == ['--check']:
    for name in stale:
      print(f'{path(name)} is not what notebooks.py says: run'
            ' python launch/kaggle/generate.py', file=sys.stderr)
    return bool(stale)
  for name in stale:
    path(name).write_text(generate(name), 'utf-8')
    print(f'wrote {path(name)}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
