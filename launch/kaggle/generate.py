"""Writes the notebooks from notebooks.py, their source.

    python launch/kaggle/generate.py            # after a change of the source
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
  """Returns the text of a notebook, a function of the source alone."""
  source = jupytext.read(FOLDER / 'notebooks.py', fmt='py:percent')
  make = {'markdown': v4.new_markdown_cell, 'code': v4.new_code_cell}
  cells = []
  for cell in source.cells[1:]:  # The first describes the file.
    if name not in cell.metadata.get('only', name).split():
      continue
    tags = cell.metadata.get('tags')
    cells.append(make[cell.cell_type](
        cell.source, id=f'cell-{len(cells):02d}',  # Random by default.
        metadata={'tags': tags} if tags else {}))
  notebook = v4.new_notebook(cells=cells, metadata={
      'kernelspec': {'name': 'python3', 'language': 'python',
                     'display_name': 'Python 3'},
      'language_info': {'name': 'python'}})
  nbformat.validate(notebook)
  return nbformat.writes(notebook) + '\n'


def path(name: str) -> pathlib.Path:
  return FOLDER / name / 'notebook.ipynb'


def main(arguments: list[str]) -> int:
  texts = {path(name): generate(name) for name in NAMES}
  stale = {file: text for file, text in texts.items()
           if not file.exists() or file.read_text('utf-8') != text}
  for file, text in stale.items():
    if arguments == ['--check']:
      print(f'{file} differs from notebooks.py: run python'
            ' launch/kaggle/generate.py', file=sys.stderr)
    else:
      file.write_text(text, 'utf-8')
      print(f'wrote {file}')
  return int(bool(stale) and arguments == ['--check'])


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
