"""The judge of lyrics, on songs in four scripts, whole and broken."""

import itertools
import re

import pytest
import sacrebleu

from gemma_sft import errors
from gemma_sft.inputs import records
from gemma_sft.tasks.lyrics import task
from gemma_sft.tasks.lyrics import verse

# A song whose first line comes back after every third line.
_SONG = ['नाव चली रे धीरे-धीरे, दूर किनारा है', 'चाँद हमारे साथ चला है, साथ सितारा है',
         'पानी बोला, गीत सुनाओ, रात बड़ी लंबी', 'हमने बोला, तुम भी गाओ, बात बड़ी लंबी',
         'लहर-लहर में नाम किसी का हमने पुकारा है', 'नाव चली रे धीरे-धीरे, दूर किनारा है',
         'भोर हुई तो घाट पे देखा, कोई नहीं आया', 'सूना आँगन, सूनी देहरी, सूनी है छाया',
         'फिर भी उसके लौट आने का एक सहारा है', 'नाव चली रे धीरे-धीरे, दूर किनारा है']
# Couplets whose second lines end in the words that end both of the first.
_GHAZAL = [
    'शाम से पहले दीप जलाना अच्छा लगता है', 'घर की सीढ़ी चढ़ कर आना अच्छा लगता है',
    'बादल आएँ, बिजली चमके, खिड़की खोल के हम', 'सुनते हैं जो बूँदों का गाना अच्छा लगता है',
    'यूँ तो सब कुछ मिल जाता है अब बाज़ारों में', 'माँ के हाथों का ही खाना अच्छा लगता है',
    'दुनिया भर के महल भी देखे, देखे बाग़ मगर', 'लौट के अपने गाँव में जाना अच्छा लगता है']
_BENGALI = [
    'মেঘের নৌকা ভেসে চলে নীল আকাশের গায়', 'আমার মনের একলা পাখি তারেই খুঁজতে যায়',
    'বাড়ির পাশে তালের সারি, তাহার পাশে নদী', 'একটু বসে গল্প করো, সময় থাকে যদি',
    'মেঘের নৌকা ভেসে চলে নীল আকাশের গায়']
_URDU = ['ہوا کے ساتھ چلنا سیکھ لیں ہم', 'گرے تو پھر سنبھلنا سیکھ لیں ہم',
         'اندھیری رات لمبی ہے تو کیا ہے', 'چراغوں جیسا جلنا سیکھ لیں ہم']
_ROMAN = ['dīpa jale to rāta ḍhale', 'rāha kahe tū calā cale',
          'dhūpa meṃ jo sāyā bane', 'dīpa jale to rāta ḍhale']
_WHOLE = _SONG[2:]
_LONG_SONG = _SONG[:2] + [f'{line} {i}' for i in range(2) for line in _SONG]
# Couplets of the ghazal's radif.
_NEW = ['पेड़ों पर जब फल आते हैं', 'पंछी का यूँ शोर मचाना अच्छा लगता है'] * 3
_RADIF = [line for line in _NEW if line.endswith('है')]
_PLAIN = ['पानी आया', 'रात को', 'गाता जाए', 'आता जाए', 'मोर नाचे', 'चोर नाचे']
# Four aksharas a line; then lines of 4, 2 and 8.
_SYLLABLES = ['कमलन', 'चलमन', 'कमलन', 'कम', 'कमलनकमलन']
_FAR = ['रात जाए', 'क', 'ख', 'ग', 'दिन गाए']


def _record(lines, **fields) -> records.Record:
  return records.Record({'lines': lines, **fields}, 'songs.jsonl:1')


def _judge(lines, completion, training=(), **fields):
  if not isinstance(completion, str):
    completion = _joined(completion)
  row, = task.judge([_record(lines, **fields)], [completion], training).rows
  return row


def _joined(lines):
  return '\n'.join(lines)


def test_the_prompt_opens_the_song_and_the_answer_is_the_rest():
  fields = {'style': 'boat song', 'language': 'Hindi'}
  user, model = task.to_messages(_record(_SONG, **fields))
  assert user.content == ('Continue this Hindi boat song, line by line.\n\n'
                          f'{_SONG[0]}\n{_SONG[1]}')
  assert model.content == _joined(_SONG[2:])
  # An opening alone words the same prompt.
  asked = task.to_messages(records.Record(
      {'opening': f'{_SONG[0]}\n\n {_SONG[1]} \n', **fields}, 'form'))
  assert asked[0] == user and asked[1].content == ''
  # Style and language may be left out.
  bare = task.to_messages(records.Record({'opening': _BENGALI[0]}, 'form'))
  assert bare[0].content == (
      f'Continue this Bengali song, line by line.\n\n{_BENGALI[0]}')
  user, model = task.to_messages(
      _record(_SONG, script='roman', romanized=_ROMAN, language='Hindi'))
  assert user.content.endswith(_joined(_ROMAN[:2]))
  assert model.content == _joined(_ROMAN[2:])


@pytest.mark.parametrize('fields, message', [
    ({'lines': _SONG[:2]}, '2 lines'), ({'lines': [1, 2, 3]}, 'columns lines'),
    ({'lines': 5}, 'columns lines'), ({'poem': 'x'}, 'columns poem'),
    ({'opening': ' \n'}, 'the opening is empty')])
def test_records_without_a_song_are_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    task.to_messages(records.Record(fields, 'songs.jsonl:3'))


@pytest.mark.parametrize('lines, fields', [
    (_SONG, {'language': 'Hindi'}), (_GHAZAL, {'language': 'Hindi'}),
    (_BENGALI, {'language': 'Bengali'}), (_URDU, {'language': 'Urdu'}),
    (_ROMAN, {'language': 'Hindi'}), (_ROMAN, {}),
    (_ROMAN, {'lines': _SONG, 'script': 'roman', 'romanized': _ROMAN})])
def test_the_song_itself_scores_1(lines, fields):
  row = _judge(**{'lines': lines, 'completion': lines[2:], **fields})
  assert row['repeated'] == 0
  for name in ('form', 'script', 'lines', 'refrain', 'exact', 'sentence_chrf',
               'sentence_bleu'):
    assert row[name] == pytest.approx(1), name


def test_another_script_scores_0():
  for expected, other in itertools.permutations(
      (_SONG, _BENGALI, _URDU, _ROMAN), 2):
    row = _judge(expected, other[2:])
    assert row['script'] == 0 and row['form'] == 0
  # A few letters of it lower the form.
  row = _judge(_SONG, [*_WHOLE, 'la la la'])
  assert 0.9 < row['script'] < 1 and row['refrain'] == 1
  assert row['form'] == pytest.approx(row['script'])


@pytest.mark.parametrize('song, completion, expected', [
    # Three letters of each script; signs, digits and marks do not count.
    (_SONG, 'कमल abc 123, !', {'script': 1 / 2}),
    # Vowel signs do not count: 2 of 4 letters, not 4 of 6 characters.
    (_SONG, 'नीली ab', {'script': 1 / 2}),
    (_SONG, '', {'script': 0}), (_SONG, '123 ...', {'script': 0}),
    # The number of lines may differ by a couplet or a quarter.
    *((song, (song[2:] * 2)[:n], {'lines': fine}) for song, n, fine in (
        (_SONG, 5, 0), (_SONG, 6, 1), (_SONG, 8, 1), (_SONG, 10, 1),
        (_SONG, 11, 0), (_SONG, 0, 0), (_BENGALI, 5, 1), (_BENGALI, 6, 0),
        (_LONG_SONG, 15, 1), (_LONG_SONG, 14, 0), (_LONG_SONG, 25, 1),
        (_LONG_SONG, 26, 0))),
    # The form is the product of its parts.
    (_SONG, [_WHOLE[0], *_WHOLE[:1], *_WHOLE[2:]],
     {'refrain': 1, 'repeated': 1 / 8, 'form': 7 / 8}),
    (_SONG, _WHOLE[:5], {'refrain': 2 / 3, 'lines': 0, 'form': 0}),
    (_SONG, '\n\n'.join(_WHOLE) + '\n', {'form': 1}),  # Blank lines.
    # A refrain that is missed, and one return of two: F1 of 1 found, 1 there
    # and 2 wanted.
    (_SONG, [line for line in _WHOLE if line != _SONG[0]],
     {'refrain': 0, 'form': 0, 'lines': 1}),
    (_SONG, [*_SONG[2:6], 'कुछ और'], {'refrain': 2 / 3}),
    # A return counts whatever its punctuation, a line early, but not at once.
    (_SONG, [line.replace(',', ' ।') for line in _WHOLE], {'refrain': 1}),
    (_SONG, _SONG[2:4] + _SONG[5:], {'refrain': 1}),
    (_SONG, [_SONG[0], _SONG[0], *_SONG[2:5], *_SONG[6:9]], {'refrain': 0}),
    # A radif belongs on every second line.
    (_GHAZAL, _NEW, {'refrain': 1}), (_GHAZAL, _RADIF * 2, {'refrain': 0}),
    # A song without a refrain must rhyme.
    (_PLAIN, _PLAIN[2:], {'rhyme': 1, 'form': 1}),
    (_PLAIN, ['क ख', 'ग घ', 'च छ', 'ज झ'], {'rhyme': 0, 'form': 0, 'lines': 1}),
    (_SYLLABLES, _SYLLABLES[2:3], {'line_length': 1}),
    (_SYLLABLES, _SYLLABLES[2:], {'line_length': 2 / 3}),
    (_SYLLABLES, '', {'line_length': 0}),
    # All eight lines repeat an earlier one; in the song two of eight do.
    (_SONG, [_SONG[0]] * 8, {'repeated': 6 / 8, 'form': 0}),
    # Within the completion: three of four after the first.
    (_GHAZAL, ['क ख'] * 4, {'repeated': 3 / 4}),
    # Two words have no four-gram and still score 1.
    ([*_SONG[:2], 'राम श्याम'], 'राम श्याम', {'sentence_bleu': 1}),
], ids=lambda value: str(value) if isinstance(value, dict) else '')
def test_a_completion(song, completion, expected):
  row = _judge(song, completion)
  assert {name: row[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize('opening, rest, ending', [
    (_GHAZAL[:2], _GHAZAL[2:], 'अच्छा लगता है'),
    # An ending is whole words that come often.
    (['हम चले आए', 'तुम नहीं आए'], ['क', 'ख आए', 'ग'], 'आए'),
    (['हम चले आए', 'तुम नहीं आए'], ['क', 'ख आए', 'ग', 'घ'], None),
    # That ends in the letters, not in the word.
    (['हम चले आए', 'तुम नहीं आए'], ['क', 'दीप परआए', 'ग'], None),
    (['* * *', 'क'], ['ख', '---', 'ग'], None),  # Ornaments are no line.
    (['राम', 'श्याम'], ['काम', 'नाम'], None),
    # The longest that comes back: that of line two has a word more.
    (['दूर चले आए', 'पास चले आए'], ['क', 'वे घर आए'], 'आए')])
def test_refrain(opening, rest, ending):
  found = verse.refrain(opening, rest)
  assert found == (ending and re.compile(f'(.* )?{re.escape(ending)}'))


@pytest.mark.parametrize('function, cases', [
    (verse.rhyme, [  # Between neighbours that end in other words.
        ([], ['रात जाए', 'दिन गाए'], 1),
        ([], ['काली शाम', 'तेरा नाम'], 1),  # Without a vowel sign.
        ([], ['rāta jāe', 'dina gāe'], 0),  # Three of Latin.
        ([], ['मेरा गाना', 'तेरा जाला'], 0), ([], ['kālī śāma', 'terā nāma'], 1),
        ([], ['रात जाए', 'रात जाए,'], 0),  # One line twice.
        (['रात जाए'], ['क', 'दिन गाए'], 0.5), (_FAR[:1], _FAR[1:], 0),
        (_FAR[:1], _FAR[2:], 1 / 3), (['रात जाए'], [], 0)]),
    (verse.syllables, [
        ('क्षत्रिय राम', 5), ('क़लम', 3), ('क़लम', 3), ('आओ', 2), ('१२ ।', 0),
        ('বাড়ির ক্ষণ', 5), ('বাড়ির', 3), ('خدا کے', 5), ('ḍhale rāta bhaiyā', 6),
        ('jāūm̐', 1), ('राम\u200d', 2), ('सत्\u200dय', 2), ('', 0)])])
def test_functions_of_verse(function, cases):
  for *arguments, expected in cases:
    assert function(*arguments) == expected, arguments


def test_copied_counts_lines_of_training_songs():
  training = [_record(_GHAZAL), _record(_SONG)]
  assert _judge(_BENGALI, _BENGALI[2:], training)['copied'] == 0
  row = _judge(_BENGALI, ['नया', _GHAZAL[3] + '।', _GHAZAL[0], 'और'], training)
  assert row['copied'] == 0.5
  # The refrain of its own opening is not copied, even if training has it.
  assert _judge(_SONG, [_SONG[0], 'नया'], training)['copied'] == 0
  assert 'copied' not in _judge(_SONG, _SONG[2:])
  assert _judge(_SONG, '', training)['copied'] == 0
  assert 'copied' in task.LOWER_IS_BETTER
  # U+095B and ज + nukta; U+09DC and ড + nukta; a joiner.
  assert verse.key('\u095bमीन') == verse.key('\u091c\u093cमीन')
  assert verse.key('বা\u09dcি') == verse.key('বা\u09a1\u09bcি')
  assert verse.key('रा\u200dम, है ।') == verse.key(' राम  है')
  assert verse.key('नीला') != verse.key('नील')  # Vowel signs stay.


def test_totals():
  asked = records.Record({'opening': _joined(_SONG[:2])}, 'form')
  row, = task.judge([asked], [_joined(_WHOLE)]).rows
  # There is no reference.
  assert set(row) == {'script', 'rhyme', 'line_length'}
  assert row['script'] == 1
  assert task.judge([], []).metrics == {task.HEADLINE: 0, 'n': 0}
  judged = task.judge([_record(_SONG)], [''])
  assert judged.metrics['form'] == 0 and judged.metrics['chrf'] == 0
  # A mean is over the rows that have the metric.
  judged = task.judge([_record(_SONG), _record(_PLAIN), _record(_GHAZAL)],
                      [_joined(_WHOLE), _joined(_PLAIN[2:]), 'x'])
  assert 'refrain' not in judged.rows[1]
  assert judged.metrics['refrain'] == 0.5 and judged.metrics['n'] == 3
  # Overlap with the reference.
  judged = task.judge([_record(_SONG), _record(_GHAZAL)], [_joined(_WHOLE)] * 2)
  assert [row['exact'] for row in judged.rows] == [1, 0]
  assert judged.metrics['exact'] == 0.5
  assert judged.rows[0]['sentence_bleu'] > 0.99
  assert judged.rows[1]['sentence_bleu'] < 0.1
  # Corpus scores lie between those of the songs.
  assert 0.3 < judged.metrics['bleu'] < 0.7
  assert 0.4 < judged.metrics['chrf'] < 0.8
  row = _judge(_SONG, _GHAZAL[2:])
  chrf = sacrebleu.metrics.CHRF(word_order=2)
  assert row['sentence_chrf'] == pytest.approx(chrf.sentence_score(
      ' '.join(_GHAZAL[2:]), [' '.join(_WHOLE)]).score / 100)
  # A danda is split from its word; with the tokenisation 13a none would match.
  row = _judge([*_SONG[:2], 'राम। श्याम। काम। नाम।'], 'राम श्याम काम नाम')
  assert 0.05 < row['sentence_bleu'] < 1


def test_check_answers_names_what_is_wrong():
  mixed = _SONG[:2] + _BENGALI[2:]
  markup = [*_GHAZAL[:3], 'सुनते हैं<br/>जो बूँदों का गाना अच्छा लगता है']
  found = task.check_answers([
      _record(_SONG), _record(mixed), _record(markup), _record(_ROMAN),
      records.Record({'opening': _SONG[0]}, 'form')])
  assert len(found) == 4
  # Every letter after the opening is Bengali.
  assert '100% of the letters are not Devanagari' in found[0]
  assert 'opens with the same lines as songs.jsonl:1' in found[1]
  assert '5% of the letters are not Devanagari' in found[2]
  assert 'HTML is left' in found[3]
