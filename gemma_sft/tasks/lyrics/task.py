"""Song lyrics in a person's language, judged by script, lines and refrain."""

from collections.abc import Sequence
from typing import Any

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.lyrics import verse

# How far a song holds to what its opening and its reference set. BLEU and chrF
# ask whether it is one certain song of the many that could follow; the parts
# of `form` are what all of those share.
HEADLINE = 'form'
LOWER_IS_BETTER = frozenset({'copied', 'repeated'})
FIELDS = ('opening', 'style', 'language')

# Lines that open a song and are given in the prompt: a couplet shows the metre
# and, in a ghazal, the refrain.
_OPENING = 2
_PROMPT = 'Continue this {language} {style}, line by line.\n\n{opening}'
# Scripts by their first character in Unicode: enough to name the language of a
# song that does not name it.
_LANGUAGES = {'\u0900': 'Hindi', '\u0980': 'Bengali', '\u0600': 'Urdu'}
# For an opening without letters.
_SCRIPTS = {'Hindi': 'DEVANAGARI', 'Bengali': 'BENGALI', 'Urdu': 'ARABIC'}
# How many lines more or less are fine: a couplet, which is the unit that songs
# and ghazals grow by, or a quarter of a long song.
_SPARE_LINES, _SPARE_SHARE = 2, 0.25


def to_messages(record: records_lib.Record) -> Sequence[chat.Message]:
  """Returns the opening of a song, and the rest of it.

  Takes {text or lines, style, language}; style is 'song' where there is none.
  With {script: 'roman'} the lines are those of `romanized`, if it has them.
  {opening, style, language} gives the prompt, and '' as the answer.

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
  """Returns the lines of a song; blank ones are left out."""
  fields = record.fields
  lines = fields.get('lines', fields.get('text', fields.get('opening')))
  if fields.get('script') == 'roman' and fields.get('romanized'):
    lines = fields['romanized']
  if isinstance(lines, str):
    lines = lines.split('\n')
  if (not isinstance(lines, Sequence) or not lines
      or not all(isinstance(line, str) for line in lines)):
    raise errors.UserError(
        f'{record.where}: columns {", ".join(fields)}',
        'text, or lines as a list', "name your column:"
        " --config.data.columns='text=lyrics'")
  return [line.strip() for line in lines if line.strip()]


def language(record: records_lib.Record) -> str:
  """Returns the language's English name, told by its script if not given."""
  if record.fields.get('language'):
    return record.fields['language']
  text = '\n'.join(song_lines(record))
  counts = {
      name: sum(first <= c < chr(ord(first) + 0x80) for c in text)
      for first, name in _LANGUAGES.items()}
  best = max(counts, key=counts.get)
  return best if counts[best] else 'romanised'


def _asks(record):
  """Whether a record is an opening to go on from, without the song."""
  return record.fields.keys().isdisjoint({'lines', 'text'})


def _parts(record):
  """Returns the lines of the opening and those of the rest."""
  lines = song_lines(record)
  if _asks(record):
    if not lines:
      raise errors.UserError(
          f'{record.where}: the opening is empty', 'the first lines of a song',
          'type one line or more')
    return lines, []
  if len(lines) <= _OPENING:
    raise errors.UserError(
        f'{record.where}: {len(lines)} lines',
        f'at least {_OPENING + 1}: {_OPENING} open the song in the prompt',
        'remove the row, or give a line of the song a line of the file')
  return lines[:_OPENING], lines[_OPENING:]


def _script(record, opening):
  """Returns the script that a song is to go on in: that of its opening."""
  return verse.script(' '.join(opening)) or _SCRIPTS.get(
      language(record), 'LATIN')


def judge(
    records: Sequence[records_lib.Record],
    completions: Sequence[str],
    training: Sequence[records_lib.Record] = (),
) -> tasks.Judged:
  """Scores completions by what their openings and references set.

  Means over the completions: `form`, the product of the next three and of 1 -
  repeated, with rhyme as a share of the reference's where nothing returns;
  `script`, the share of letters in the opening's script; `lines`, whether there
  are as many as in the reference, give or take a couplet or a quarter;
  `refrain`, over songs whose opening comes back, how well it does so as often
  and after as many lines as in the reference; `rhyme`, the share of lines that
  end like one near them; `line_length`, how near lines are to the opening's
  length in aksharas; `exact`, the reference word for word; `repeated`, the
  share of lines that stood before, beyond the reference's; `copied`, the share
  of lines that stand in training songs and not in the opening (with `training`
  alone).

  Over all of them: `bleu` (sacreBLEU's international tokenisation) and `chrf`
  (chrF++). Rows have these of their own as sentence_bleu and sentence_chrf. An
  opening without a song has no reference: its row has script, rhyme,
  line_length and copied.
  """
  known = _training_lines(training)
  parts = [_parts(record) for record in records]
  rows = [_row(record, opening, rest, completion, known)
          for record, (opening, rest), completion in zip(
              records, parts, completions)]
  metrics = {}
  for name in ('form', 'script', 'lines', 'refrain', 'rhyme', 'line_length',
               'exact', 'repeated', 'copied'):
    values = [row[name] for row in rows if name in row]
    # Without one row that has it there is nothing to say of it, but a judge of
    # no answers at all still names its headline.
    if values or name == HEADLINE:
      metrics[name] = sum(values) / max(1, len(values))
  metrics |= _overlap(rows, [rest for _, rest in parts], completions)
  return tasks.Judged(metrics | {'n': len(rows)}, rows)


def _row(record, opening, rest, completion, known):
  lines = verse.lines(completion)
  row: dict[str, Any] = {
      'script': verse.script_share(completion, _script(record, opening)),
      'rhyme': verse.rhyme(opening, lines),
      'line_length': verse.evenness(opening, lines)}
  if known:
    own = {verse.key(line) for line in opening}
    row['copied'] = sum(
        k in known and k not in own for k in map(verse.key, lines)
    ) / max(1, len(lines))
  if not rest:
    return row
  spare = max(_SPARE_LINES, _SPARE_SHARE * len(rest))
  row['lines'] = float(bool(lines) and abs(len(lines) - len(rest)) <= spare)
  row['repeated'] = max(0.0, verse.repeats(opening, lines)
                        - verse.repeats(opening, rest))
  row['exact'] = float([*map(verse.key, lines)] == [*map(verse.key, rest)])
  row['form'] = row['script'] * row['lines'] * (1 - row['repeated'])
  if refrain := verse.refrain(opening, rest):
    row['refrain'] = refrain.kept(lines, rest)
    row['form'] *= row['refrain']
  elif rhyme := verse.rhyme(opening, rest):
    row['form'] *= min(1.0, row['rhyme'] / rhyme)
  return row


def _training_lines(training):
  return {verse.key(line) for record in training
          for line in song_lines(record)} - {''}


def _overlap(rows, references, completions):
  """Returns BLEU and chrF++ of all, and adds those of each to its row."""
  from sacrebleu import metrics  # With lxml and numpy: only to judge.

  scored = [(row, ' '.join(lines), ' '.join(verse.lines(completion)))
            for row, lines, completion in zip(rows, references, completions)
            if lines]
  if not scored:
    return {}
  # The default, 13a, leaves a danda on its word. effective_order: a song may
  # well share no four words in a row with another.
  bleu = metrics.BLEU(tokenize='intl', effective_order=True)
  corpus = metrics.BLEU(tokenize='intl')
  chrf = metrics.CHRF(word_order=2)
  for row, reference, hypothesis in scored:
    row['sentence_bleu'] = bleu.sentence_score(
        hypothesis, [reference]).score / 100
    row['sentence_chrf'] = chrf.sentence_score(
        hypothesis, [reference]).score / 100
  texts = [[h for *_, h in scored], [[r for _, r, _ in scored]]]
  # A perfect score comes back as a hundred and a rounding error.
  return {'bleu': min(1.0, corpus.corpus_score(*texts).score / 100),
          'chrf': min(1.0, chrf.corpus_score(*texts).score / 100)}


def check_answers(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns a line for each song in two scripts, with markup, or seen twice."""
  problems, first = [], {}
  for record in records:
    if _asks(record):
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
