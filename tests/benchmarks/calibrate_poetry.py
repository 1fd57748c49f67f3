"""Prints the judge's scores of real and of broken poems.

    python tests/benchmarks/calibrate_poetry.py --data=FILE [--data=FILE]
    python tests/benchmarks/calibrate_poetry.py --data=FILE --rhyme_words

FILE has poems in a format that `records` reads, such as the JSON of
github.com/chinese-poetry/chinese-poetry; poems of other shapes are left out.
The second form prints gemma_sft/tasks/poetry/rhyme_words.json; do not give it
poems that a model will be tested on.
"""

import collections
import itertools
import json
import random

from absl import app
from absl import flags
import opencc

from gemma_sft import pages
from gemma_sft.inputs import records
from gemma_sft.tasks.poetry import pingshui
from gemma_sft.tasks.poetry import task

_DATA = flags.DEFINE_multi_string('data', None, 'Poems.', required=True)
_RHYME_WORDS = flags.DEFINE_bool('rhyme_words', False, 'The second form.')
_N_WORDS = 12


def _rates(texts, form):
  record = records.Record({'title': '題', 'form': form}, '')
  metrics = task.judge([record] * len(texts), texts).metrics
  return f'{metrics["rhyme"]:.3f} / {metrics["tone"]:.3f}'


def _rhyme_words(texts):
  """Returns {rhyme: its words}, both sorted by how often poems use them."""
  counts = {rhyme: collections.Counter() for rhyme in pingshui.level_book()}
  for text in texts:
    lines = task.split_lines(task.to_traditional(text))
    if task.form_of(text) and (rhyme := pingshui.rhyme_of(lines)):
      counts[rhyme].update(line[-1] for line in lines[1::2])
  words = {}
  for rhyme in sorted(counts, key=lambda r: -counts[r].total()):
    common = [c for c, _ in counts[rhyme].most_common(_N_WORDS)]
    rest = [c for c in pingshui.level_book()[rhyme] if c not in common]
    words[rhyme] = ''.join((common + rest)[:_N_WORDS])
  return words


def main(_):
  """Prints a table of rhyme / tone for each form and kind of poem."""
  texts = [task.poem_text(r) for path in _DATA.value
           for r in records.read(path)]
  if _RHYME_WORDS.value:
    print(json.dumps(_rhyme_words(texts), ensure_ascii=False, indent=1))
    return
  rng = random.Random(0)
  simplify = opencc.OpenCC('t2s').convert
  rows = []
  for form in task.FORMS:
    real = [t for t in texts if task.form_of(t) == form]
    pool = [line for t in real for line in task.split_lines(t)]
    shuffled, mixed = [], []
    for text in real:
      lines = task.split_lines(text)
      characters = list(''.join(lines))
      rng.shuffle(characters)
      shuffled.append('，'.join(map(''.join, itertools.batched(
          characters, int(form[0])))))
      mixed.append('，'.join(rng.sample(pool, len(lines))))
    rows.append((form, len(real), *(_rates(kind, form) for kind in (
        real, [simplify(t) for t in real], shuffled, mixed))))
  print(pages.table(
      ('form', 'poems', 'real', 'real, simplified', 'characters shuffled',
       'lines of other poems'), rows))


if __name__ == '__main__':
  app.run(main)
