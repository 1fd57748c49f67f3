"""The judge of poetry, on well-known poems."""

import json

import pytest

from gemma_sft import errors
from gemma_sft.inputs import records
from gemma_sft.tasks.poetry import pingshui
from gemma_sft.tasks.poetry import task

_STORKS = '白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。'  # 王之渙
_STORKS_SIMPLIFIED = '白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。'
_GORGES = ('朝辭白帝彩雲間，千里江陵一日還。\n'
           '兩岸猿聲啼不住，輕舟已過萬重山。')  # 李白
_QUIET = '床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。'  # 李白
_GRASS = ('離離原上草，一歲一枯榮。\n野火燒不盡，春風吹又生。\n'
          '遠芳侵古道，晴翠接荒城。\n又送王孫去，萋萋滿別情。')  # 白居易
_HOPE = ('國破山河在，城春草木深。\n感時花濺淚，恨別鳥驚心。\n'
         '烽火連三月，家書抵萬金。\n白頭搔更短，渾欲不勝簪。')  # 杜甫
_BROCADE = ('錦瑟無端五十絃，一絃一柱思華年。\n'
            '莊生曉夢迷蝴蝶，望帝春心託杜鵑。\n'
            '滄海月明珠有淚，藍田日暖玉生煙。\n'
            '此情可待成追憶，只是當時已惘然。')  # 李商隱


def _record(text=_STORKS, **fields):
  return records.Record({'title': '題', 'text': text} | fields, 'x.jsonl:1')


def _question(form):
  return records.Record({'title': '題', 'form': form}, 'x')


def _row(completion, form='5x4'):
  return task.judge([_question(form)], [completion]).rows[0]


def _verdict(completion, form='5x4'):
  row = _row(completion, form)
  return row['form'], row['rhyme'], row['tone']


# The last of the oblique ones are level in Mandarin, but of the entering tone;
# the last of the level ones are a variant and newer than the book.
@pytest.mark.parametrize('characters, level, oblique', [
    ('東峯她', True, False), ('董送屋白竹一', False, True),
    ('先看', True, True), ('x，', False, False)])
def test_tones(characters, level, oblique):
  for character in characters:
    assert pingshui.can_be(character, '平') == level, character
    assert pingshui.can_be(character, '仄') == oblique, character
    assert pingshui.can_be(character, '中'), character


def test_rhymes_of_the_book():
  assert pingshui.level_rhymes('東') == {'上平一東'}
  assert pingshui.level_rhymes('冬') == {'上平二冬'}
  assert pingshui.level_rhymes('涯') >= {'上平九佳', '下平六麻'}
  assert pingshui.level_rhymes('日') == frozenset()
  assert not any(pingshui.is_known(c) for c in 'Publicdomainfalse')
  words = task.rhyme_words()
  assert set(words) == set(pingshui.level_book())
  assert all(len(w) == len(set(w)) == 12 for w in words.values())
  assert all(rhyme in pingshui.level_rhymes(c)
             for rhyme, w in words.items() for c in w)
  # Each is named by its last character alone.
  assert len({rhyme[-1] for rhyme in words}) == 30


@pytest.mark.parametrize('ends, rhyme', [
    ('流樓', '下平十一尤'), ('東風', '上平一東'),
    ('東冬', ''),  # The same to an ear of today.
    ('流流', ''),  # A word is no rhyme of itself.
    ('日出', ''),  # Oblique.
    ('東風空同', '上平一東'), ('東風空冬', ''), ('東風空東', ''),
    ('看難', '上平十四寒'), ('流x', '')])
def test_rhyme_of(ends, rhyme):
  lines = [line for end in ends for line in ('仄', end)]
  assert pingshui.rhyme_of(lines) == rhyme


def test_a_free_poem_and_a_rescue_without_its_other_half():
  assert _verdict(_QUIET) == (True, True, False)
  assert 'line 2 character' in _row(_QUIET)['tone_faults']
  # 未 is oblique where 不 may be level; 吹 in the next line makes up for it.
  text = _GRASS.replace('不盡', '未盡')
  assert _row(text, '5x8')['tone']
  assert not _row(text.replace('吹又', '起又'), '5x8')['tone']


@pytest.mark.parametrize('old, new, place', [
    ('依', '落', ''),  # The third of five is free,
    ('黃', '濁', 'line 2 character 1 (濁) wants 平'),  # but for 孤平.
    ('千', '百', ''),
    ('一層', '高層', 'line 4 character 3 (高) wants 仄'),  # 三平尾.
    ('海', '江', 'line 2 character 4 (江) wants 仄'),
    ('盡', '窮', 'line 1 character 5 (窮) wants 仄'),
    ('欲窮千里目', '將窮目千里', ''),  # 平平仄平仄 is a rescue,
    # but not after an oblique first.
    ('千里目', '目千里', 'line 3 character 4 (千) wants 仄'),
    ('窮千里', '盡千里', 'line 3 character 2 (盡) wants 平')])
def test_tone_faults(old, new, place):
  text = _STORKS.replace(old, new, 1)
  assert text != _STORKS
  assert _row(text)['tone_faults'] == place
  assert _row(text)['tone'] == (not place)


@pytest.mark.parametrize('completion, form, verdict', [
    *((text, form, (True, True, True)) for text, form in (
        (_STORKS, '5x4'), (_GORGES, '7x4'), (_GRASS, '5x8'), (_HOPE, '5x8'),
        (_BROCADE, '7x8'), (_STORKS_SIMPLIFIED, '5x4'),
        (_STORKS.replace('\n', ''), '5x4'), (_STORKS + '\n\n', '5x4'),
        ('白日依山盡 黃河入海流\n欲窮千里目 更上一層樓', '5x4'))),
    # Other shapes have no form, and so no rhyme.
    *((text, '5x4', (False, False, False)) for text in (
        '', ' \n', _GORGES, _STORKS.split('\n')[0], _STORKS + '\n白日依山盡。',
        f'《登樓》\n{_STORKS}', f'好的：{_STORKS}',
        f'{_STORKS}\n<end_of_turn>', 'abcde, abcde. abcde, abcde.',
        _STORKS.replace('日', ''), _STORKS.replace('日', 'x'))),
    # Couplets of an octave have an order.
    ('\n'.join(reversed(_STORKS.split('\n'))), '5x4', (True, True, True)),
    ('\n'.join(_HOPE.split('\n')[i] for i in (1, 0, 2, 3)), '5x8',
     (True, True, False))])
def test_verdicts(completion, form, verdict):
  assert _verdict(completion, form) == verdict


@pytest.mark.parametrize('text, traditional', [
    # A converter would make 鬆 and 裏 of 松 and 里, which are other words.
    *((text, text) for text in (_STORKS, '一松獨釣玉虹蟠', '萬里無聲去')),
    (_STORKS_SIMPLIFIED, _STORKS),
    (_STORKS.replace('樓', '楼').replace('層', '层'), _STORKS)])
def test_simplified_and_mixed_script_are_converted(text, traditional):
  assert task.to_traditional(text) == traditional


def test_totals():
  rows = [_question('5x4'), _question('7x8')]
  judged = task.judge(rows, [_STORKS, 'x'])
  assert judged.metrics['rhyme'] == 0.5
  assert judged.metrics['rhyme_of_real'] == pytest.approx(
      0.5 / task.REAL_RHYME['5x4'])
  assert judged.metrics['tone_of_real'] == pytest.approx(
      0.5 / task.REAL_TONE['5x4'])
  best = task.judge(rows, [_STORKS, _BROCADE]).metrics
  assert best['rhyme_of_real'] == best['tone_of_real'] == 1
  assert task.judge([], []).metrics[task.HEADLINE] == 0
  for rates in (task.REAL_RHYME, task.REAL_TONE):
    assert rates.keys() == task.FORMS.keys()
    assert all(0.5 < rate < 1 for rate in rates.values())
  own = task.judge([_record()], [_STORKS]).metrics  # BLEU is of characters.
  assert own['bleu4'] == own['sentence_bleu4'] == pytest.approx(1)
  # Of 24 characters two are others, each in two of the longer n-grams.
  changed = _STORKS.replace('日', '月').replace('樓', '臺')
  expected = (22 / 24 * 19 / 23 * 18 / 22 * 17 / 21) ** 0.25
  close = task.judge([_record()], [changed])
  assert close.metrics['bleu4'] == pytest.approx(expected, abs=1e-4)
  assert close.rows[0]['sentence_bleu4'] == pytest.approx(expected, abs=1e-4)
  assert task.judge([_record()], [_QUIET]).metrics['bleu4'] < 0.1
  assert 'bleu4' not in task.judge([_question('5x4')], [_STORKS]).metrics
  # The corpus weighs poems by length.
  judged = task.judge([_record(), _record(_BROCADE)], [_STORKS, 'x'])
  assert judged.metrics['sentence_bleu4'] == pytest.approx(0.5, abs=0.01)
  assert judged.metrics['bleu4'] < 0.2  # The brevity of 25 for 88.


def test_copied_and_distinct_lines():
  training = [_record(_STORKS_SIMPLIFIED),
              records.Record({'text': _GORGES}, 'y')]
  text = '白日依山尽，輕舟已過萬重山。\n春風不相識，更上一层楼。'
  judged = task.judge([_question('5x4')] * 2, [text, ''], training)
  assert [row['copied'] for row in judged.rows] == [0.75, 0]
  assert judged.metrics['copied'] == 0.375
  assert 'copied' not in task.judge([_question('5x4')], [text]).metrics
  judged = task.judge([_question('5x4')] * 2, ['春春，夏夏。', '春夏，夏'])
  # 春夏 of 7 characters; pairs in lines: 春春 夏夏 春夏.
  assert judged.metrics['distinct1'] == pytest.approx(2 / 7)
  assert judged.metrics['distinct2'] == 1
  again = task.judge([_question('5x4')] * 2, [_STORKS, _STORKS]).metrics
  assert again['distinct2'] == 0.5


def test_each_poem_is_judged_by_its_own_form():
  rows = [_record(), _record(_GORGES), _record(_HOPE), _record(_QUIET)]
  answers = [_STORKS, _STORKS, _HOPE, '，'.join(['低頭思故鄉'] * 4)]
  judged = task.judge(rows, answers, rows)
  assert judged.metrics['n'] == 4 and judged.metrics['rhyme'] == 0.5
  assert [r['form'] for r in judged.rows] == [True, False, True, True]
  # One line four times is no poem.
  assert not judged.rows[-1]['rhyme'] and judged.rows[-1]['repeated'] == 0.75
  # Plain text continues its first line.
  plain = records.Record({'text': _STORKS}, 'train.txt:1')
  rest = _STORKS.split('\n')[1]
  judged = task.judge([plain], [rest])
  row, = judged.rows
  assert (row['form'], row['rhyme'], row['tone']) == (True, True, True)
  assert judged.metrics['bleu4'] == pytest.approx(1)
  # Prose has no form, but its repetitions count.
  prose = records.Record({'text': '一二三\n四五'}, 'train.txt:9')
  assert 'form' not in task.judge([prose], [rest]).rows[0]
  # A text of one line is left out with a note.
  one = records.Record({'text': _STORKS.replace('\n', '')}, 'train.txt:1')
  judged = task.judge([one, _record()], ['', _STORKS])
  assert judged.rows[0] == {} and judged.metrics['n'] == 1
  assert judged.metrics['rhyme'] == 1
  assert '1 poems of plain text' in judged.note


def test_prompts():
  user, _ = task.to_messages(_record(_STORKS_SIMPLIFIED, title='登楼'))
  assert user.content == (
      '请以《登楼》为题，写一首五言绝句，押「尤」韵（秋流游愁头楼休州舟留侯忧）。')
  assert task.to_messages(records.Record({'text': _QUIET}, 'x')) == _QUIET
  # Equal in both scripts: the prompt is in the script of the rhyme book.
  simplified = {'登高望遠': False, '登高望远': True, '萬里松峰群山背': False,
                '松下问童子': True, '春眠不覺曉': False, '白日依山': False}
  assert {text: task.is_simplified(text) for text in simplified} == simplified


@pytest.mark.parametrize('form, asked', [
    (None, '七言絕句'), ('5x8', '五言律詩'), ('七言律詩', '七言律詩'),
    (' 五絕 ', '五言絕句'), ('5X4', '五言絕句'), ('7×8', '七言律詩'),
    ('五言律诗', '五言律诗')])
def test_a_title_is_a_question(form, asked):
  user, model = task.to_messages(
      records.Record({'title': '春雨', 'form': form}, 'x'))
  assert asked in user.content and '《春雨》' in user.content
  assert (model.role, model.content) == ('model', '')


@pytest.mark.parametrize('fields, rhyme', [
    ({'rhyme': '庚'}, '下平八庚'), ({'rhyme': ' 八庚 '}, '下平八庚'),
    ({'rhyme': '下平八庚', 'text': _STORKS}, '下平八庚'),
    ({'rhyme': '东'}, '上平一東'),  # Simplified.
    ({'rhyme': '尤'}, '下平十一尤'), ({'text': _STORKS}, '下平十一尤'),
    ({'text': _STORKS_SIMPLIFIED}, '下平十一尤'),
    # Old style: the even lines share no level rhyme, so the prompt names none.
    ({'text': _STORKS.replace('樓', '日')}, '')])
def test_which_rhyme_is_asked_for(fields, rhyme):
  record = records.Record({'title': '題', 'form': '5x4'} | fields, 'x')
  assert task.asked_rhyme(record) == rhyme
  assert ('押' in task.to_messages(record)[0].content) == bool(rhyme)
  assert task.to_form(record)['rhyme'] == rhyme[-1:]


def test_a_question_without_a_rhyme_gets_a_common_one_by_its_title():
  asked, again = ([task.asked_rhyme(records.Record({'title': f'題{i}'}, where))
                   for i in range(60)] for where in 'xy')
  assert len(set(asked)) == 10 and '下平三肴' not in asked
  assert asked == again
  # The rhyme asked for is judged apart.
  for rhyme, as_asked in (('尤', True), ('東', False)):
    question = records.Record(_question('5x4').fields | {'rhyme': rhyme}, 'x')
    row, = task.judge([question], [_STORKS]).rows
    assert row['rhyme'] and row['asked_rhyme'] == as_asked


@pytest.mark.parametrize('fields, got', [
    ({'title': '題', 'form': '5x4', 'rhyme': '日'}, "'日'"),
    ({'title': '題', 'form': '9x9', 'text': _STORKS}, "'9x9'"),
    ({'title': '題', 'form': 'sonnet'}, "'sonnet'"),
    ({'title': '題', 'text': '一二三'}, 'none that is known'),
    ({'title': '', 'form': '5x4'}, 'no title'),
    # A missing answer is a mistake: the column may have another name.
    ({'title': '題', 'poem': _STORKS}, 'columns title, poem'),
    ({'title': '題', 'text': ' '}, 'columns title, text')])
def test_mistakes_are_reported(fields, got):
  with pytest.raises(errors.UserError, match=got) as error:
    task.to_messages(records.Record(fields, 'x.jsonl:7'))
  assert 'x.jsonl:7' in str(error.value)


def test_reads_files(tmp_path):
  path = tmp_path / 'poet.tang.0.json'
  path.write_text(json.dumps([
      {'author': '王之渙', 'paragraphs': _STORKS.split('\n'),
       'title': '登鸛雀樓', 'id': '3ad6d468'},
      {'author': '李白', 'paragraphs': _GORGES.split('\n'),
       'title': '早發白帝城', 'id': '0b1d6f34'}], ensure_ascii=False), 'utf-8')
  rows = records.read(str(path))
  conversations = [task.to_messages(r) for r in rows]
  assert [c[0].content for c in conversations] == [
      '請以《登鸛雀樓》為題，寫一首五言絕句，押「尤」韻（秋流遊愁頭樓休州舟留侯憂）。',
      '請以《早發白帝城》為題，寫一首七言絕句，押「刪」韻（山閑間還關攀顏斑環潺寰灣）。']
  answers = [c[1].content for c in conversations]
  assert answers == [_STORKS, _GORGES]
  assert task.judge(rows, answers).metrics['tone'] == 1
  assert task.check_answers(rows) == []
  path = tmp_path / 'train.txt'  # Text files.
  path.write_text(f'{_STORKS}\n\n{_GORGES}\n', 'utf-8')
  rows = records.read(str(path))
  assert [task.to_messages(r) for r in rows] == [_STORKS, _GORGES]
  judged = task.judge(rows, [t.split('\n')[1] for t in (_STORKS, _GORGES)])
  assert judged.metrics['tone'] == judged.metrics['rhyme'] == 1
  # Without blank lines between them poems run together, which is reported.
  path.write_text(f'{_STORKS}\n{_GORGES}\n', 'utf-8')
  problem, = task.check_answers(records.read(str(path)))
  assert '4 of 5 characters, 4 of 7 characters' in problem
  assert 'blank line' in problem


def test_check_answers_names_the_mistakes():
  rows = [_record(), _record(_STORKS_SIMPLIFIED), _question('5x4'),
          _record(_QUIET), _record(_STORKS.replace('樓', '堂')),
          _record(form='7x4'), _record(rhyme='東'), _record(rhyme='尤'),
          records.Record({'text': _STORKS}, 'x')]
  tone, rhyme, form, asked = task.check_answers(rows)
  assert tone.startswith('x.jsonl:1: line ') and 'wants' in tone
  assert rhyme == 'x.jsonl:1: the even lines have no rhyme in common (流堂)'
  assert 'lines: 4 of 5 characters; wanted: 7x4' in form
  assert asked.endswith(
      'it rhymes in 下平十一尤, and its column rhyme asks for 上平一東')
