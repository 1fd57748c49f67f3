"""Song lyrics in several scripts, judged by script, lines and refrain."""

from collections.abc import Sequence
from typing import Any

from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.tasks.lyrics import verse

# How well a song keeps to what its opening and its reference set. BLEU and chrF
# ask whether it is one particular song of the many that could follow; `form`
# measures what all of those have in common.
HEADLINE = 'form'
LOWER_IS_BETTER = frozenset({'copied', 'repeated'})
FIELDS = ('opening', 'style', 'language')

# Lines of a song in the prompt: a couplet shows the metre and, in a ghazal, the
# refrain.
_OPENING = 2
_PROMPT = 'Continue this {language} {style}, line by line.\n\n{opening}'
# To guess the language of a song that does not name it, and the script of an
# opening without letters.
_SCRIPTS = {'Hindi': 'DEVANAGARI', 'Bengali': 'BENGALI', 'Urdu': 'ARABIC'}
# How far the number of lines may differ: by a couplet, the unit of songs and
# ghazals, or by a quarter of a long song.
_MAX_LINES_OFF, _MAX_SHARE_OFF = 2, 0.25
_MEANS = ('form', 'script', 'lines', 'refrain', 'rhyme', 'line_length', 'exact',
          'repeated', 'copied')


def to_messages(record: tasks.Record) -> tasks.Conversation:
  """Returns a request to continue a song's opening, and the rest of the song.

  Reads {text or lines, style, language}, or a form's {opening, style, language}
  with the answer ''. With {script: 'roman'} the lines are those of `romanized`,
  if the record has it.

  Raises:
    UserError: if a song is not longer than its opening.
  """
  _, rest = _parts(record)
  return tasks.conversation(
      _PROMPT.format(**to_form(record)), '\n'.join(rest))


def to_form(record: tasks.Record) -> dict[str, str]:
  """Returns the opening of a song, its style and its language."""
  opening, _ = _parts(record)
  return {'opening': '\n'.join(opening), 'language': language(record),
          'style': record.fields.get('style') or 'song'}


def song_lines(record: tasks.Record) -> list[str]:
  """Returns the lines of a song that are not blank."""
  fields = record.fields
  lines = fields.get('lines', fields.get('text', fields.get('opening')))
  if fields.get('script') == 'roman':
    lines = fields.get('romanized') or lines
  if isinstance(lines, str):
    lines = lines.split('\n')
  if (not isinstance(lines, Sequence) or not lines
      or not all(isinstance(line, str) for line in lines)):
    raise tasks.wrong_columns(record, 'text, or lines as a list', 'text=lyrics')
  return [line.strip() for line in lines if line.strip()]


def language(record: tasks.Record) -> str:
  """Returns the language's English name, guessed from the script if missing."""
  if given := record.fields.get('language'):
    return given
  counts = verse.scripts('\n'.join(song_lines(record)))
  best = max(_SCRIPTS, key=lambda name: counts[_SCRIPTS[name]])
  return best if counts[_SCRIPTS[best]] else 'romanised'


def _is_question(record):
  """Whether a record is an opening without a song."""
  return record.fields.keys().isdisjoint({'lines', 'text'})


def _parts(record):
  """Returns the lines of the opening and those of the rest."""
  lines = song_lines(record)
  if _is_question(record):
    if not lines:
      raise errors.UserError(
          f'{record.where}: the opening is empty', 'the first lines of a song',
          'enter at least one line')
    return lines, []
  if len(lines) <= _OPENING:
    raise errors.UserError(
        f'{record.where}: {len(lines)} lines',
        f'at least {_OPENING + 1}: the prompt shows the first {_OPENING}',
        'remove the row, or put each line of the song on its own line')
  return lines[:_OPENING], lines[_OPENING:]


def _script(record, opening):
  """Returns the script that a song must continue in: that of its opening."""
  return verse.script(' '.join(opening)) or _SCRIPTS.get(
      language(record), 'LATIN')


def judge(
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Scores completions by what their openings and references set.

  Means over the completions:

    form: script * lines * refrain * (1 - repeated). If the song has no refrain,
      its factor is rhyme over the reference's rhyme, at most 1.
    script: the share of letters in the opening's script.
    lines: 1 if the number of lines is the reference's, within a couplet or a
      quarter; else 0.
    refrain: over songs whose opening returns, how well it returns as often and
      after as many lines as in the reference (`verse.returns`).
    rhyme: the share of lines that end like a line near them.
    line_length: how close the lines are to the opening's length in aksharas.
    exact: whether the completion is the reference, word for word.
    repeated: the share of lines that appeared before, beyond the reference's.
    copied: the share of lines that are in `training` and not in the opening;
      missing without `training`.

  Over all completions together: `bleu` (sacreBLEU's international tokenisation)
  and `chrf` (chrF++); each row has its own as sentence_bleu and sentence_chrf.
  An opening without a song has no reference, so its row lacks the metrics that
  need one.
  """
  known = {verse.key(line) for record in training
           for line in song_lines(record)} - {''}
  parts = [_parts(record) for record in records]
  rows = [_row(record, opening, rest, completion, known)
          for record, (opening, rest), completion in zip(
              records, parts, completions)]
  metrics = {HEADLINE: 0.0} | tasks.means(rows, _MEANS)
  metrics |= _overlap(rows, [rest for _, rest in parts], completions)
  return tasks.Judged(metrics | {'n': len(rows)}, rows)


def _row(record, opening, rest, completion, known):
  lines = verse.lines(completion)
  row: dict[str, Any] = {
      'script': verse.script_share(completion, _script(record, opening)),
      'rhyme': verse.rhyme(opening, lines),
      'line_length': verse.length_match(opening, lines)}
  if known:
    own = {verse.key(line) for line in opening}
    row['copied'] = sum(
        k in known and k not in own for k in map(verse.key, lines)
    ) / max(1, len(lines))
  if not rest:
    return row
  max_off = max(_MAX_LINES_OFF, _MAX_SHARE_OFF * len(rest))
  row['lines'] = float(bool(lines) and abs(len(lines) - len(rest)) <= max_off)
  row['repeated'] = max(0.0, verse.repeats(opening, lines)
                        - verse.repeats(opening, rest))
  row['exact'] = float([*map(verse.key, lines)] == [*map(verse.key, rest)])
  row['form'] = row['script'] * row['lines'] * (1 - row['repeated'])
  if refrain := verse.refrain(opening, rest):
    row['refrain'] = verse.returns(refrain, lines, rest)
    row['form'] *= row['refrain']
  elif rhyme := verse.rhyme(opening, rest):
    row['form'] *= min(1.0, row['rhyme'] / rhyme)
  return row


def _overlap(rows, references, completions):
  """Returns BLEU and chrF++ over all songs, and adds each song's to its row."""
  from sacrebleu import metrics  # Imports lxml, which only judging needs.

  scored = [(row, ' '.join(verse.lines(completion)), [' '.join(lines)])
            for row, lines, completion in zip(rows, references, completions)
            if lines]
  if not scored:
    return {}
  # The default tokenisation, 13a, does not split a danda from its word. With
  # effective_order, a song without four common words in a row still scores.
  bleu = metrics.BLEU(tokenize='intl', effective_order=True)
  corpus = metrics.BLEU(tokenize='intl')
  chrf = metrics.CHRF(word_order=2)
  for row, *texts in scored:
    row['sentence_bleu'] = bleu.sentence_score(*texts).score / 100
    row['sentence_chrf'] = chrf.sentence_score(*texts).score / 100
  texts = [h for _, h, _ in scored], [[r for _, _, (r,) in scored]]
  # A perfect score is 100 plus a rounding error.
  return {name: min(1.0, score.corpus_score(*texts).score / 100)
          for name, score in (('bleu', corpus), ('chrf', chrf))}


def check_answers(records: tasks.Records) -> list[str]:
  """Returns a line for each song in two scripts, with markup, or repeated."""
  problems, first = [], {}
  for record in records:
    if _is_question(record):
      continue
    opening, rest = _parts(record)
    script, text = _script(record, opening), '\n'.join(rest)
    if (share := verse.script_share(text, script)) < 0.95:
      problems.append(
          f'{record.where}: {1 - share:.0%} of the letters are not'
          f' {script.title()}')
    if any(markup in text for markup in ('</', '&#', '&nbsp;', '<br')):
      problems.append(f'{record.where}: HTML is left in the lines')
    song = tuple(map(verse.key, opening))
    if song in first:
      problems.append(
          f'{record.where}: opens with the same lines as {first[song]}')
    first.setdefault(song, record.where)
  return problems
