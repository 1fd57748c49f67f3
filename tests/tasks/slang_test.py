"""The task of slang: its prompts, and a judge of real and broken answers."""

import pytest

from gemma_sft import errors
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.slang import task
from gemma_sft.tasks.slang import terms

_ROW = {
    'Slang': 'snaccident', 'Description': 'A snack that became a meal.',
    'Example': 'I had a snaccident with a whole box of crackers last night.',
    'Context': 'You wanted one cracker and the box is empty.'}
_OTHER = {
    'Slang': 'LWB', 'Description': 'Short for "library whisper boss", a person'
    ' whose whisper fills the room.',
    'Example': 'The LWB told a stranger so loudly that three rows know it.',
    'Context': 'A stranger whispers so loudly that three rows can hear it.'}
_TRAINING = {
    'Slang': 'toastalgia', 'Description': 'Longing that a warm snack brings.',
    'Example': 'One bite of the warm cinnamon bread on Sunday and toastalgia'
    ' took me back to six.',
    'Context': 'Bread with cinnamon, and you are six again.'}
_CLOSE = [('vibes', 'vibe'), ('vibe', 'vibes'), ('vibes', 'vines'),
          ('vibes', 'ibes'), ('vibes', 'vibes'), ('', 'a')]
_NOT_CLOSE = [('vibes', 'vib'), ('vibes', 'vbies'), ('ab', 'ba'),
              ('abcde', 'abxye'), ('abcd', 'xabc')]
_ACRONYMS = [('FOMO', ''), ('G.O.A.T', ''), ('ELI5', ''),
             ('iykyk', 'Short for "if you know, you know".')]
_NO_ACRONYMS = [
    ('W', ''), ('Fomo', ''), ('OH NO', ''), ('123', ''), ('躺平', ''),
    ('ABCDEFGHI', ''), ('iykyk', 'Short for something.'), ('on', 'odd news')]
_OCCURRING = [
    ('bop', 'What a BOP!'), ('bop', 'two bops'), ('bop', 'she was bopping'),
    ('vibe', 'we were vibing'), ('vibe', 'She vibed.'),
    ('party', 'three parties'), ('party', 'we partied'), ('ick', 'so icky'),
    ('ratio', 'ratioed'), ('lunch', 'two lunches'), ('vibe', 'good vibes'),
    ('drip', "the drip's back"), ('W', 'so many Ws'),
    ('G.O.A.T', 'He is the GOAT.'), ('GOAT', 'the G.O.A.T. of chess'),
    ('glow up', 'her glow-up'), ('spill the tea', 'she spilled the tea'),
    ('red flag', 'red flags'), ("it's giving", 'it’s giving vampire'),
    ("Bussin'", 'so bussin!'), ('L+ratio', 'an L + ratio'),
    ('ELI5', 'please, eli5'), ('💀', 'and then 💀💀'), ('❤️', 'no ❤')]
_ABSENT = [('bop', 'a bopx'), ('rat', 'ratio'), ('TIL', 'grey tiles'),
           ('bop', 'bopps'), ('art', 'party'), ('glow up', 'glow it up'),
           ('glow up', 'up glow'), ('glow up', 'glow'),
           ('take an L', 'he took an L'), ('', 'anything'),
           ('...', 'anything...'), ('💀', 'nothing'), ('bop', '')]


def _record(where='x.csv:2', **fields):
  return records_lib.Record(fields, where)


def _answer(row):
  return '\n'.join(f'{k}: {row[k]}'
                   for k in ('Slang', 'Description', 'Example') if k in row)


def _judge(answer, row=_ROW, training=_TRAINING):
  return task.judge([_record(**row)], [answer], [_record(**training)]).rows[0]


def test_prompt_has_tag_context_and_condition():
  question, answer = task.to_messages(_record(**_ROW))
  tag, context, condition = question.content.split('\n\n')
  assert tag.startswith('Create a new slang term')
  assert context == f'Context: {_ROW["Context"]}'
  assert 'example' in condition
  assert answer.content == _answer(_ROW)
  # A context alone is the same question without an answer.
  asked = task.to_messages(_record(context=_ROW['Context']))
  assert asked[0] == question
  assert asked[1].role == 'model' and asked[1].content == ''
  # The condition may be the user's own.
  other = 'Give the term alone, as a hashtag.'
  asked = task.to_messages(_record(context='A quiet bus.', condition=other))
  assert asked[0].content.endswith(f'Context: A quiet bus.\n\n{other}')
  row = task.to_messages(_record(**_ROW, condition=other))
  assert row[0].content.endswith(other) and row[1].content == _answer(_ROW)
  assert task.to_form(_record(**_ROW, condition=other))['condition'] == other
  usual = task.to_form(_record(**_ROW))
  assert task.to_messages(_record(**usual))[0] == task.to_messages(
      _record(**_ROW))[0]


@pytest.mark.parametrize('fields, term, description', [
    # The public forms: genz_slang.csv, genz_emojis.csv and the seed's.
    ({'keyword': 'Bop', 'description': 'A good song.'}, 'Bop', 'A good song.'),
    ({'emoji': '💀', 'Name': 'Skull', 'Description': 'Laughter.'}, '💀',
     'Laughter.'),
    ({'SLANG': ' Bop ', 'DESCRIPTION': 'A good\nsong.'}, 'Bop', 'A good song.'),
])
def test_forms_without_an_example(fields, term, description):
  question, answer = task.to_messages(_record(**fields))
  assert answer.content == f'Slang: {term}\nDescription: {description}'
  assert f'A word is wanted for this: {description}' in question.content
  assert 'example' not in question.content


@pytest.mark.parametrize('fields', [
    {}, {'context': '  '}, {'Slang': 'bop'}, {'Description': 'A song.'},
    # Empty cells of a table are no question of a form.
    {'Slang': '', 'Description': '', 'Example': '', 'Context': 'A bus.'},
    {'Slang': None, 'Context': 'A bus.'},
    {'Example': 'It is a bop.', 'Context': 'A bus.'}])
def test_rows_without_term_or_description_are_refused(fields):
  with pytest.raises(errors.UserError, match='x.csv:2'):
    task.to_messages(_record(**fields))


@pytest.mark.parametrize('text, right', [
    ('Slang: a b\nDescription: c\nExample: d', True),
    ('\n slang:a b\n\nDESCRIPTION : c\nExample: d: e\n', True),
    ('Slang: a\nDescription: c', False),
    ('Slang: a\nExample: d\nDescription: c', False),
    ('Slang: a\nDescription: c\nExample:', False),
    ('Slang: a\nDescription: c\nExample: ...', False),
    ('Slang: a\nDescription: c\nExample: d\nExample: e', False),
    ('Slang: a\nDescription: c\nExample: d\nmore', False),
    ('Sure!\nSlang: a\nDescription: c\nExample: d', False),
    ('**Slang:** a\n**Description:** c\n**Example:** d', False),
    ('Slang: a Description: c Example: d', False),
    ('Slang: one two three four five six\nDescription: c\nExample: d', True),
    ('Slang: a b c d e f g\nDescription: c\nExample: d', False), ('', False)])
def test_format(text, right):
  assert task.has_format(text) == right


def test_markdown_is_wrong_but_read():
  row = _judge('**Slang:** `zippo`\n- Description: c\n* **Example**: a zippo')
  assert (row['term'], row['format'], row['in_example']) == (
      'zippo', False, True)
  assert task.parse('- **Description:** c d **') == {
      'slang': '', 'description': 'c d', 'example': ''}
  # The first of repeated labels counts.
  assert task.parse('Slang: a\nSlang: b\nnothing\nExample: c') == {
      'slang': 'a', 'description': '', 'example': 'c'}
  # Some rows have no example.
  assert task.has_format('Slang: 💀\nDescription: c', asks_example=False)
  assert not task.has_format(
      'Slang: a\nDescription: c\nExample: d', asks_example=False)


@pytest.mark.parametrize('function, pairs, expected', [
    (terms.occurs, _OCCURRING, True), (terms.occurs, _ABSENT, False),
    (terms.is_close, _CLOSE, True), (terms.is_close, _NOT_CLOSE, False),
    (terms.is_acronym, _ACRONYMS, True),
    (terms.is_acronym, _NO_ACRONYMS, False)])
def test_terms(function, pairs, expected):
  assert [pair for pair in pairs if function(*pair) != expected] == []


@pytest.mark.parametrize('term, novel', [
    ('snaccident', True),
    ('toastalgia', False), ('Toast-Algia!', False), ('TOASTALGIA', False),
    ('toastalgias', False), ('toastalgic', False), ('toastology', True),
    # Words of the context as they stand; a new form may be a coinage.
    ('cracker', False), ('The Box', False), ('crackery', True), ('crack', True),
    ('', False), ('!?', False)])
def test_novel(term, novel):
  row = _judge(_answer({**_ROW, 'Slang': term, 'Example': f'Oh, {term}!'}))
  assert row['novel'] == row['good'] == novel


def test_short_terms_one_letter_apart_are_different():
  training = {**_TRAINING, 'Slang': 'bop'}
  assert _judge('Slang: bot', training=training)['novel']
  assert not _judge('Slang: Bop', training=training)['novel']
  # The description of a row without a context may hold the term.
  row = {'keyword': 'ghosting', 'description': 'Ghosting is no reply.'}
  assert _judge('Slang: ghosting\nDescription: No reply.', row)['good']
  # A good answer uses the term in its example.
  row = _judge(_answer({**_ROW, 'Slang': 'nibblide'}))
  assert row['novel'] and row['format'] and not row['in_example']
  assert not row['good'] and 'like' not in row
  assert _judge('Slang: Toastalgiaa')['like'] == 'toastalgia'


@pytest.mark.parametrize('changed, copied', [
    ({}, False), ({'Description': _TRAINING['Description'].upper()}, True),
    ({'Example': _TRAINING['Example']}, True),
    # Eight words in a row, and seven.
    ({'Example': 'Oh, one bite of the warm cinnamon bread on, snaccident!'},
     True),
    ({'Example': 'Oh, one bite of the warm cinnamon bread, snaccident!'},
     False),
    ({'Description': ''}, False)])
def test_copied(changed, copied):
  row = _judge(_answer({**_ROW, **changed}))
  assert row['copied'] == copied
  assert row['good'] == (not copied and bool(changed.get('Description', 1)))
  # Nothing is not a copy of nothing.
  training = {'keyword': 'bop', 'description': 'A good song.'}
  assert not _judge('Slang: a\nDescription: c', training=training)['copied']


def test_totals():
  records = [_record(**_ROW), _record(**_OTHER)]
  judged = task.judge(
      records, [_answer(_ROW), _answer(_OTHER)], [_record(**_TRAINING)])
  metrics = dict(judged.metrics)
  assert 0 < metrics.pop('distinct1') < metrics.pop('distinct2') <= 1
  assert metrics == {
      'good': 1, 'format': 1, 'in_example': 1, 'novel': 1, 'first': 1,
      'copied': 0, 'on_topic': 1, 'spelled': 1, 'acronym_gap': 0, 'n': 2}
  # The same answer again is good once.
  judged = task.judge([_record(**_ROW)] * 4, [_answer(_ROW)] * 4)
  assert judged.metrics['first'] == judged.metrics['good'] == 0.25
  # Records that ask the same have no other contexts.
  assert 'on_topic' not in judged.metrics
  # On topic is which context the answer covers most.
  records.append(_record(**_TRAINING))
  right = [_answer(row) for row in (_ROW, _OTHER, _TRAINING)]
  assert task.judge(records, right).metrics['on_topic'] == 1
  assert task.judge(records, right[1:] + right[:1]).metrics['on_topic'] < 0.5
  assert task.judge(records, [''] * 3).metrics['on_topic'] == 0.5
  records = [_record(**row) for row in (_ROW, _OTHER, _OTHER)]
  wrong = _answer({**_OTHER, 'Description': 'A loud person.'})
  judged = task.judge(records, [_answer(_ROW), _answer(_OTHER), wrong])
  # Only acronyms have letters to spell.
  assert [row.get('spelled') for row in judged.rows] == [None, True, False]
  assert judged.metrics['spelled'] == 0.5
  # The gap runs both ways.
  gaps = [task.judge(records[:2], answers).metrics['acronym_gap']
          for answers in ([_answer(_ROW), _answer(_OTHER)],
                          [_answer(_ROW)] * 2, [_answer(_OTHER)] * 2)]
  assert gaps == [0, 0.5, 0.5]
  assert 'acronym_gap' in task.LOWER_IS_BETTER


def test_answers_to_forms_and_empty_ones():
  row = _judge(_answer(_ROW), {'context': _ROW['Context']})
  assert row['good'] and row['in_example']
  judged = task.judge([_record(context='A bus.')], ['Slang: a'])
  assert 'acronym_gap' not in judged.metrics
  assert not judged.rows[0]['format'] and not judged.rows[0]['in_example']
  for answer in ('', '\n\n', 'Slang:', 'x' * 5000):
    judged = task.judge([_record(**_ROW)], [answer])
    assert judged.metrics['good'] == 0 and judged.metrics['n'] == 1
  # Rows without examples and contexts lack those metrics.
  record = _record(keyword='bop', description='A good song.')
  judged = task.judge([record] * 2, ['Slang: hum\nDescription: c'] * 2)
  assert not {'in_example', 'on_topic', 'spelled'} & judged.metrics.keys()
  assert [row['good'] for row in judged.rows] == [True, False]


def test_check_answers():
  rows = [_record('a.csv:2', **_ROW),
          _record('a.csv:3', **{**_ROW, 'Slang': 'Snaccident!'}),
          _record('a.csv:4', **{**_OTHER, 'Example': 'No term in here.'}),
          _record('a.csv:5', keyword='bop', description='A song.'),
          _record('a.csv:6', keyword='💀', description='Laughter.'),
          _record('a.csv:7', keyword='🔥', description='Great.')]
  assert task.check_answers(rows) == [
      "a.csv:3: the term 'Snaccident!' is also at a.csv:2",
      "a.csv:4: the example does not use 'LWB'"]
