"""The report of a curation, for people and for programs."""

import collections
from collections.abc import Sequence
import dataclasses
import difflib
import os
from typing import Any
import unicodedata

import regex

from gemma_sft import pages
from gemma_sft.curation import splits
from gemma_sft.curation import table
from gemma_sft.curation import words

# Characters shown around a change, and of any one text.
_CONTEXT, _MAX_LENGTH = 24, 160
# Number of leaks and of notes in the report.
_MAX_SHOWN = 20
_INVISIBLE = regex.compile(r'[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}')


@dataclasses.dataclass(frozen=True)
class CurationResult:
  """A curated collection, with the config's `source`, `text` and `balance`."""

  source: str
  text: Sequence[str]
  balance: str
  num_read: int
  log: table.ChangeLog
  parts: dict[str, list[table.TableRow]]  # Without augmented rows.
  augmented: list[table.TableRow]
  flags: list[dict[str, Any]]  # The lines of review.jsonl.
  leaks: list[splits.Leak]

  def written(self) -> dict[str, list[table.TableRow]]:
    """Returns the rows of each file; augmented rows end the training rows.

    A split without rows has no file: no reader accepts an empty one.
    """
    parts = self.parts | {'train': self.parts['train'] + self.augmented}
    return {name: rows for name, rows in parts.items() if rows}


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the report: a heading, then tables (header, rows) and texts."""

  heading: str
  blocks: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]] | str]
  level: int = 2


def make_sections(result: CurationResult, num_examples: int) -> list[Section]:
  """Returns the report, in the order in which it is read."""
  data = to_json(result, num_examples)
  counts = (f'{result.source}: {data["read"]} rows read = {data["kept"]} kept +'
            f' {data["removed"]} removed.')
  if result.augmented:
    counts += f' {len(result.augmented)} augmented rows were added to train.'
  steps = data['steps']
  sections = [
      Section('Curation', [counts, *_table(
          'split,rows,augmented,words,different words,characters',
          [(name, *map(str, part.values()))
           for name, part in data['splits'].items()])], level=1),
      Section('Steps', _table(
          'step,rows changed,cells changed,rows removed',
          [(step['step'], *(str(step[key]) for key in (
              'rows_changed', 'cells_changed', 'rows_removed')))
           if step['on'] else (step['step'], 'off', '', '')
           for step in steps]))]
  sections += [
      Section(step['step'], [
          *_table('row,column,before,after,why', [
              (e['where'], e['column'],
               *difference(e['before'], e['after']), e['why'])
              for e in step['examples']]),
          *_table('removed row,why,beginning', [
              (e['where'], e['why'], _shorten(_visible(e['began'])))
              for e in step['removals']])], level=3)
      for step in steps if step['examples'] or step['removals']]
  if result.balance:
    sections.append(Section(f'Rows by {result.balance}', [(
        (result.balance, *splits.NAMES),
        [(style or '(none)', *(f'{n} ({n / sum(by_split.values()):.0%})'
                               for n in by_split.values()))
         for style, by_split in data['styles'].items()])]))
  sections.append(Section('Leakage between splits', [
      *_table('row,split,row,split,why', result.leaks[:_MAX_SHOWN]),
      f'{len(result.leaks)} found by a second check of the finished splits.']))
  sections.append(Section('For review', [
      f'{len(result.flags)} lines contain listed words. They were kept and are'
      ' listed in review.jsonl.',
      *_table('row,line,found,list', [
          (f['where'], _shorten(_visible(f['text'])), ', '.join(f['found']),
           ', '.join(f['lists'])) for f in result.flags[:num_examples]])]))
  if notes := result.log.notes:
    more = len(notes) - _MAX_SHOWN
    sections.append(Section('Notes', notes[:_MAX_SHOWN] + (
        [f'{more} more notes are in report.json.'] if more > 0 else [])))
  return sections


def _table(header, rows):
  """Returns a list of one table, empty if it has no rows."""
  return [(header.split(','), rows)] if rows else []


def to_json(result: CurationResult, num_examples: int) -> dict[str, Any]:
  """Returns counts, examples, notes and leaks."""
  log = result.log
  steps = []
  for step, is_on in log.steps.items():
    changes = [change for change in log.changes if change.step == step]
    removals = [removal for removal in log.removals if removal.step == step]
    steps.append({
        'step': step, 'on': is_on,
        'rows_changed': len({c.where for c in changes}),
        'cells_changed': len(changes), 'rows_removed': len(removals),
        'examples': [
            dataclasses.asdict(c) for c in _spread(changes, num_examples)],
        'removals': [
            {'where': r.where, 'why': r.why, 'began': ' | '.join(
                table.as_text(r.fields.get(name))[:_MAX_LENGTH]
                for name in result.text)} for r in removals[:num_examples]]})
  return {
      'source': result.source, 'read': result.num_read,
      'kept': sum(map(len, result.parts.values())),
      'removed': len(log.removals), 'augmented': len(result.augmented),
      'steps': steps,
      'splits': {name: _statistics(name, result) for name in splits.NAMES},
      'styles': _styles(result) if result.balance else {},
      'leaks': [leak._asdict() for leak in result.leaks],
      'flagged_lines': len(result.flags), 'notes': log.notes}


def difference(before: Any, after: Any) -> tuple[str, str]:
  """Returns the first changed words before and after, with some context.

  Invisible characters get a name, as do all characters of two texts that would
  look the same.
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
  _, a, b, c, d = hunks[0]
  # Before, in and after the first difference.
  parts = [[*map(''.join, (text[:start], text[start:end], text[end:]))]
           for text, start, end in ((old, a, b), (new, c, d))]
  cuts = [cut for _, cut, _ in parts]
  if len({unicodedata.normalize('NFC', cut) for cut in cuts}) == 1:
    start = len(os.path.commonprefix(cuts))
    end = len(os.path.commonprefix([cut[start:][::-1] for cut in cuts]))
    middles = []
    for cut in cuts:
      stop = len(cut) - end
      points = ' '.join(f'U+{ord(c):04X}' for c in cut[start:stop])
      middles.append(f'{cut[:start]}⟨{points}⟩{cut[stop:]}')
  else:
    middles = [_visible(cut).replace(' ', '␣') if cut.isspace()
               else _visible(cut) for cut in cuts]
  shown = [
      ('…' if len(left) > _CONTEXT else '') + _visible(left[-_CONTEXT:])
      + _shorten(middle) + _visible(right[:_CONTEXT])
      + ('…' if len(right) > _CONTEXT else '')
      for (left, _, right), middle in zip(parts, middles)]
  more = f' (and in {len(hunks) - 1} more places)' if len(hunks) > 1 else ''
  return shown[0], shown[1] + more


def to_markdown(sections: Sequence[Section]) -> str:
  """Returns the report in Markdown."""
  parts = []
  for section in sections:
    parts.append(f'{"#" * section.level} {section.heading}')
    for block in section.blocks:
      if isinstance(block, str):
        parts.append(_escape_markdown(block))
      else:
        header, *rows = [
            map(_escape_markdown, row) for row in (block[0], *block[1])]
        parts.append(pages.table(header, rows))
  return '\n\n'.join(parts)


def to_html(sections: Sequence[Section]) -> str:
  """Returns the report as one self-contained page."""
  return pages.render('curation/report_page.html', sections=sections)


def _statistics(name, result) -> dict[str, int]:
  texts = [table.joined(row, result.text) for row in result.parts[name]]
  found = [word for text in texts for word in words.words(text.casefold())]
  return {
      'rows': len(texts),
      'augmented': len(result.augmented) if name == 'train' else 0,
      'words': len(found), 'different_words': len(set(found)),
      'characters': sum(len(words.aksharas(text)) for text in texts)}


def _styles(result) -> dict[str, dict[str, int]]:
  counts = collections.defaultdict(lambda: dict.fromkeys(splits.NAMES, 0))
  for name, rows in result.parts.items():
    for row in rows:
      counts[table.as_text(row.fields.get(result.balance)).strip()][name] += 1
  return dict(sorted(counts.items()))


def _spread(changes, n):
  """Returns up to n changes, evenly spread from the first one on."""
  return changes if len(changes) <= n else [
      changes[i * len(changes) // n] for i in range(n)]


def _visible(text: str) -> str:
  """Returns the text with names for invisible characters."""
  text = regex.sub('  +', lambda m: '␣' * len(m[0]), text.replace('\n', '⏎'))
  return _INVISIBLE.sub(lambda m: f'⟨U+{ord(m[0]):04X}⟩', text)


def _shorten(text: str) -> str:
  if len(text) <= _MAX_LENGTH:
    return text
  half = _MAX_LENGTH // 2
  return f'{text[:half]} … {text[-half:]}'


def _escape_markdown(text: str) -> str:
  return regex.sub(r'([\\`*_<>\[\]#])', r'\\\1', text).replace('\n', ' ')
