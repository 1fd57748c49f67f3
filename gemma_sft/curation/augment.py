"""Makes additional training rows from training rows.

The column 'augmented' of such a row names its method, 'augmented_from' the row
it was made from.
"""

import collections
from collections.abc import Sequence
import copy

import numpy as np

from gemma_sft import errors
from gemma_sft.curation import table

METHODS = ('line_order', 'span_dropout', 'paraphrase')
# Share of the words of a one-line text that span_dropout leaves out.
_SPAN = 0.15


def augment(
    rows: table.Rows, log: table.ChangeLog, *, methods: Sequence[str],
    share: float, names: Sequence[str], templates: Sequence[str],
    keep: Sequence[str], seed: int) -> list[table.TableRow]:
  """Returns new rows, made by each method from a random `share` of the rows.

  line_order permutes the couplets of a text (its stanzas, if it has blank
  lines), except the first and the last, where a song states its theme and a
  poet signs. span_dropout leaves out one couplet of the middle, or a run of
  words of a one-line text. Both change the columns `names`, and leave couplets
  and words with a phrase of `keep` in place. paraphrase fills a column by a
  template 'column=wording with {other} columns'.
  """
  made = []
  for m, method in enumerate(METHODS):
    if method not in methods:
      continue
    chosen = np.random.default_rng([seed, m]).random(len(rows)) < share
    before = len(made)
    for i in np.flatnonzero(chosen):
      row, rng = rows[i], np.random.default_rng([seed, m, int(i)])
      fields = copy.deepcopy(row.fields)
      if method == 'paraphrase':
        _paraphrase(fields, templates, rng)
      else:
        change = _reorder if method == 'line_order' else _drop
        for name in names:
          if table.is_text(fields.get(name)):
            fields[name] = table.applied(change, fields[name], keep, rng)
      if fields != row.fields:
        fields |= {'augmented': method, 'augmented_from': row.where}
        made.append(table.TableRow(row.where, row.read, fields))
    if unchanged := chosen.sum() - (len(made) - before):
      log.notes.append(f'augment: {method} could not change {unchanged} of'
                       f' {chosen.sum()} rows')
  return made


def check_templates(templates: Sequence[str], known: Sequence[str]) -> None:
  """Raises a UserError for a template with a syntax error or unknown column."""
  for template in templates:
    column, equals, wording = template.partition('=')
    try:
      wording.format_map(dict.fromkeys(known, ''))
      is_valid = equals and column in known
    except (KeyError, ValueError, IndexError, AttributeError):
      is_valid = False
    if not is_valid:
      raise errors.UserError(
          f'config.augment_templates has {template!r}',
          'column=wording, with {column} to insert a column; the columns are'
          f' {", ".join(map(repr, known))}',
          "for example 'description=You say it when {description}'")


def _units(text: str) -> tuple[list[str], str]:
  """Returns the stanzas, or else couplets, and the separator between them."""
  if '\n\n' in text:
    return text.split('\n\n'), '\n\n'
  lines = text.split('\n')
  return ['\n'.join(lines[i:i + 2]) for i in range(0, len(lines), 2)], '\n'


def _free(units: Sequence[str], keep: Sequence[str]) -> list[int]:
  """Returns the indices of inner units without any of the kept phrases."""
  return [i for i in range(1, len(units) - 1)
          if not any(phrase in units[i] for phrase in keep)]


def _reorder(text: str, keep: Sequence[str], rng: np.random.Generator) -> str:
  units, separator = _units(text)
  free = _free(units, keep)
  if len({units[i] for i in free}) < 2:
    return text
  after = list(units)
  while after == units:
    for i, j in zip(free, rng.permutation(free)):
      after[i] = units[j]
  return separator.join(after)


def _drop(text: str, keep: Sequence[str], rng: np.random.Generator) -> str:
  if '\n' in text:
    units, separator = _units(text)
    if free := _free(units, keep):
      del units[rng.choice(free)]
    return separator.join(units)
  found = text.split(' ')
  size = int(len(found) * _SPAN)
  # The first and last words stay, with their capital and final mark.
  shortened = [' '.join(found[:i] + found[i + size:])
               for i in range(1, len(found) - size)] if size else []
  shortened = [rest for rest in shortened
               if all(text.count(p) == rest.count(p) for p in keep)]
  return shortened[rng.integers(len(shortened))] if shortened else text


def _paraphrase(fields, templates, rng: np.random.Generator) -> None:
  template = templates[rng.integers(len(templates))]
  column, _, wording = template.partition('=')
  if not table.is_missing(fields.get(column)):
    cells = {name: table.as_text(value) for name, value in fields.items()}
    fields[column] = wording.format_map(collections.defaultdict(str, cells))
