"""New slang terms for a context, judged by format, use and novelty."""

import collections
import math
import re
from typing import Any
from typing import Sequence

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.slang import terms

HEADLINE = 'good'
LOWER_IS_BETTER = frozenset({'copied', 'acronym_gap'})
FIELDS = ('context', 'condition')

# What data sets of the field call the columns, in lower case.
_NAMES = {
    'slang': ('slang', 'term', 'keyword', 'word', 'emoji'),
    'description': ('description', 'definition', 'meaning'),
    'example': ('example', 'usage'),
    'context': ('context', 'situation'),
    'condition': ('condition', 'conditions'),
}
_TAG = ('Create a new slang term for the context below: catchy, easy to use and'
        ' natural in the casual talk of young people.')
_CONDITION = ('Give the term, its description and a long, precise example of'
              ' its use.')
_CONDITION_SHORT = 'Give the term and its description.'

_LABELS = ('slang', 'description', 'example')
_LINE = re.compile(r'(slang|description|example)[ \t]*:(.*)', re.IGNORECASE)
_MARKUP = ' \t*_`#>-'
# More are a sentence; no term of data/slang has more than four.
_MOST_WORDS = 6
# In a shorter term one letter makes another word: bop, bot.
_CLOSE_FROM = 5
# By chance: no two of the 453 rows of data/slang share seven in a row.
_COPIED_WORDS = 8


def to_messages(record: records_lib.Record) -> Sequence[chat.Message]:
  """Returns tag, context and condition, and the term with what belongs to it.

  A row without a context asks for a word for its description; without an
  example the condition asks for none; a column `condition` says it in other
  words. A record with a context and no column for a term is a question alone:
  its answer is ''.

  Raises:
    UserError: if there is no term or no description.
  """
  row = columns(record)
  if _is_question(record, row):
    return _conversation(
        row['context'], row['condition'] or _CONDITION, '')
  if not row['slang'] or not row['description']:
    raise errors.UserError(
        f'{record.where}: columns {", ".join(record.fields)}',
        'a slang term and its description, in columns of such names',
        "name your columns: --config.data.columns='slang=phrase'")
  context = row['context'] or f'A word is wanted for this: {row["description"]}'
  answer = [f'Slang: {row["slang"]}', f'Description: {row["description"]}']
  if row['example']:
    answer.append(f'Example: {row["example"]}')
  return _conversation(context, _condition(row), '\n'.join(answer))


def _condition(row):
  return row['condition'] or (
      _CONDITION if row['example'] else _CONDITION_SHORT)


def _conversation(context, condition, answer):
  return [chat.Message('user', f'{_TAG}\n\nContext: {context}\n\n{condition}'),
          chat.Message('model', answer)]


def _is_question(record, row):
  """A row of a table with empty cells is none, but a mistake in the table."""
  given = {str(name).strip().lower() for name in record.fields}
  return bool(row['context']) and given.isdisjoint(
      name for label in _LABELS for name in _NAMES[label])


def to_form(record: records_lib.Record) -> dict[str, str]:
  """Returns a row's context, or the description that stands for it, and what
  the term has to come with."""
  row = columns(record)
  return {'context': row['context'] or row['description'],
          'condition': _condition(row)}


def columns(record: records_lib.Record) -> dict[str, str]:
  """Returns slang, description, example, context and condition, '' for none."""
  given = {str(k).strip().lower(): v for k, v in record.fields.items()}
  row = {}
  for name, others in _NAMES.items():
    values = [given[other] for other in others if given.get(other)]
    row[name] = ' '.join(str(values[0]).split()) if values else ''
  return row


def parse(answer: str) -> dict[str, str]:
  """Returns the first slang, description and example of an answer, or ''.

  Markdown around labels and values is put up with here, not in the format.
  """
  row = dict.fromkeys(_LABELS, '')
  for line in answer.splitlines():
    label, _, value = line.partition(':')
    label = label.strip(_MARKUP).lower()
    if label in row and not row[label]:
      row[label] = ' '.join(value.strip(_MARKUP).split())
  return row


def judge(
    records: Sequence[records_lib.Record],
    completions: Sequence[str],
    training: Sequence[records_lib.Record] = (),
) -> tasks.Judged:
  """Scores terms by what can be counted; whether one is funny, people say.

  Metrics, each the mean of a value of the rows unless it says otherwise:

    good: format, in_example, novel and first at once, and not copied.
    format: the lines Slang:, Description: and Example: (this one only if the
      prompt asks for an example), once each, in this order, none empty, no
      other line, and a term of at most six words.
    in_example: the example has the term in it (`terms.occurs`). Left out
      where no example is asked for.
    novel: the term is none of `training`, nor one letter away (terms of five
      letters or more), and does not stand in the context as it is.
    first: no answer before it has the same term: the mean is the share of
      different terms.
    copied: description or example is one of `training`, or has eight words in a
      row of one.
    on_topic: the share of the other contexts of these records that the answer
      has less in common with than with its own; 0.5 is chance. Words are
      weighted by how few contexts have them. Only with contexts of one's own.
    spelled: among acronyms, those whose letters are initials in a row of the
      description's words.
    acronym_gap: how far the share of acronyms is from that of the records'
      own terms, either way: more of them is neither better nor worse. A total.
    distinct1, distinct2: different words and pairs of words over all of them.
      Totals; they fall as the number of answers grows.
  """
  known = _Training(training)
  wanted = [columns(r) for r in records]
  contexts = _Contexts([row['context'] for row in wanted])
  rows, seen = [], set()
  for i, (record, row, text) in enumerate(zip(records, wanted, completions)):
    asks_example = bool(row['example']) or _is_question(record, row)
    rows.append(_verdict(text, row, asks_example, known, seen))
    if contexts.n_others(i):
      rows[-1]['on_topic'] = contexts.nearness(i, text)
  metrics = {}
  for name in ('good', 'format', 'in_example', 'novel', 'first', 'copied',
               'on_topic', 'spelled'):
    values = [row[name] for row in rows if name in row]
    if values:
      metrics[name] = sum(values) / len(values)
  references = [terms.is_acronym(row['slang'], row['description'])
                for row in wanted if row['slang']]
  if references:
    share = sum(row['acronym'] for row in rows) / len(rows)
    metrics['acronym_gap'] = abs(share - sum(references) / len(references))
  answers = [terms.words(' '.join(parse(c).values())) for c in completions]
  for n in (1, 2):
    metrics[f'distinct{n}'] = distinct(answers, n)
  return tasks.Judged(metrics | {'n': len(rows)}, rows)


def _verdict(text, row, asks_example, known, seen) -> dict[str, Any]:
  """Returns one answer's row; adds its term to those that were seen."""
  answer = parse(text)
  term, term_key = answer['slang'], terms.key(answer['slang'])
  like = known.like(term_key)
  # A description that stands for the context may well use the term.
  echoed = terms.occurs(term, row['context'], inflected=False)
  verdict = {
      'term': term,
      'format': has_format(text, asks_example),
      'novel': bool(term_key) and not like and not echoed,
      'first': bool(term_key) and term_key not in seen,
      'copied': (known.has_text(answer['description'])
                 or known.has_text(answer['example'])),
      'acronym': terms.is_acronym(term, answer['description']),
  }
  if asks_example:
    verdict['in_example'] = terms.occurs(term, answer['example'])
  if verdict['acronym']:
    verdict['spelled'] = terms.spells(term, answer['description'])
  if like:
    verdict['like'] = like
  verdict['good'] = (
      verdict['format'] and verdict['novel'] and verdict['first']
      and not verdict['copied'] and verdict.get('in_example', True))
  seen.add(term_key)
  return verdict


def has_format(answer: str, asks_example: bool = True) -> bool:
  """Whether an answer is the two or three lines that the prompt asks for.

  Blank lines and the case of the labels do not matter; Markdown does.
  """
  lines = [line.strip() for line in answer.splitlines() if line.strip()]
  matches = [_LINE.fullmatch(line) for line in lines]
  labels = _LABELS if asks_example else _LABELS[:2]
  if not all(matches) or [m[1].lower() for m in matches] != [*labels]:
    return False
  values = [m[2].strip() for m in matches]
  return all(map(terms.key, values)) and (
      len(values[0].split()) <= _MOST_WORDS)


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
  """Returns different n-grams over all n-grams (Li et al. 2016), 0 if none."""
  grams = [tuple(words[i:i + n]) for words in texts
           for i in range(len(words) - n + 1)]
  return len(set(grams)) / max(1, len(grams))


class _Training:
  """The terms and sentences that an answer may have been copied from."""

  def __init__(self, records):
    rows = [columns(r) for r in records]
    self._terms = {terms.key(r['slang']): r['slang'] for r in rows
                   if r['slang']}
    self._texts, self._runs = set(), set()
    for row in rows:
      for text in (row['description'], row['example']):
        found = tuple(terms.words(text))
        self._texts.add(found)
        self._runs.update(_runs(found))

  def like(self, term_key) -> str:
    """Returns the training term that this one is or nearly is, or ''."""
    if term_key in self._terms:
      return self._terms[term_key]
    if len(term_key) < _CLOSE_FROM:
      return ''
    return next((term for key, term in self._terms.items()
                 if terms.is_close(term_key, key)), '')

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

  def _others(self, i):
    """Contexts with other words than the i-th: two may ask the same."""
    return [s for s in self._stems if s and s != self._stems[i]]

  def n_others(self, i) -> int:
    return len(self._others(i)) if self._stems[i] else 0

  def nearness(self, i, answer) -> float:
    """Returns the share of others that are less covered; a tie is a half."""
    found = _stems(answer)
    own = self._covered(self._stems[i], found)
    others = [self._covered(s, found) for s in self._others(i)]
    return sum((own > o) + 0.5 * (own == o) for o in others) / len(others)

  def _covered(self, context, found):
    return (sum(sorted(self._weight[s] for s in context & found))
            / sum(sorted(self._weight[s] for s in context)))


def _stems(text):
  # Five letters part minute from minister and hold bake, bakes and baked.
  return {w[:5] for w in terms.words(text) if len(w) > 2}


def check_answers(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns a line for each example without its term and each repeated term."""
  found, first = [], {}
  for record in records:
    row = columns(record)
    if row['example'] and not terms.occurs(row['slang'], row['example']):
      found.append(f'{record.where}: the example does not use'
                   f' {row["slang"]!r}')
    place = first.setdefault(terms.key(row['slang']), record.where)
    if place != record.where:
      found.append(f'{record.where}: the term {row["slang"]!r} is that of'
                   f' {place}')
  return found
