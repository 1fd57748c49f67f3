"""Further training rows made of training rows; nothing else is touched.

An augmented row names its method under 'augmented' and its source under
'augmented_from'.
"""

import collections
from collections.abc import Sequence
import copy

import numpy as np

from gemma_sft import errors
from gemma_sft.curation import table

METHODS = ('line_order', 'span_dropout', 'paraphrase')
# Of a text in one line, the share of words in the span that is left out.
_SPAN = 0.15


def augment(
    rows: Sequence[table.Row], account: table.Account, *,
    methods: Sequence[str], share: float, names: Sequence[str],
    templates: Sequence[str], keep: Sequence[str], seed: int
) -> list[table.Row]:
  """Returns new rows, for each method `share` of the rows where it can work.

  line_order: the couplets of a text (its stanzas, if blank lines divide it)
  change places; the first and the last stay, where a song states its theme and
  a poet signs. span_dropout: one couplet of the middle is left out; of a text
  in one line, a run of words. paraphrase: a column is worded anew by a template
  'column=wording with {other} columns'.

  Args:
    rows: The training rows.
    account: Of the notes: for how many rows a method had nothing to do.
    methods: Of `METHODS`.
    share: Of the rows, for each method.
    names: The columns of text.
    templates: For paraphrase.
    keep: Phrases that mean something in their culture: a couplet, or a run of
      words, that holds one stays where it is.
    seed: With the method and a row's number, all that chance depends on.
  """
  made = []
  for m, method in enumerate(METHODS):
    if method not in methods:
      continue
    chosen = np.random.default_rng([seed, m]).random(len(rows)) < share
    idle = 0
    for i in np.flatnonzero(chosen):
      row, rng = rows[i], np.random.default_rng([seed, m, int(i)])
      fields = copy.deepcopy(row.fields)
      if method == 'paraphrase':
        _paraphrase(fields, templates, rng)
      else:
        work = _reorder if method == 'line_order' else _drop
        for name in names:
          if table.is_text(fields.get(name)):
            text = work(table.as_text(fields[name]), keep, rng)
            is_list = isinstance(fields[name], list)
            fields[name] = text.split('\n') if is_list else text
      if fields == row.fields:
        idle += 1
        continue
      fields |= {'augmented': method, 'augmented_from': row.where}
      made.append(table.Row(row.where, row.read, fields))
    if idle:
      account.notes.append(
          f'augment: {method} had nothing to do in {idle} of'
          f' {int(chosen.sum())} rows')
  return made


def check_templates(templates: Sequence[str], known: Sequence[str]) -> None:
  """Raises a UserError for a template that no row could fill."""
  for template in templates:
    column, equals, wording = template.partition('=')
    try:
      wording.format_map(dict.fromkeys(known, ''))
      good = bool(equals) and column in known
    except (KeyError, ValueError, IndexError, AttributeError):
      good = False
    if not good:
      raise errors.UserError(
          f'config.augment_templates has {template!r}',
          'column=wording, with {column} for what to insert; the columns are'
          f' {", ".join(map(repr, known))}',
          "for example 'description=You say it when {description}'")


def _units(text: str) -> tuple[list[str], str]:
  """Returns stanzas, or else couplets, and what joins them."""
  if '\n\n' in text:
    return text.split('\n\n'), '\n\n'
  lines = text.split('\n')
  return ['\n'.join(lines[i:i + 2]) for i in range(0, len(lines), 2)], '\n'


def _free(units: Sequence[str], keep: Sequence[str]) -> list[int]:
  """Returns the units of the middle that hold none of the kept phrases."""
  return [i for i in range(1, len(units) - 1)
          if not any(phrase in units[i] for phrase in keep)]


def _reorder(text: str, keep: Sequence[str], rng: np.random.Generator) -> str:
  units, joint = _units(text)
  free = _free(units, keep)
  if len({units[i] for i in free}) < 2:
    return text
  after = list(units)
  while after == units:
    for i, j in zip(free, rng.permutation(free)):
      after[i] = units[j]
  return joint.join(after)


def _drop(text: str, keep: Sequence[str], rng: np.random.Generator) -> str:
  if '\n' in text:
    units, joint = _units(text)
    free = _free(units, keep)
    if not free:
      return text
    del units[rng.choice(free)]
    return joint.join(units)
  found = text.split(' ')
  size = int(len(found) * _SPAN)
  # The first and the last word stay, and with them the capital and the mark.
  starts = []
  for i in range(1, len(found) - size):
    rest = ' '.join(found[:i] + found[i + size:])
    if all(text.count(p) == rest.count(p) for p in keep):
      starts.append(i)
  if not size or not starts:
    return text
  i = rng.choice(starts)
  return ' '.join(found[:i] + found[i + size:])


def _paraphrase(fields, templates, rng: np.random.Generator) -> None:
  template = templates[rng.integers(len(templates))]
  column, _, wording = template.partition('=')
  if not table.is_missing(fields.get(column)):
    cells = {name: table.as_text(value) for name, value in fields.items()}
    fields[column] = wording.format_map(collections.defaultdict(str, cells))
