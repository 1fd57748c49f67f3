"""What a curation did, for people to read and for programs."""

import collections
from collections.abc import Sequence
import dataclasses
import difflib
import html
import itertools
from typing import Any
import unicodedata

import regex

from gemma_sft.curation import splits
from gemma_sft.curation import table
from gemma_sft.curation import words

# Characters shown around what changed, and at most of one thing.
_CONTEXT, _LONGEST = 24, 160
# Leaks, notes and lines for review that the report quotes.
_MAX_SHOWN = 20
_INVISIBLE = regex.compile(r'[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}')


@dataclasses.dataclass(frozen=True)
class Result:
  """A curated collection.

  Attributes:
    source: What was read.
    num_read: Rows in it.
    account: Changes, removals and notes.
    parts: {'train': rows, ...}, without augmented ones.
    augmented: Rows made of training rows.
    text: The columns of text.
    balance: The column of styles, or ''.
    flags: Lines of review.jsonl.
    leaks: What two splits share.
  """

  source: str
  num_read: int
  account: table.Account
  parts: dict[str, list[table.Row]]
  augmented: list[table.Row]
  text: Sequence[str]
  balance: str
  flags: list[dict[str, Any]]
  leaks: list[splits.Leak]

  def written(self) -> dict[str, list[table.Row]]:
    """Returns the rows of each file; augmented ones end the training rows.

    A split without rows has no file: nothing reads an empty one.
    """
    parts = self.parts | {'train': [*self.parts['train'], *self.augmented]}
    return {name: rows for name, rows in parts.items() if rows}


@dataclasses.dataclass(frozen=True)
class Table:
  """A block of the report."""

  head: Sequence[str]
  rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Heading:
  """A block of the report."""

  text: str
  level: int = 2


# Or a paragraph.
Block = Table | Heading | str


def blocks(result: Result, num_examples: int) -> list[Block]:
  """Returns the report, in the order in which it is read."""
  data = to_json(result, num_examples)
  made = len(result.augmented)
  found: list[Block] = [
      Heading('Curation', 1),
      f'{result.source}: {data["read"]} rows read = {data["kept"]} kept +'
      f' {data["removed"]} removed.'
      + (f' {made} augmented rows were added to train.' if made else ''),
      Table(('split', 'rows', 'augmented', 'words', 'different words',
             'characters'), [
                 (name, *(str(value) for value in part.values()))
                 for name, part in data['splits'].items()]),
      Heading('Steps'),
      Table(('step', 'rows changed', 'cells changed', 'rows removed'), [
          (step['step'], *(str(step[key]) for key in
                           ('rows_changed', 'cells_changed', 'rows_removed')))
          if step['on'] else (step['step'], 'off', '', '')
          for step in data['steps']]),
  ]
  for step in data['steps']:
    if step['examples'] or step['removals']:
      found.append(Heading(step['step'], 3))
    if step['examples']:
      found.append(Table(('row', 'column', 'before', 'after', 'why'), [
          (e['where'], e['column'],
           *difference(e['before'], e['after']), e['why'])
          for e in step['examples']]))
    if step['removals']:
      found.append(Table(('removed row', 'why', 'it began'), [
          (e['where'], e['why'], _shorten(_visible(e['began'])))
          for e in step['removals']]))
  if result.balance:
    found.append(Heading(f'Rows by {result.balance}'))
    found.append(Table((result.balance, *splits.NAMES), [
        (style or '(none)', *(f'{counts[n]} ({_percent(counts, n)})'
                              for n in splits.NAMES))
        for style, counts in data['styles'].items()]))
  found.append(Heading('Leakage between splits'))
  if result.leaks:
    found.append(Table(('row', 'split', 'row', 'split', 'why'), [
        dataclasses.astuple(leak) for leak in result.leaks[:_MAX_SHOWN]]))
  found.append(f'{len(result.leaks)} found by a second look at the finished'
               ' splits.')
  found.append(Heading('For review'))
  found.append(f'{len(result.flags)} lines have listed words; all are kept and'
               ' stand in review.jsonl.')
  if result.flags:
    found.append(Table(('row', 'line', 'found', 'list'), [
        (f['where'], _shorten(_visible(f['text'])), ', '.join(f['found']),
         ', '.join(f['lists'])) for f in result.flags[:num_examples]]))
  if notes := result.account.notes:
    found.append(Heading('Notes'))
    found += notes[:_MAX_SHOWN]
    if len(notes) > _MAX_SHOWN:
      found.append(f'and {len(notes) - _MAX_SHOWN} more, in report.json.')
  return found


def to_json(result: Result, num_examples: int) -> dict[str, Any]:
  """Returns counts, examples, notes and leaks."""
  account = result.account
  changes, removals = collections.defaultdict(list), collections.defaultdict(
      list)
  for change in account.changes:
    changes[change.step].append(change)
  for removal in account.removals:
    removals[removal.step].append(removal)
  steps = []
  for step, is_on in account.steps.items():
    steps.append({
        'step': step, 'on': is_on,
        'rows_changed': len({c.where for c in changes[step]}),
        'cells_changed': len(changes[step]),
        'rows_removed': len(removals[step]),
        'examples': [
            dataclasses.asdict(c) for c in _varied(changes[step], num_examples)
        ],
        'removals': [
            {'where': r.where, 'why': r.why, 'began': ' | '.join(
                table.as_text(r.fields.get(name))[:_LONGEST]
                for name in result.text)}
            for r in removals[step][:num_examples]]})
  return {
      'source': result.source, 'read': result.num_read,
      'kept': sum(map(len, result.parts.values())),
      'removed': len(account.removals), 'augmented': len(result.augmented),
      'steps': steps,
      'splits': {name: _statistics(name, result) for name in splits.NAMES},
      'styles': _styles(result) if result.balance else {},
      'leaks': [dataclasses.asdict(leak) for leak in result.leaks],
      'flagged_lines': len(result.flags), 'notes': account.notes}


def difference(before: Any, after: Any) -> tuple[str, str]:
  """Returns the first words that changed, with a little around, made visible.

  Where the two would look the same, code points are shown.
  """
  if before is None:
    return '', _shorten(_visible(table.as_text(after)))
  # White space between words counts as a word.
  old, new = (regex.split(r'(\s+)', table.as_text(value))
              for value in (before, after))
  hunks = [hunk for hunk in difflib.SequenceMatcher(
      None, old, new, autojunk=False).get_opcodes() if hunk[0] != 'equal']
  if not hunks:  # A list became a text, or the other way round.
    return _shorten(_visible(str(before))), _shorten(_visible(str(after)))
  _, *places = hunks[0]
  cuts = [''.join(old[places[0]:places[1]]), ''.join(new[places[2]:places[3]])]
  if unicodedata.normalize('NFC', cuts[0]) == unicodedata.normalize(
      'NFC', cuts[1]):
    start = _common(*cuts)
    end = _common(cuts[0][start:][::-1], cuts[1][start:][::-1])
    middles = []
    for cut in cuts:
      points = ' '.join(
          f'U+{ord(c):04X}' for c in cut[start:len(cut) - end])
      middles.append(f'{cut[:start]}⟨{points}⟩{cut[len(cut) - end:]}')
  else:
    middles = [_visible(cut).replace(' ', '␣') if cut.isspace()
               else _visible(cut) for cut in cuts]
  more = f' (and in {len(hunks) - 1} more places)' if len(hunks) > 1 else ''
  shown = []
  for words_, (start, end), middle in zip(
      (old, new), (places[:2], places[2:]), middles):
    left, right = ''.join(words_[:start]), ''.join(words_[end:])
    shown.append(
        ('…' if len(left) > _CONTEXT else '') + _visible(left[-_CONTEXT:])
        + _shorten(middle) + _visible(right[:_CONTEXT])
        + ('…' if len(right) > _CONTEXT else ''))
  return shown[0], shown[1] + more


def to_markdown(found: Sequence[Block]) -> str:
  """Returns the report in Markdown."""
  lines = []
  for block in found:
    if isinstance(block, Heading):
      lines += ['#' * block.level + ' ' + block.text, '']
    elif isinstance(block, Table):
      head, *rows = [
          '| ' + ' | '.join(map(_escape_markdown, row)) + ' |'
          for row in (block.head, *block.rows)]
      lines += [head, '|' + '---|' * len(block.head), *rows, '']
    else:
      lines += [_escape_markdown(block), '']
  return '\n'.join(lines).rstrip()


def to_html(found: Sequence[Block]) -> str:
  """Returns the report as one page without anything from elsewhere."""
  body = []
  for block in found:
    if isinstance(block, Heading):
      tag = f'h{block.level}'
      body.append(f'<{tag}>{html.escape(block.text)}</{tag}>')
    elif isinstance(block, Table):
      rows = [''.join(f'<th>{html.escape(cell)}</th>' for cell in block.head)]
      rows += [''.join(f'<td dir="auto">{html.escape(cell)}</td>'
                       for cell in row) for row in block.rows]
      body.append('<div><table>'
                  + '\n'.join(f'<tr>{row}</tr>' for row in rows)
                  + '</table></div>')
    else:
      body.append(f'<p>{html.escape(block)}</p>')
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width">\n'
      '<title>Curation</title>\n<style>\n'
      'body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;'
      'padding:0 1em}\n'
      'div{overflow-x:auto}\n'
      'table{border-collapse:collapse}\n'
      'td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:start;'
      'vertical-align:top}\n'
      '</style></head><body>\n' + '\n'.join(body) + '\n</body></html>')


def _statistics(name, result) -> dict[str, int]:
  rows = result.parts[name]
  texts = ['\n'.join(table.as_text(row.fields.get(column))
                     for column in result.text) for row in rows]
  found = [words.words(text.casefold()) for text in texts]
  return {
      'rows': len(rows),
      'augmented': len(result.augmented) if name == 'train' else 0,
      'words': sum(map(len, found)),
      'different_words': len(set(itertools.chain.from_iterable(found))),
      'characters': sum(len(words.aksharas(text)) for text in texts)}


def _styles(result) -> dict[str, dict[str, int]]:
  counts = collections.defaultdict(lambda: dict.fromkeys(splits.NAMES, 0))
  for name, rows in result.parts.items():
    for row in rows:
      counts[table.as_text(row.fields.get(result.balance)).strip()][name] += 1
  return dict(sorted(counts.items()))


def _varied(changes, n):
  """Returns n changes spread over the collection, the first among them."""
  return [changes[i * len(changes) // n] for i in range(min(n, len(changes)))
          ] if len(changes) > n else changes


def _percent(counts, name) -> str:
  return f'{counts[name] / max(1, sum(counts.values())):.0%}'


def _common(a: str, b: str) -> int:
  """Returns the length of the common beginning."""
  pairs = zip(a, b)
  return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))


def _visible(text: str) -> str:
  """Returns the text with a name for what cannot be seen."""
  text = regex.sub('  +', lambda m: '␣' * len(m[0]), text.replace('\n', '⏎'))
  return _INVISIBLE.sub(lambda m: f'⟨U+{ord(m[0]):04X}⟩', text)


def _shorten(text: str) -> str:
  if len(text) <= _LONGEST:
    return text
  half = _LONGEST // 2
  return f'{text[:half]} … {text[-half:]}'


def _escape_markdown(text: str) -> str:
  return regex.sub(r'([\\`*_<>|\[\]#])', r'\\\1', text).replace('\n', ' ')
