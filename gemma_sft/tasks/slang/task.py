"""New slang terms for a context, judged by format, use and novelty."""

import collections
import math
import re
from typing import Any
from typing import Sequence

from gemma_sft import tasks
from gemma_sft.tasks.slang import terms

HEADLINE = 'good'
LOWER_IS_BETTER = frozenset({'copied', 'acronym_gap'})
FIELDS = ('context', 'condition')

# The names of the columns in data sets of slang, in lower case.
_NAMES = {
    'slang': ('slang', 'term', 'keyword', 'word', 'emoji'),
    'description': ('description', 'definition', 'meaning'),
    'example': ('example', 'usage'),
    'context': ('context', 'situation'),
    'condition': ('condition', 'conditions'),
}
_LABELS = ('slang', 'description', 'example')
_PROMPT = ('Create a new slang term for the context below: catchy, easy to use'
           ' and natural in the casual talk of young people.\n\n'
           'Context: {context}\n\n{condition}')
_CONDITION = ('Give the term, its description and a long, precise example of'
              ' its use.')
_CONDITION_SHORT = 'Give the term and its description.'

_LINE = re.compile(r'(slang|description|example)[ \t]*:(.*)', re.IGNORECASE)
_MARKUP = ' \t*_`#>-'
# A longer term is a sentence; no term of data/slang has more than four words.
_MAX_WORDS = 6
# Shorter terms that differ in one letter are different words: bop, bot.
_MIN_LETTERS_CLOSE = 5
# This many equal words in a row are no chance: no two of the 453 rows of
# data/slang share seven.
_COPIED_WORDS = 8
_MEANS = ('good', 'format', 'in_example', 'novel', 'first', 'copied',
          'on_topic', 'spelled')


def to_messages(record: tasks.Record) -> tasks.Conversation:
  """Returns a request for a term for a context, and the term with its texts.

  A row without a context asks for a word for its description. A column
  `condition` replaces the sentence that says what to give. The answer to a
  record with a context and no column for a term is ''.

  Raises:
    UserError: if there is no term or no description.
  """
  row = columns(record)
  if not _is_question(record, row) and not (
      row['slang'] and row['description']):
    raise tasks.wrong_columns(
        record, 'a slang term and its description, in columns of such names',
        'slang=phrase')
  context = row['context'] or f'A word is wanted for this: {row["description"]}'
  return tasks.conversation(
      _PROMPT.format(context=context, condition=_condition(record, row)),
      '\n'.join(f'{label.capitalize()}: {row[label]}' for label in _LABELS
                if row[label]))


def _is_question(record, row):
  """Whether a record has a context and no columns for a term.

  Empty cells in such columns are a mistake in the table, not a question.
  """
  given = {str(name).strip().lower() for name in record.fields}
  return bool(row['context']) and given.isdisjoint(
      name for label in _LABELS for name in _NAMES[label])


def _asks_example(record, row):
  return bool(row['example']) or _is_question(record, row)


def _condition(record, row):
  return row['condition'] or (
      _CONDITION if _asks_example(record, row) else _CONDITION_SHORT)


def to_form(record: tasks.Record) -> dict[str, str]:
  """Returns a row's context, or its description, and its condition."""
  row = columns(record)
  return {'context': row['context'] or row['description'],
          'condition': _condition(record, row)}


def columns(record: tasks.Record) -> dict[str, str]:
  """Returns slang, description, example, context and condition, or ''."""
  given = {str(k).strip().lower(): v for k, v in record.fields.items()}
  row = {}
  for name, others in _NAMES.items():
    value = next((given[o] for o in others if given.get(o)), '')
    row[name] = ' '.join(str(value).split())
  return row


def parse(answer: str) -> dict[str, str]:
  """Returns the first slang, description and example of an answer, or ''.

  Markdown around labels and values is ignored here; `has_format` refuses it.
  """
  row = dict.fromkeys(_LABELS, '')
  for line in answer.splitlines():
    label, _, value = line.partition(':')
    label = label.strip(_MARKUP).lower()
    if label in row and not row[label]:
      row[label] = ' '.join(value.strip(_MARKUP).split())
  return row


def judge(
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Scores terms by what can be counted; only people can rate wit.

  Metrics, means over the rows unless stated otherwise:

    good: format, in_example, novel and first all hold, and copied does not.
    format: the lines Slang:, Description: and, if the prompt asks for it,
      Example:, once each, in this order, none of them empty, no other line, and
      a term of at most six words.
    in_example: the example, if asked for, contains the term (`terms.occurs`).
    novel: the term is not in `training`, nor one letter away from one there
      (terms of five letters or more), nor in the context as it stands.
    first: no earlier answer has the same term.
    copied: the description or the example is in `training`, or shares eight
      words in a row with one there.
    on_topic: the share of the other records' contexts with which the answer has
      less in common than with its own; 0.5 is chance. Rare words weigh more.
    spelled: an acronym's letters are initials of consecutive words of the
      description.
    acronym_gap: the absolute difference between the share of acronyms in the
      answers and in the records' own terms. A total.
    distinct1, distinct2: different words and pairs of words over all of them.
      Totals; they fall as the number of answers grows.
  """
  known = _Training(training)
  wanted = [columns(r) for r in records]
  contexts = _Contexts([row['context'] for row in wanted])
  rows, seen = [], set()
  for i, (record, row, text) in enumerate(zip(records, wanted, completions)):
    rows.append(_verdict(text, row, _asks_example(record, row), known, seen))
    if (on_topic := contexts.on_topic(i, text)) is not None:
      rows[-1]['on_topic'] = on_topic
  metrics = tasks.means(rows, _MEANS)
  references = [terms.is_acronym(row['slang'], row['description'])
                for row in wanted if row['slang']]
  if references:
    share = sum(row['acronym'] for row in rows) / len(rows)
    metrics['acronym_gap'] = abs(share - sum(references) / len(references))
  metrics |= tasks.distinct(
      [terms.words(' '.join(parse(c).values())) for c in completions])
  return tasks.Judged(metrics | {'n': len(rows)}, rows)


def _verdict(text, row, asks_example, known, seen) -> dict[str, Any]:
  """Returns the row of one answer, and adds its term to `seen`."""
  term, description, example = parse(text).values()
  key = terms.key(term)
  similar = known.similar(key)
  # Without a context the prompt shows the description, which may use the term.
  echoed = terms.occurs(term, row['context'], inflected=False)
  verdict = {
      'term': term,
      'format': has_format(text, asks_example),
      'novel': bool(key) and not similar and not echoed,
      'first': bool(key) and key not in seen,
      'copied': known.has_text(description) or known.has_text(example),
      'acronym': terms.is_acronym(term, description)}
  if asks_example:
    verdict['in_example'] = terms.occurs(term, example)
  if verdict['acronym']:
    verdict['spelled'] = terms.spells(term, description)
  if similar:
    verdict['like'] = similar
  verdict['good'] = (
      verdict['format'] and verdict['novel'] and verdict['first']
      and not verdict['copied'] and verdict.get('in_example', True))
  seen.add(key)
  return verdict


def has_format(answer: str, asks_example: bool = True) -> bool:
  """Whether an answer is exactly the lines that the prompt asks for.

  Blank lines and the case of labels do not matter; Markdown is wrong.
  """
  matches = [_LINE.fullmatch(line.strip()) for line in answer.splitlines()
             if line.strip()]
  labels = _LABELS if asks_example else _LABELS[:2]
  if not all(matches) or [m[1].lower() for m in matches] != [*labels]:
    return False
  values = [m[2].strip() for m in matches]
  return all(map(terms.key, values)) and len(values[0].split()) <= _MAX_WORDS


class _Training:
  """The terms and sentences that an answer may be copied from."""

  def __init__(self, records):
    rows = [columns(r) for r in records]
    self._terms = {terms.key(r['slang']): r['slang'] for r in rows
                   if r['slang']}
    self._texts = {tuple(terms.words(row[name])) for row in rows
                   for name in ('description', 'example')}
    self._runs = {run for text in self._texts for run in _runs(text)}

  def similar(self, key) -> str:
    """Returns the training term that is equal or one letter away, or ''."""
    if key in self._terms:
      return self._terms[key]
    if len(key) < _MIN_LETTERS_CLOSE:
      return ''
    return next((term for other, term in self._terms.items()
                 if terms.is_close(key, other)), '')

  def has_text(self, text) -> bool:
    found = tuple(terms.words(text))
    return bool(found) and (
        found in self._texts or not self._runs.isdisjoint(_runs(found)))


def _runs(words):
  return {words[i:i + _COPIED_WORDS]
          for i in range(len(words) - _COPIED_WORDS + 1)}


class _Contexts:
  """The contexts of the judged records, as weighted stems."""

  def __init__(self, contexts):
    self._stems = [_stems(context) for context in contexts]
    n_with = collections.Counter(s for stems in self._stems for s in stems)
    self._weight = {s: math.log((len(contexts) + 1) / n)
                    for s, n in n_with.items()}

  def on_topic(self, i, answer) -> float | None:
    """Returns the share of other contexts that the answer covers less.

    Ties count as a half. None without a context, or without others.
    """
    others = [s for s in self._stems if s and s != self._stems[i]]
    if not self._stems[i] or not others:
      return None
    found = _stems(answer)
    own = self._covered(self._stems[i], found)
    covered = [self._covered(s, found) for s in others]
    return sum((own > o) + 0.5 * (own == o) for o in covered) / len(others)

  def _covered(self, context, found):
    return (sum(sorted(self._weight[s] for s in context & found))
            / sum(sorted(self._weight[s] for s in context)))


def _stems(text):
  # Five letters separate minute from minister and unite bakes and baked.
  return {w[:5] for w in terms.words(text) if len(w) > 2}


def check_answers(records: tasks.Records) -> list[str]:
  """Returns a line for each example without its term and each repeated term."""
  found, first = [], {}
  for record in records:
    row = columns(record)
    if row['example'] and not terms.occurs(row['slang'], row['example']):
      found.append(f'{record.where}: the example does not use'
                   f' {row["slang"]!r}')
    place = first.setdefault(terms.key(row['slang']), record.where)
    if place != record.where:
      found.append(f'{record.where}: the term {row["slang"]!r} is also at'
                   f' {place}')
  return found
