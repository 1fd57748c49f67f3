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

from gemma_sft import pages
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.chat import task as chat_task

_DATA = flags.DEFINE_list(
    'data', [f'data/blop/{split}.txt' for split in
             ('train', 'validation', 'test')], 'Files of examples.')
_COLUMNS = ('strict', 'component', 'right', 'same_tags', 'fallback')
# Names of a change -> patterns and what replaces them, one after another.
_ALL = {
    # Leaves an answer right.
    'other classes and wrappers': (
        (r"class='([\w-]+)'", r"class='the-\1'"),
        (r'<(/?)(?:section|article)\b', r'<\1div'),
        (r'<(/?)(?:strong|em|b|small)\b', r'<\1span')),
    'no event handlers': ((r' on=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', ''),),
    'JavaScript': (
        (r'^(\s*)(async )?def (?=\w)', r'\1\2function '),
        (r'^(\s*)(\w+) = ', r'\1const \2 = '), (':=', '='),
        ('elseif', 'else if'), (r"([\w)'\]])$", r'\1;')),
    'Python': (
        (r'^(\s*)(def .*\)|for .*|while .*|if .*|else|try) \{$', r'\1\2:'),
        (r'^\s*\}.*\n?', ''), ('null', 'None'), ('true', 'True'))}
# The same, but only the first pattern that is there is replaced.
_FIRST = {
    'another tag': [
        (rf'<(/?){old}\b', rf'<\1{new}') for old, new in (pair.split(':') for
         pair in 'button:span li:p tr:div td:b a:span input:img img:span h2:p'
         ' h3:p select:div svg:div h1:p textarea:pre form:div'.split())],
    'a negated condition': [
        ('==', '!='), (' < ', ' >= '), (' > ', ' <= '), ('if !', 'if '),
        (r'\bif ([a-z][\w.]*)( \{| =>)', r'if !\1\2')]}


def _replaced(code, pairs, only_first=False):
  for pattern, new in pairs:
    code, n = re.subn(pattern, new, code, flags=re.MULTILINE)
    if n and only_first:
      break
  return code


def _renamed(code):
  """Renames everything that the code defines."""
  for name in re.findall(
      r'^(?:async )?(?:def|class) (\w+)', code, re.MULTILINE):
    code = re.sub(rf'\b{name}\b', f'{name}Two', code)
  return code


def _other_field(code, prompt):
  """Reads a field that does not exist instead of one that the prompt names."""
  fields = [f for f in re.findall(r'\w\.(\w+)\b(?!\()', code)
            if f not in ('length', 'blop', 'target', 'value', 'css', 'js')
            and re.search(rf'\b{f}\b', prompt)]
  return re.sub(
      rf'\.{fields[-1]}\b(?!\()', '.zzz', code) if fields else code


def main(_):
  rows = [r for path in _DATA.value for r in records_lib.read(path)
          if task.looks_like_code(chat_task.answer(r))]
  codes = [task.extract_code(chat_task.answer(r)) for r in rows]
  if _DATA.default != _DATA.value:  # Answers of others may not compile.
    good = [v['strict'] for v in task.compile_snippets(codes)]
    rows = [r for r, ok in zip(rows, good) if ok]
    codes = [c for c, ok in zip(codes, good) if ok]
  variants = {'as it stands': codes}
  for patterns, first in (_ALL, False), (_FIRST, True):
    variants |= {name: [_replaced(code, pairs, first) for code in codes]
                 for name, pairs in patterns.items()}
  variants |= {
      "another record's answer": codes[1:] + codes[:1],
      'another name': map(_renamed, codes),
      'another field': map(_other_field, codes, map(chat_task.prompt, rows)),
      'two thirds of it': [code[:len(code) * 2 // 3] for code in codes]}
  table = []
  for name, answers in variants.items():
    # Without those in which there was nothing to change.
    kept = [(row, answer) for row, code, answer in zip(rows, codes, answers)
            if answer != code or name in ('as it stands', 'Python')]
    judged = task.judge(*zip(*kept))
    columns = ([row[column] for row in judged.rows if column in row]
               for column in _COLUMNS)
    table.append((name, len(kept), *(
        f'{sum(v) / max(1, len(v)):.3f} of {len(v)}' for v in columns)))
  print(pages.table(('answers', 'n', *_COLUMNS), table))


if __name__ == '__main__':
  app.run(main)
