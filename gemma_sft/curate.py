r"""Cleans a raw collection of texts and divides it into three splits.

    python -m gemma_sft.curate --config=configs/curation.py \
        --config.source=raw.csv --out=DIR
    python -m gemma_sft.curate --config=configs/curation.py:lyrics --dry_run

Writes train.jsonl, validation.jsonl and test.jsonl; removed.jsonl, every row
that was removed and why; changes.jsonl, every cell that was changed, before and
after; review.jsonl, lines with listed words, none of which are removed; and a
summary as report.json, report.md and report.html. configs/curation.py has every
setting with its reason.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.curate', cli.CONFIG, cli.OVERWRITE,
      cli.text('out', None, 'Folder to write to.'),
      cli.switch('dry_run', False, 'Print the report and write nothing.'),
      cli.integer('examples', 3, 'Number of examples to show of each step.'),
      template='configs.curation')

from collections.abc import Iterable
from collections.abc import Sequence
import csv
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import regex

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import pages
from gemma_sft.curation import augment
from gemma_sft.curation import characters
from gemma_sft.curation import duplicates
from gemma_sft.curation import report as report_lib
from gemma_sft.curation import romanise
from gemma_sft.curation import settings
from gemma_sft.curation import splits
from gemma_sft.curation import table
from gemma_sft.curation import words
from gemma_sft.inputs import records as records_lib

_FILES = (
    *(f'{name}.{kind}' for name in splits.NAMES for kind in ('jsonl', 'csv')),
    'removed.jsonl', 'changes.jsonl', 'review.jsonl', 'report.json',
    'report.md', 'report.html')
# A larger share of words with a capital inside is taken for ITRANS, HK or SLP1.
_ROMANISED = 0.1
# A note is made of a split whose share is further than this from its fraction.
_TOLERANCE = 0.03


def main(
    config: Any, out: str | None, dry_run: bool = False,
    overwrite: bool = False, examples: int = 3) -> int:
  """Curates; see the module's docstring."""
  cli.require('config', config, '--config=configs/curation.py:lyrics')
  settings.validate(config)
  if examples < 0:
    raise errors.UserError(
        f'--examples={examples}', '0 or more', 'leave it out for three')
  if not dry_run:
    _check_folder(cli.require('out', out, '--out=curated'), overwrite,
                  config.source)
  result = curate(config)
  sections = report_lib.make_sections(result, examples)
  print(report_lib.to_markdown(sections))
  if not dry_run:
    _write(pathlib.Path(out), result, config, sections, examples)
    print(f'\nwritten to {out}')
  return 0


def curate(config: Any) -> report_lib.CurationResult:
  """Returns the splits of the collection, and a log of everything done.

  Raises:
    UserError: for a source that cannot be read, a column that it lacks, or a
      step that would lose meaning.
  """
  log = table.ChangeLog()
  fill = config_lib.parse_columns(config.fill, 'fill')
  # Blank rows too, so that they are counted.
  rows = [table.TableRow(row.where, row.fields) for row in records_lib.read(
      config.source, format=config.format, validated=False,
      columns=config_lib.parse_columns(config.rename, 'rename'))]
  num_read = len(rows)
  known = table.columns(rows)
  for key in ('text', 'punctuation', 'required', 'groups', 'romanise'):
    table.require_columns(key, config[key], known)
  table.require_columns('fill', (*fill, *fill.values()), known)
  table.require_columns('balance', filter(None, [config.balance]), known)
  text = config.text or tuple(
      name for name in known
      if any(table.is_text(row.fields.get(name)) for row in rows))
  augment.check_templates(config.augment_templates, known)
  entries = [e for name in config.lists for e in words.load_list(name)]

  _clean_characters(rows, log, config, text, known)
  log.begin('fill', fill)
  table.fill_missing(rows, log, fill)
  log.begin('missing')
  rows = table.remove_incomplete(
      rows, log, required=config.required, max_missing=config.max_missing,
      min_lines=config.min_lines, text=text, known=known)
  log.begin('punctuation', config.punctuation)
  table.repair_punctuation(
      rows, log, config.punctuation, config.punctuation_share)
  if log.begin('duplicates', config.duplicates):
    rows = duplicates.remove_duplicates(
        rows, log, text, config.duplicates, config.ngram)
  parts = _split(rows, log, config, text)
  log.begin('augment', config.augment)
  augmented = augment.augment(
      parts['train'], log, methods=config.augment, share=config.augment_share,
      names=text, templates=config.augment_templates, keep=config.augment_keep,
      seed=config.seed)
  all_rows = [*rows, *augmented]
  log.begin('romanise', config.romanise)
  _romanise(all_rows, log, config.romanise, config.scheme)
  if log.begin('tokens', config.tokens):
    _add_tokens(all_rows, log, text, config.tokens)
  assert num_read == len(rows) + len(log.removals)
  return report_lib.CurationResult(
      source=config.source, text=text, balance=config.balance,
      num_read=num_read, log=log, parts=parts, augmented=augmented,
      flags=[flag for name, part in parts.items()
             for flag in _flags(part, name, text, entries)],
      leaks=splits.leaks(parts, config.groups, text, config.opening,
                         config.duplicates or 1.0, config.ngram))


def _clean_characters(rows, log, config, text, known) -> None:
  """Applies the steps on single cells, all but lower case to all columns."""
  # A title with a stray tag would separate songs that belong together.
  steps = (
      ('html', config.html, characters.strip_html,
       'markup is not part of a text'),
      ('symbols', config.symbols,
       functools.partial(regex.sub, config.symbols, ''),
       'symbols that stand for no sound'),
      ('encoding', config.unicode, characters.repair_encoding,
       'wrongly decoded'),
      ('invisible', config.unicode, characters.remove_invisible,
       'zero width, and not a joiner that its script needs'),
      ('letters', config.unicode, characters.compose_nukta,
       'one form of each letter: NFC, a nukta joined to its letter'),
      ('whitespace', config.whitespace, characters.regular_whitespace,
       'one space between words, at most one blank line'),
      ('lower', config.lower, characters.lower, 'lower case'))
  for step, setting, function, why in steps:
    if log.begin(step, setting):
      names = text if step == 'lower' else known
      if step == 'lower':
        _check_case(rows, log, config, text)
      table.apply_text(rows, log, step, names, function, why)


def _check_case(rows, log, config, text) -> None:
  """Raises if lower case would lose a sound; notes texts without case."""
  texts = [table.as_text(row.fields.get(name)) for row in rows for name in text]
  own, cased = config.romanised, romanise.CASED
  if config.romanise and config.scheme in cased:
    problem = f'config.scheme is {config.scheme}'
  elif own in cased:
    problem = f'config.romanised is {own}'
  elif not own and (
      share := characters.capitals_inside('\n'.join(texts))) > _ROMANISED:
    problem = (f'{share:.0%} of the words have a capital inside, as in ITRANS,'
               ' HK or SLP1')
  else:
    if caseless := sum(
        bool(t.strip()) and t.lower() == t.upper() for t in texts):
      log.notes.append(
          f'lower: {caseless} of {len(texts)} texts are in scripts without'
          ' case and stay unchanged')
    return
  raise errors.UserError(
      f'config.lower=True, but {problem}: there a capital is another sound'
      ' (a and A, t and T)',
      'lower=False, or a scheme without capitals: '
      + ', '.join(s for s in romanise.SCHEMES if s not in cased),
      'set --config.lower=false or --config.scheme=iast; for text that is not'
      ' romanised set --config.romanised=none')


def _split(rows, log, config, text) -> dict[str, list[table.TableRow]]:
  """Returns the rows of each split; groups and openings stay together."""
  pairs = []
  if config.opening:
    starts = [splits.opening(row, text, config.opening) for row in rows]
    pairs = duplicates.similar_pairs(
        starts, config.duplicates or 1.0, config.ngram)
  members = splits.groups(rows, config.groups, pairs)
  num_splits = sum(map(bool, config.fractions))
  if len(members) < num_splits:
    log.notes.append(f'split: {len(rows)} rows are in {len(members)} groups,'
                     f' too few for {num_splits} splits')
  largest = max(map(len, members), default=0)
  if len(rows) > 1 and largest > len(rows) / 2:
    log.notes.append(
        f'split: one group has {largest} of the {len(rows)} rows; fewer'
        ' columns in config.groups make smaller groups')
  chosen = splits.split(
      rows, members, config.fractions, config.balance, config.seed)
  for (name, part), wanted in zip(chosen.items(), config.fractions):
    if abs(len(part) - wanted * len(rows)) > max(1, _TOLERANCE * len(rows)):
      log.notes.append(
          f'split: {name} has {len(part) / len(rows):.0%} of the rows instead'
          f' of {wanted:.0%}: groups stay whole, and the largest has {largest}'
          ' rows')
  return {name: [rows[i] for i in part] for name, part in chosen.items()}


def _romanise(rows, log, names, scheme) -> None:
  for row in rows:
    for column in (f'{name}_{scheme}' for name in names):
      if column in row.read:
        raise errors.UserError(
            f'config.romanise: {row.where} has a column {column!r}',
            'an unused name',
            f"rename it: --config.rename='{column}_original={column}'")
  unknown: set[str] = set()
  for row, name, cell in table.text_cells(rows, names):
    column = f'{name}_{scheme}'
    latin = table.applied(romanise.romanise, cell, scheme)
    unknown.update(romanise.leftover(table.as_text(latin)))
    log.change(row, column, 'romanise', latin, f'{name} in {scheme}')
  if unknown:
    log.notes.append(
        f'romanise: {scheme} has no letter for {" ".join(sorted(unknown))}')


def _add_tokens(rows, log, text, kind) -> None:
  function = words.words if kind == 'words' else words.aksharas
  for row, name, cell in table.text_cells(rows, text):
    log.change(row, f'{name}_{kind}', 'tokens', function(table.as_text(cell)),
               f'{kind} of {name}')


def _flags(rows, split, text, entries) -> Iterable[dict[str, Any]]:
  """Yields a line of review.jsonl for each line with a listed word."""
  for row in rows:
    for name in text:
      lines = table.as_text(row.fields.get(name)).split('\n')
      for number, line in enumerate(lines, 1):
        if found := words.find_listed(line, entries):
          yield {'where': row.where, 'split': split, 'column': name,
                 'line': number, 'text': line,
                 'found': [' '.join(e.words) for e in found],
                 'lists': sorted({e.list_name for e in found})}


def _check_folder(out: str, overwrite: bool, source: str) -> None:
  """Raises if writing would destroy files that somebody may want to keep."""
  if os.path.exists(out) and not os.path.isdir(out):
    raise errors.UserError(f'--out={out} is a file', 'a folder', 'name another')
  if not overwrite and os.path.isdir(out) and os.listdir(out):
    raise errors.UserError(
        f'--out={out} is not empty', 'a new or an empty folder',
        'name another, or add --overwrite to replace the files of an earlier'
        ' run')
  written = {os.path.realpath(os.path.join(out, name)) for name in _FILES}
  for path in [] if ':' in source else records_lib.paths(source, 'auto'):
    if os.path.realpath(path) in written:
      raise errors.UserError(
          f'--out={out} would replace the source {path}', 'another folder',
          'name another')


def _write(folder, result, config, sections, examples) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name in _FILES:  # No file of an earlier run may stay beside this one's.
    (folder / name).unlink(missing_ok=True)
  for name, rows in result.written().items():
    fields = [row.fields for row in rows]
    _write_jsonl(folder / f'{name}.jsonl', fields)
    if config.csv:
      _write_csv(folder / f'{name}.csv', fields, table.columns(rows))
  for name, items in (('removed', result.log.removals),
                      ('changes', result.log.changes)):
    _write_jsonl(folder / f'{name}.jsonl', map(dataclasses.asdict, items))
  _write_jsonl(folder / 'review.jsonl', result.flags)
  report = report_lib.to_json(result, examples) | {
      'seed': config.seed, 'config': dict(config_lib.leaves(config))}
  pages.write(folder / 'report.json', json.dumps(
      report, indent=1, ensure_ascii=False, default=str) + '\n')
  pages.write(
      folder / 'report.md', report_lib.to_markdown(sections) + '\n')
  pages.write(folder / 'report.html', report_lib.to_html(sections) + '\n')


def _write_jsonl(path, items: Iterable[dict[str, Any]]) -> None:
  with open(path, 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(item, ensure_ascii=False, default=str) + '\n'
                    for item in items)


def _write_csv(path, items: Sequence[dict[str, Any]], names) -> None:
  """Writes a table; a list of lines becomes a cell of several lines."""
  with open(path, 'w', encoding='utf-8', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows([
        names, *([table.as_text(item.get(name)) for name in names]
                 for item in items)])
