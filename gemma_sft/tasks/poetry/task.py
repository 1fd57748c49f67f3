"""Classical Chinese poems, judged by form, rhyme book and tone pattern.

Real poems do not always pass (many are in an older, free style), so the judge
also gives each rate relative to theirs.
"""

import collections
import functools
import hashlib
import itertools
import re
from typing import Any
from typing import Sequence

from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.tasks.poetry import pingshui

HEADLINE = 'rhyme'
LOWER_IS_BETTER = frozenset({'copied', 'repeated'})
FIELDS = ('title', 'form', 'rhyme')

# {characters per line x lines: (traditional name, simplified name)}.
FORMS = {
    '5x4': ('五言絕句', '五言绝句'),
    '7x4': ('七言絕句', '七言绝句'),
    '5x8': ('五言律詩', '五言律诗'),
    '7x8': ('七言律詩', '七言律诗'),
}
# The share of real poems that rhyme, and that follow a tone pattern, by this
# judge: tests/benchmarks/calibrate_poetry.py on 3,300 poems (790, 825, 835 and
# 850) by Tang poets in github.com/chinese-poetry/chinese-poetry, in the old and
# the new style.
REAL_RHYME = {'5x4': 0.759, '7x4': 0.952, '5x8': 0.911, '7x8': 0.929}
REAL_TONE = {'5x4': 0.549, '7x4': 0.862, '5x8': 0.775, '7x8': 0.847}

_PROMPT = ('請以《{title}》為題，寫一首{form}{rhyme}。',
           '请以《{title}》为题，写一首{form}{rhyme}。')
# The rhyme and its commonest words, as poets write with the rhyme book.
_RHYME = '，押「{name}」韻（{words}）'
_DEFAULT_FORM = '7x4'
# A question that names no rhyme gets one of this many that poets use most.
_N_COMMON_RHYMES = 10
_NAMES = {name: form for form, names in FORMS.items() for name in names} | {
    '五絕': '5x4', '五绝': '5x4', '七絕': '7x4', '七绝': '7x4',
    '五律': '5x8', '七律': '7x8'}
_BREAK = re.compile(r'[，。！？；：、,.!?;\s]+')
_HAN = re.compile('[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+')
_MEANS = ('form', 'rhyme', 'asked_rhyme', 'tone', 'rhyme_of_real',
          'tone_of_real', 'sentence_bleu4', 'copied', 'repeated')


def to_messages(record: tasks.Record) -> tasks.Conversation:
  """Returns a request for the poem by title, form and rhyme, and the poem.

  Reads {title, text, form, rhyme} or chinese-poetry's {title, paragraphs}; text
  without a title is trained as plain text. The answer is '' without a poem. The
  request names the rhyme, if any (`asked_rhyme`), and twelve of its words.

  Raises:
    UserError: if there is no poem, none of the four forms, or no such rhyme.
  """
  title = record.fields.get('title')
  text = poem_text(record) if has_poem(record) else ''
  if not title:
    if text:
      return text
    raise errors.UserError(
        f'{record.where}: no title', 'the subject of the poem',
        'fill in the title')
  form = asked_form(record)
  if form not in FORMS:
    raise errors.UserError(
        f'{record.where}: the form is {form or "none that is known"!r}',
        ', '.join(f'{k} {v[0]}' for k, v in FORMS.items()),
        'remove the row, or correct its lines')
  simplified = is_simplified(
      f'{title}{text}{record.fields.get("form") or ""}')
  rhyme = ''
  if asked := asked_rhyme(record):
    rhyme = _RHYME.format(name=asked[-1], words=rhyme_words()[asked])
  prompt = _PROMPT[simplified].format(
      title=title, form=FORMS[form][simplified],
      rhyme=_converter('t2s').convert(rhyme) if simplified else rhyme)
  return tasks.conversation(prompt, text)


def to_form(record: tasks.Record) -> dict[str, str]:
  """Returns title, form and rhyme; nothing for a poem without a title."""
  title = record.fields.get('title')
  return {'title': title, 'form': asked_form(record),
          'rhyme': asked_rhyme(record)[-1:]} if title else {}


def has_poem(record: tasks.Record) -> bool:
  """Whether a record has a poem besides the fields of the prompt."""
  return not record.fields.keys() <= set(FIELDS)


def poem_text(record: tasks.Record) -> str:
  """Returns the poem, a couplet a line."""
  fields = record.fields
  lines: Any = fields.get('paragraphs', fields.get('text'))
  text = '\n'.join(lines) if isinstance(lines, list) else lines
  if not isinstance(text, str) or not text.strip():
    raise tasks.wrong_columns(
        record, 'text, or paragraphs as chinese-poetry has them', 'text=poem')
  return text.strip()


def asked_form(record: tasks.Record) -> str:
  """Returns the form that a record asks for, such as '5x4'.

  A form that is not known is returned as the record has it.
  """
  if form := record.fields.get('form'):
    form = str(form).strip()
    return _NAMES.get(form, form.lower().replace('×', 'x'))
  return form_of(poem_text(record)) if has_poem(record) else _DEFAULT_FORM


def asked_rhyme(record: tasks.Record) -> str:
  """Returns the rhyme that a record asks for, such as '下平八庚'.

  It is the one in the column `rhyme` (庚, 八庚 or 下平八庚); else the rhyme of
  the poem, '' if its even lines share no level rhyme; else, for a question, one
  of the commonest rhymes, chosen by a hash of the title.
  """
  rhymes = list(rhyme_words())
  if asked := str(record.fields.get('rhyme') or '').strip():
    for rhyme in rhymes:
      if rhyme.endswith(to_traditional(asked)):
        return rhyme
    raise errors.UserError(
        f'{record.where}: the rhyme is {asked!r}',
        'a level rhyme of the Pingshui book: '
        + ''.join(rhyme[-1] for rhyme in rhymes),
        'name one of these, or leave it out')
  if has_poem(record):
    return pingshui.rhyme_of(split_lines(to_traditional(poem_text(record))))
  title = str(record.fields.get('title'))
  digest = hashlib.sha256(title.encode()).digest()
  return rhymes[digest[0] % _N_COMMON_RHYMES]


def rhyme_words() -> dict[str, str]:
  """Returns the level rhymes, the commonest first, each with twelve words.

  Both are sorted by how often 2,653 rhyming Tang poems of the four forms end a
  line in them (`calibrate_poetry.py --rhyme_words`), then as in the book.
  """
  return pingshui.read_json('rhyme_words.json')


def form_of(text: str) -> str:
  """Returns the form of a text, such as '5x4', '' if it has none."""
  lines = split_lines(text)
  lengths = {len(line) for line in lines}
  form = f'{lengths.pop()}x{len(lines)}' if len(lengths) == 1 else ''
  return form if form in FORMS else ''


def split_lines(text: str) -> list[str]:
  """Returns the lines of a poem, two for a couplet, without punctuation."""
  return [line for line in _BREAK.split(text) if line]


def is_simplified(text: str) -> bool:
  """Whether a text is simplified: only a conversion to traditional changes it.

  Some characters, such as 松, 里 or 峰, belong to both scripts.
  """
  return (_converter('t2s').convert(text) == text
          and _converter('s2t').convert(text) != text)


@functools.cache
def _converter(name):
  import opencc

  return opencc.OpenCC(name)


def to_traditional(text: str) -> str:
  """Returns a text in the script of the rhyme book.

  A conversion would mistake some traditional characters for simplified ones
  (里, 松). So of a text with any character that is only traditional, only the
  characters that the book lacks are converted.
  """
  to_t = _converter('s2t')
  if _converter('t2s').convert(text) == text:
    return to_t.convert(text)
  return ''.join(c if pingshui.is_known(c) else to_t.convert(c) for c in text)


def judge(
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Scores poems; for plain text, the poem that continues its first line.

  Metrics, as shares of the poems unless stated otherwise:

    form: exactly the lines and characters asked for, all of them Chinese.
    rhyme, tone: in form, with a level rhyme or a tone pattern (`pingshui`).
    asked_rhyme: with the rhyme that the request names.
    rhyme_of_real, tone_of_real: rhyme and tone divided by the rate of real
      poems of the form, at most 1.
    bleu4: corpus BLEU-4 of characters (sacrebleu, tokenize='char') against the
      record's own poem; `sentence_bleu4` is the mean over poems.
    distinct1, distinct2: different characters, and pairs of them within a line,
      over all characters or pairs.
    copied: the share of a poem's lines that are in `training`, if given.
    repeated: the share of a poem's lines that repeat an earlier one.
  """
  known = {line for record in training if has_poem(record)
           for line in split_lines(to_traditional(poem_text(record)))}
  rows, pairs = [], []
  for record, completion in zip(records, completions, strict=True):
    reference, head = _reference(record)
    if head and not reference:
      rows.append({})
      continue
    row = _judge_poem(asked_form(record), head, completion)
    asked = asked_rhyme(record) if record.fields.get('title') else ''
    lines = split_lines(to_traditional(completion))
    if asked and 'rhyme' in row:
      row['asked_rhyme'] = row['rhyme'] and _rhymes_in(lines, asked)
    if training:
      row['copied'] = sum(x in known for x in lines) / max(1, len(lines))
    if reference:
      pairs.append((completion.strip(), reference))
      # effective_order: a poem of fewer than four characters has fewer orders.
      row['sentence_bleu4'] = _corpus_bleu(pairs[-1:], effective_order=True)
    rows.append(row)
  n_left_out = rows.count({})
  means = {'form': 0.0, 'rhyme': 0.0, 'tone': 0.0} | tasks.means(rows, _MEANS)
  metrics = {name: min(1.0, means[name]) for name in _MEANS if name in means}
  if pairs:
    metrics['bleu4'] = _corpus_bleu(pairs)
  metrics |= tasks.distinct(
      [line for c in completions for line in _HAN.findall(c)])
  return tasks.Judged(
      metrics | {'n': len(rows) - n_left_out}, rows,
      f'{n_left_out} poems of plain text are a single line, so nothing is left'
      ' to write: break them into couplets' if n_left_out else '')


def _rhymes_in(lines, rhyme):
  """Whether all even lines end in a rhyme of the book."""
  return all(rhyme in pingshui.level_rhymes(line[-1]) for line in lines[1::2])


def _reference(record):
  """Returns (what the model should write, the part that the prompt gives)."""
  if not has_poem(record):
    return '', ''
  text = poem_text(record)
  if record.fields.get('title'):
    return text, ''
  head, _, rest = text.partition('\n')
  return rest.strip(), head


def _judge_poem(form, head, completion):
  lines = split_lines(to_traditional(f'{head}\n{completion}'))
  seen = collections.Counter(split_lines(completion))
  row: dict[str, Any] = {
      'repeated': sum(k - 1 for k in seen.values()) / max(1, seen.total())}
  if form not in FORMS:
    return row
  fits = in_form(lines, form)
  rhyme = pingshui.rhyme_of(lines) if fits else ''
  faults = pingshui.tone_faults(lines) if fits else []
  row |= {'form': fits, 'rhyme': bool(rhyme), 'tone': fits and not faults}
  row['rhyme_of_real'] = row['rhyme'] / REAL_RHYME[form]
  row['tone_of_real'] = row['tone'] / REAL_TONE[form]
  return row | {'rhymes': rhyme, 'tone_faults': describe(lines, faults)}


def in_form(lines: Sequence[str], form: str) -> bool:
  """Whether these are the lines of a form such as '5x4', in Chinese."""
  width, count = map(int, form.split('x'))
  return len(lines) == count and all(
      len(line) == width and _HAN.fullmatch(line) for line in lines)


def describe(lines: Sequence[str], faults: Sequence[tuple]) -> str:
  """Returns 'line 2 character 4 (風) wants 仄' and so on."""
  return '; '.join(f'line {i} character {at} ({lines[i - 1][at - 1]}) wants'
                   f' {tone}' for i, at, tone in faults)


def _corpus_bleu(pairs, **options):
  from sacrebleu.metrics import bleu  # Imports lxml, which only judging needs.

  answers, references = zip(*pairs)
  score = bleu.BLEU(tokenize='char', **options).corpus_score(
      answers, [references]).score
  return min(1.0, score / 100)  # Rounding can exceed 1.


def check_answers(records: tasks.Records) -> list[str]:
  """Returns a line for each training poem that the judge would fail."""
  problems = []
  for record in filter(has_poem, records):
    form = asked_form(record)
    lines = split_lines(to_traditional(poem_text(record)))
    if not form or not in_form(lines, form):
      found = ', '.join(f'{len(list(same))} of {length} characters' for
                        length, same in itertools.groupby(lines, len))
      wrong = [f'lines: {found[:80]}; wanted: {form or ", ".join(FORMS)}'
               ' (in a text file a blank line separates two poems)']
    else:
      faults = pingshui.tone_faults(lines)
      wrong = [] if pingshui.rhyme_of(lines) else [
          'the even lines have no rhyme in common ('
          + ''.join(line[-1] for line in lines[1::2]) + ')']
      asked = asked_rhyme(record)
      if not wrong and not _rhymes_in(lines, asked):
        wrong = [f'it rhymes in {pingshui.rhyme_of(lines)}, and its column'
                 f' rhyme asks for {asked}']
      wrong += [describe(lines, faults[:2])] if faults else []
    if wrong:
      problems.append(f'{record.where}: {"; ".join(wrong)}')
  return problems
