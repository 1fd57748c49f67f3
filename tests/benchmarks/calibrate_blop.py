"""Prints the judge's scores of right and of broken Blop answers.

    python tests/benchmarks/calibrate_blop.py [--data=FILE.txt,FILE.txt]

Judges each answer with code unchanged and after each change. The first two rows
should be near 1 and the others near 0. Takes six minutes for data/blop on two
cores.
"""

import pathlib
import re
import sys

from absl import app
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.chat import task as chat_task

_DATA = flags.DEFINE_list(
    'data', [f'data/blop/{split}.txt' for split in
             ('train', 'validation', 'test')], 'Files of examples.')
_COLUMNS = ('strict', 'component', 'right', 'same_tags', 'fallback')


def reworded(code: str) -> str | None:
  """Changes wrappers and class names, which leaves an answer right."""
  changed = re.sub(r"class='([\w-]+)'", r"class='the-\1'", code)
  changed = re.sub(r'<(/?)(?:section|article)\b', r'<\1div', changed)
  changed = re.sub(r'<(/?)(?:strong|em|b|small)\b', r'<\1span', changed)
  return changed if changed != code else None


def renamed(code: str) -> str | None:
  """Renames everything that the code defines."""
  names = re.findall(r'^(?:async )?(?:def|class) (\w+)', code, re.MULTILINE)
  for name in names:
    code = re.sub(rf'\b{name}\b', f'{name}Two', code)
  return code if names else None


def retagged(code: str) -> str | None:
  """Replaces a tag that means something."""
  others = {'button': 'span', 'li': 'p', 'tr': 'div', 'td': 'b', 'a': 'span',
            'input': 'img', 'img': 'span', 'h2': 'p', 'h3': 'p',
            'select': 'div', 'svg': 'div', 'h1': 'p', 'textarea': 'pre',
            'form': 'div'}
  for old, new in others.items():
    changed = re.sub(rf'<(/?){old}\b', rf'<\1{new}', code)
    if changed != code:
      return changed
  return None


def without_handlers(code: str) -> str | None:
  """Removes the event handlers."""
  changed = re.sub(r' on=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', '', code)
  return changed if changed != code else None


def other_field(code: str, prompt: str) -> str | None:
  """Reads a field that does not exist instead of one that the prompt names."""
  fields = [f for f in re.findall(r'\w\.(\w+)\b(?!\()', code)
            if f not in ('length', 'blop', 'target', 'value', 'css', 'js')
            and re.search(rf'\b{f}\b', prompt)]
  if not fields:
    return None
  return re.sub(rf'\.{fields[-1]}\b(?!\()', '.zzz', code)


def other_condition(code: str) -> str | None:
  """Negates a condition."""
  for old, new in (('==', '!='), (' < ', ' >= '), (' > ', ' <= '),
                   ('if !', 'if ')):
    if old in code:
      return code.replace(old, new)
  changed = re.sub(r'\bif ([a-z][\w.]*)( \{| =>)', r'if !\1\2', code)
  return changed if changed != code else None


def javascript(code: str) -> str:
  """Writes the code as in JavaScript."""
  code = re.sub(r'^(\s*)(async )?def (?=\w)', r'\1\2function ', code,
                flags=re.MULTILINE)
  code = re.sub(r'^(\s*)(\w+) = ', r'\1const \2 = ', code, flags=re.MULTILINE)
  code = code.replace(':=', '=').replace('elseif', 'else if')
  return re.sub(r"([\w)'\]])$", r'\1;', code, flags=re.MULTILINE)


def python(code: str) -> str:
  """Writes the code as in Python."""
  code = re.sub(r'^(\s*)(def .*\)|for .*|while .*|if .*|else|try) \{$',
                r'\1\2:', code, flags=re.MULTILINE)
  code = re.sub(r'^\s*\}.*\n?', '', code, flags=re.MULTILINE)
  return code.replace('null', 'None').replace('true', 'True')


def truncated(code: str) -> str:
  """Returns the first two thirds, as if cut at the limit of tokens."""
  return code[:len(code) * 2 // 3]


def main(argv):
  del argv
  rows = [r for path in _DATA.value for r in records_lib.read(path)
          if task.looks_like_code(chat_task.answer(r))]
  codes = [task.extract_code(chat_task.answer(r)) for r in rows]
  if _DATA.default != _DATA.value:  # Answers of others may not compile.
    good = [v['strict'] for v in task.compile_snippets(codes)]
    rows = [r for r, ok in zip(rows, good) if ok]
    codes = [c for c, ok in zip(codes, good) if ok]
  variants = {
      'as it stands': codes, 'other classes and wrappers': map(reworded, codes),
      "another record's answer": codes[1:] + codes[:1],
      'another name': map(renamed, codes), 'another tag': map(retagged, codes),
      'no event handlers': map(without_handlers, codes),
      'another field': map(other_field, codes, map(chat_task.prompt, rows)),
      'a negated condition': map(other_condition, codes),
      'JavaScript': map(javascript, codes), 'Python': map(python, codes),
      'two thirds of it': map(truncated, codes)}
  print(f'| answers | n | {" | ".join(_COLUMNS)} |')
  print(f'|---|---|{"---|" * len(_COLUMNS)}')
  for name, changed in variants.items():
    kept = [(r, c) for r, c in zip(rows, changed) if c is not None]
    judged = task.judge(*zip(*kept))
    cells = []
    for column in _COLUMNS:
      values = [row[column] for row in judged.rows if column in row]
      cells.append(f'{sum(values) / max(1, len(values)):.3f} of {len(values)}')
    print(f'| {name} | {len(kept)} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
  app.run(main)
