"""Song lyrics in several scripts, judged by script, lines and refrain."""

from collections.abc import Sequence
from typing import Any

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.lyrics import verse

# How well a song keeps to what its opening and its reference set. BLEU and chrF
# ask whether it is one particular song of the many that could follow; `form`
# measures what all of those have in common.
HEADLINE = 'form'
LOWER_IS_BETTER = frozenset({'copied', 'repeated'})
FIELDS = ('opening', 'style', 'language')

# How many lines of a song the prompt gives: a couplet shows the metre and, in a
# ghazal, the refrain.
_OPENING = 2
_PROMPT = 'Continue this {language} {style}, line by line.\n\n{opening}'
# The first character of a script in Unicode, to guess the language of a song
# that does not name it.
_LANGUAGES = {'\u0900': 'Hindi', '\u0980': 'Bengali', '\u0600': 'Urdu'}
# The script of an opening without letters.
_SCRIPTS = {'Hindi': 'DEVANAGARI', 'Bengali': 'BENGALI', 'Urdu': 'ARABIC'}
# How far the number of lines may differ: by a couplet, the unit of songs and
# ghazals, or by a quarter of a long song.
_MAX_LINES_OFF, _MAX_SHARE_OFF = 2, 0.25
_MEANS = ('form', 'script', 'lines', 'refrain', 'rhyme', 'line_length', 'exact',
          'repeated', 'copied')


def to_messages(record: records_lib.Record) -> Sequence[chat.Message]:
  """Returns a request to continue a song's opening, and the rest of the song.

  Reads {text or lines, style, language}; the default style is 'song'. With
  {script: 'roman'} the lines are those of `romanized`, if the record has it.
  {opening, style, language} has no song, so its answer is ''.

  Raises:
    UserError: if a song is not longer than its opening.
  """
  opening, rest = _parts(record)
  style = record.fields.get('style') or 'song'
  return [
      chat.Message('user', _PROMPT.format(
          language=language(record), style=style, opening='\n'.join(opening))),
      chat.Message('model', '\n'.join(rest))]


def to_form(record: records_lib.Record) -> dict[str, str]:
  """Returns the opening of a song, its style and its language."""
  opening, _ = _parts(record)
  return {'opening': '\n'.join(opening), 'language': language(record),
          'style': record.fields.get('style') or 'song'}


def song_lines(record: records_lib.Record) -> list[str]:
  """Returns the lines of a song that are not blank."""
  fields = record.fields
  lines = fields.get('lines', fields.get('text', fields.get('opening')))
  if fields.get('script') == 'roman' and fields.get('romanized'):
    lines = fields['romanized']
  if isinstance(lines, str):
    lines = lines.split('\n')
  if (not isinstance(lines, Sequence) or not lines
      or not all(isinstance(line, str) for line in lines)):
    raise tasks.wrong_columns(record, 'text, or lines as a list', 'text=lyrics')
  return [line.strip() for line in lines if line.strip()]


def language(record: records_lib.Record) -> str:
  """Returns the language's English name, guessed by its script if not given.
  """
  if record.fields.get('language'):
    return record.fields['language']
  text = '\n'.join(song_lines(record))
  counts = {
      name: sum(first <= c < chr(ord(first) + 0x80) for c in text)
      for first, name in _LANGUAGES.items()}
  best = max(counts, key=counts.get)
  return best if counts[best] else 'romanised'


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
    records: Sequence[records_lib.Record],
    completions: Sequence[str],
    training: Sequence[records_lib.Record] = (),
) -> tasks.Judged:
  """Scores completions by what their openings and references set.

  Means over the completions:

    form: script * lines * refrain * (1 - repeated). If the song has no refrain,
      its factor is rhyme over the reference's rhyme, at most 1.
    script: the share of letters in the opening's script.
    lines: 1 if the number of lines is the reference's, within a couplet or a
      quarter; else 0.
    refrain: over songs whose opening returns, how well it returns as often and
      after as many lines as in the reference (`verse.Refrain`).
    rhyme: the share of lines that end like a line near them.
    line_length: how close the lines are to the opening's length in aksharas.
    exact: whether the completion is the reference, word for word.
    repeated: the share of lines that appeared before, beyond the reference's.
    copied: the share of lines that are in training songs and not in the
      opening. Only with `training`.

  Over all completions together: `bleu` (sacreBLEU's international tokenisation)
  and `chrf` (chrF++); each row has its own as sentence_bleu and sentence_chrf.
  An opening without a song has no reference, so its row has only script, rhyme,
  line_length and copied.
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
    row['refrain'] = refrain.score(lines, rest)
    row['form'] *= row['refrain']
  elif rhyme := verse.rhyme(opening, rest):
    row['form'] *= min(1.0, row['rhyme'] / rhyme)
  return row


def _overlap(rows, references, completions):
  """Returns BLEU and chrF++ over all songs, and adds each song's to its row."""
  from sacrebleu import metrics  # Imports lxml, which only judging needs.

  scored = [(row, ' '.join(lines), ' '.join(verse.lines(completion)))
            for row, lines, completion in zip(rows, references, completions)
            if lines]
  if not scored:
    return {}
  # The default tokenisation, 13a, does not split a danda from its word. With
  # effective_order, a song without four common words in a row still scores.
  bleu = metrics.BLEU(tokenize='intl', effective_order=True)
  corpus = metrics.BLEU(tokenize='intl')
  chrf = metrics.CHRF(word_order=2)
  for row, reference, hypothesis in scored:
    row['sentence_bleu'] = bleu.sentence_score(
        hypothesis, [reference]).score / 100
    row['sentence_chrf'] = chrf.sentence_score(
        hypothesis, [reference]).score / 100
  texts = [[h for *_, h in scored], [[r for _, r, _ in scored]]]
  # A perfect score is 100 plus a rounding error.
  return {'bleu': min(1.0, corpus.corpus_score(*texts).score / 100),
          'chrf': min(1.0, chrf.corpus_score(*texts).score / 100)}


def check_answers(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns a line for each song in two scripts, with markup, or repeated."""
  problems, first = [], {}
  for record in records:
    if _is_question(record):
      continue
    opening, rest = _parts(record)
    script = _script(record, opening)
    text = '\n'.join(rest)
    if (share := verse.script_share(text, script)) < 0.95:
      problems.append(
          f'{record.where}: {1 - share:.0%} of the letters are not'
          f' {script.title()}')
    if '</' in text or '&#' in text or '&nbsp;' in text or '<br' in text:
      problems.append(f'{record.where}: HTML is left in the lines')
    song = tuple(map(verse.key, opening))
    if song in first:
      problems.append(
          f'{record.where}: opens with the same lines as {first[song]}')
    first.setdefault(song, record.where)
  return problems
