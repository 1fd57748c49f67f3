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


# A change returns the code as it is where there is nothing to change.


def reworded(code: str) -> str:
  """Changes wrappers and class names, which leaves an answer right."""
  code = re.sub(r"class='([\w-]+)'", r"class='the-\1'", code)
  code = re.sub(r'<(/?)(?:section|article)\b', r'<\1div', code)
  return re.sub(r'<(/?)(?:strong|em|b|small)\b', r'<\1span', code)


def renamed(code: str) -> str:
  """Renames everything that the code defines."""
  for name in re.findall(
      r'^(?:async )?(?:def|class) (\w+)', code, re.MULTILINE):
    code = re.sub(rf'\b{name}\b', f'{name}Two', code)
  return code


def retagged(code: str) -> str:
  """Replaces a tag that means something."""
  others = {'button': 'span', 'li': 'p', 'tr': 'div', 'td': 'b', 'a': 'span',
            'input': 'img', 'img': 'span', 'h2': 'p', 'h3': 'p',
            'select': 'div', 'svg': 'div', 'h1': 'p', 'textarea': 'pre',
            'form': 'div'}
  for old, new in others.items():
    if re.search(rf'</?{old}\b', code):
      return re.sub(rf'<(/?){old}\b', rf'<\1{new}', code)
  return code


def without_handlers(code: str) -> str:
  """Removes the event handlers."""
  return re.sub(r' on=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', '', code)


def other_field(code: str, prompt: str) -> str:
  """Reads a field that does not exist instead of one that the prompt names."""
  fields = [f for f in re.findall(r'\w\.(\w+)\b(?!\()', code)
            if f not in ('length', 'blop', 'target', 'value', 'css', 'js')
            and re.search(rf'\b{f}\b', prompt)]
  return re.sub(
      rf'\.{fields[-1]}\b(?!\()', '.zzz', code) if fields else code


def other_condition(code: str) -> str:
  """Negates a condition."""
  for old, new in (('==', '!='), (' < ', ' >= '), (' > ', ' <= '),
                   ('if !', 'if ')):
    if old in code:
      return code.replace(old, new)
  return re.sub(r'\bif ([a-z][\w.]*)( \{| =>)', r'if !\1\2', code)


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

  def changed(change, *columns):
    return [new if (new := change(code, *more)) != code else None
            for code, *more in zip(codes, *columns)]

  variants = {
      'as it stands': codes, 'other classes and wrappers': changed(reworded),
      "another record's answer": codes[1:] + codes[:1],
      'another name': changed(renamed), 'another tag': changed(retagged),
      'no event handlers': changed(without_handlers),
      'another field': changed(other_field, map(chat_task.prompt, rows)),
      'a negated condition': changed(other_condition),
      'JavaScript': map(javascript, codes), 'Python': map(python, codes),
      'two thirds of it': map(truncated, codes)}
  table = []
  for name, answers in variants.items():
    kept = [(r, c) for r, c in zip(rows, answers) if c is not None]
    judged = task.judge(*zip(*kept))
    columns = ([row[column] for row in judged.rows if column in row]
               for column in _COLUMNS)
    table.append((name, len(kept), *(
        f'{sum(v) / max(1, len(v)):.3f} of {len(v)}' for v in columns)))
  print(pages.table(('answers', 'n', *_COLUMNS), table))


if __name__ == '__main__':
  app.run(main)
