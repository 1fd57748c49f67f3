"""The judge of lyrics, on songs in four scripts, whole and broken."""

import pytest
import sacrebleu

from gemma_sft import errors
from gemma_sft.inputs import records
from gemma_sft.tasks.lyrics import task
from gemma_sft.tasks.lyrics import verse

# A song whose first line comes back after every third line.
_SONG = [
    'नाव चली रे धीरे-धीरे, दूर किनारा है',
    'चाँद हमारे साथ चला है, साथ सितारा है',
    'पानी बोला, गीत सुनाओ, रात बड़ी लंबी',
    'हमने बोला, तुम भी गाओ, बात बड़ी लंबी',
    'लहर-लहर में नाम किसी का हमने पुकारा है',
    'नाव चली रे धीरे-धीरे, दूर किनारा है',
    'भोर हुई तो घाट पे देखा, कोई नहीं आया',
    'सूना आँगन, सूनी देहरी, सूनी है छाया',
    'फिर भी उसके लौट आने का एक सहारा है',
    'नाव चली रे धीरे-धीरे, दूर किनारा है']
# Couplets whose second lines end in the words that end both of the first.
_GHAZAL = [
    'शाम से पहले दीप जलाना अच्छा लगता है',
    'घर की सीढ़ी चढ़ कर आना अच्छा लगता है',
    'बादल आएँ, बिजली चमके, खिड़की खोल के हम',
    'सुनते हैं जो बूँदों का गाना अच्छा लगता है',
    'यूँ तो सब कुछ मिल जाता है अब बाज़ारों में',
    'माँ के हाथों का ही खाना अच्छा लगता है',
    'दुनिया भर के महल भी देखे, देखे बाग़ मगर',
    'लौट के अपने गाँव में जाना अच्छा लगता है']
_BENGALI = [
    'মেঘের নৌকা ভেসে চলে নীল আকাশের গায়',
    'আমার মনের একলা পাখি তারেই খুঁজতে যায়',
    'বাড়ির পাশে তালের সারি, তাহার পাশে নদী',
    'একটু বসে গল্প করো, সময় থাকে যদি',
    'মেঘের নৌকা ভেসে চলে নীল আকাশের গায়']
_URDU = [
    'ہوا کے ساتھ چلنا سیکھ لیں ہم',
    'گرے تو پھر سنبھلنا سیکھ لیں ہم',
    'اندھیری رات لمبی ہے تو کیا ہے',
    'چراغوں جیسا جلنا سیکھ لیں ہم']
_ROMAN = [
    'dīpa jale to rāta ḍhale', 'rāha kahe tū calā cale',
    'dhūpa meṃ jo sāyā bane', 'dīpa jale to rāta ḍhale']


def _record(lines, **fields) -> records.Record:
  return records.Record({'lines': lines, **fields}, 'songs.jsonl:1')


def _judge(lines, completion, training=(), **fields):
  if not isinstance(completion, str):
    completion = '\n'.join(completion)
  judged = task.judge([_record(lines, **fields)], [completion], training)
  return judged.rows[0]


def test_the_prompt_opens_the_song_and_the_answer_is_the_rest():
  user, model = task.to_messages(
      _record(_SONG, style='boat song', language='Hindi'))
  assert user.content == (
      'Continue this Hindi boat song, line by line.\n\n'
      f'{_SONG[0]}\n{_SONG[1]}')
  assert model.content == '\n'.join(_SONG[2:])


def test_an_opening_alone_words_the_same_prompt():
  full = task.to_messages(
      _record(_SONG, style='boat song', language='Hindi'))
  asked = task.to_messages(records.Record(
      {'opening': f'{_SONG[0]}\n\n {_SONG[1]} \n', 'style': 'boat song',
       'language': 'Hindi'}, 'form'))
  assert asked[0] == full[0] and asked[1].content == ''
  # Style and language may be left out.
  bare = task.to_messages(records.Record({'opening': _BENGALI[0]}, 'form'))
  assert bare[0].content == (
      f'Continue this Bengali song, line by line.\n\n{_BENGALI[0]}')


@pytest.mark.parametrize('fields, message', [
    ({'lines': _SONG[:2]}, '2 lines'),
    ({'lines': [1, 2, 3]}, 'columns lines'),
    ({'lines': 5}, 'columns lines'),
    ({'poem': 'x'}, 'columns poem'),
    ({'opening': ' \n'}, 'the opening is empty'),
])
def test_records_without_a_song_are_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    task.to_messages(records.Record(fields, 'songs.jsonl:3'))


@pytest.mark.parametrize('lines, fields', [
    (_SONG, {'language': 'Hindi'}), (_GHAZAL, {'language': 'Hindi'}),
    (_BENGALI, {'language': 'Bengali'}), (_URDU, {'language': 'Urdu'}),
    (_ROMAN, {'language': 'Hindi'}), (_ROMAN, {})])
def test_the_song_itself_scores_1(lines, fields):
  row = _judge(lines, lines[2:], **fields)
  for name in ('form', 'script', 'lines', 'refrain', 'exact'):
    assert row[name] == 1, name
  assert row['repeated'] == 0
  assert row['sentence_chrf'] == pytest.approx(1)
  assert row['sentence_bleu'] == pytest.approx(1)


@pytest.mark.parametrize('expected, others', [
    (_SONG, (_BENGALI, _URDU, _ROMAN)), (_BENGALI, (_SONG, _URDU, _ROMAN)),
    (_URDU, (_SONG, _BENGALI, _ROMAN)), (_ROMAN, (_SONG, _BENGALI, _URDU))])
def test_another_script_scores_0(expected, others):
  for other in others:
    row = _judge(expected, other[2:])
    assert row['script'] == 0 and row['form'] == 0


def test_script_is_a_share_of_letters():
  # Three letters of each script; signs, digits and marks do not count.
  assert _judge(_SONG, 'कमल abc 123, !')['script'] == 0.5
  # Vowel signs do not count: 2 of 4 letters, not 4 of 6 characters.
  assert _judge(_SONG, 'नीली ab')['script'] == 0.5
  assert _judge(_SONG, '')['script'] == 0
  assert _judge(_SONG, '123 ...')['script'] == 0


def test_romanised_songs_expect_latin():
  row = _judge(_SONG, _ROMAN[2:], script='roman', romanized=_ROMAN)
  assert row['script'] == 1 and row['exact'] == 1
  user, model = task.to_messages(
      _record(_SONG, script='roman', romanized=_ROMAN, language='Hindi'))
  assert user.content.endswith('\n'.join(_ROMAN[:2]))
  assert model.content == '\n'.join(_ROMAN[2:])


_LONG_SONG = _SONG[:2] + [f'{line} {i}' for i in range(2) for line in _SONG]


@pytest.mark.parametrize('song, n, fine', [
    (_SONG, 5, False), (_SONG, 6, True), (_SONG, 8, True), (_SONG, 10, True),
    (_SONG, 11, False), (_SONG, 0, False), (_BENGALI, 5, True),
    (_BENGALI, 6, False), (_LONG_SONG, 15, True), (_LONG_SONG, 14, False),
    (_LONG_SONG, 25, True), (_LONG_SONG, 26, False)])
def test_lines_may_differ_by_a_couplet_or_a_quarter(song, n, fine):
  assert _judge(song, (song[2:] * 2)[:n])['lines'] == fine


def test_form_is_the_product_of_its_parts():
  whole = _SONG[2:]
  row = _judge(_SONG, [whole[0], whole[0], *whole[2:]])
  assert row['refrain'] == 1 and row['repeated'] == pytest.approx(1 / 8)
  assert row['form'] == pytest.approx(7 / 8)
  row = _judge(_SONG, [*whole[:-1], whole[-1], 'la la la'])
  assert 0.9 < row['script'] < 1 and row['refrain'] == 1
  assert row['form'] == pytest.approx(row['script'])
  row = _judge(_SONG, whole[:5])
  assert row['refrain'] == pytest.approx(2 / 3) and row['lines'] == 0
  assert row['form'] == 0


def test_blank_lines_do_not_count():
  assert _judge(_SONG, '\n\n'.join(_SONG[2:]) + '\n')['form'] == 1


def test_a_line_that_returns_is_missed():
  without = [line for line in _SONG[2:] if line != _SONG[0]]
  row = _judge(_SONG, without)
  assert row['refrain'] == 0 and row['form'] == 0 and row['lines'] == 1
  # One return of two: F1 of 1 found, 1 there, 2 wanted.
  assert _judge(_SONG, [*_SONG[2:6], 'कुछ और'] )['refrain'] == (
      pytest.approx(2 / 3))
  # A return counts whatever its punctuation.
  other = [line.replace(',', ' ।') for line in _SONG[2:]]
  assert _judge(_SONG, other)['refrain'] == 1


def test_returns_may_come_a_line_early_or_late():
  early = _SONG[2:4] + _SONG[5:]
  assert _judge(_SONG, early)['refrain'] == 1
  at_once = [_SONG[0], _SONG[0], *_SONG[2:5], *_SONG[6:9]]
  assert _judge(_SONG, at_once)['refrain'] == 0


def test_a_radif_belongs_on_every_second_line():
  assert verse.refrain(_GHAZAL[:2], _GHAZAL[2:]) == verse.Refrain(
      ending='अच्छा लगता है')
  # New couplets with the radif keep it; lines in another order do not.
  new = ['पेड़ों पर जब फल आते हैं', 'पंछी का यूँ शोर मचाना अच्छा लगता है'] * 3
  assert _judge(_GHAZAL, new)['refrain'] == 1
  every = [line for line in new if line.endswith('है')] * 2
  assert _judge(_GHAZAL, every)['refrain'] == 0


def test_an_ending_is_whole_words_that_come_often():
  opening = ['हम चले आए', 'तुम नहीं आए']
  assert verse.refrain(opening, ['क', 'ख आए', 'ग']) is not None
  assert verse.refrain(opening, ['क', 'ख आए', 'ग', 'घ']) is None
  # That ends in the letters, not in the word.
  assert verse.refrain(opening, ['क', 'दीप परआए', 'ग']) is None
  # Ornaments are no line.
  assert verse.refrain(['* * *', 'क'], ['ख', '---', 'ग']) is None
  assert verse.refrain(['राम', 'श्याम'], ['काम', 'नाम']) is None
  # The longest that comes back: that of line two has a word more.
  assert verse.refrain(['दूर चले आए', 'पास चले आए'],
                        ['क', 'वे घर आए']).ending == 'आए'


def test_a_song_without_a_refrain_must_rhyme():
  song = ['पानी आया', 'रात को', 'गाता जाए', 'आता जाए', 'मोर नाचे', 'चोर नाचे']
  row = _judge(song, song[2:])
  assert 'refrain' not in row and row['rhyme'] == 1 and row['form'] == 1
  row = _judge(song, ['क ख', 'ग घ', 'च छ', 'ज झ'])
  assert row['rhyme'] == 0 and row['form'] == 0 and row['lines'] == 1


def test_rhyme_is_between_neighbours_of_other_words():
  assert verse.rhyme([], ['रात जाए', 'दिन गाए']) == 1
  assert verse.rhyme([], ['काली शाम', 'तेरा नाम']) == 1  # Without a vowel sign.
  assert verse.rhyme([], ['rāta jāe', 'dina gāe']) == 0  # Three of Latin.
  assert verse.rhyme([], ['मेरा गाना', 'तेरा जाला']) == 0
  assert verse.rhyme([], ['kālī śāma', 'terā nāma']) == 1
  assert verse.rhyme([], ['रात जाए', 'रात जाए,']) == 0  # One line twice.
  assert verse.rhyme(['रात जाए'], ['क', 'दिन गाए']) == 0.5
  far = ['रात जाए', 'क', 'ख', 'ग', 'दिन गाए']
  assert verse.rhyme(far[:1], far[1:]) == 0
  assert verse.rhyme(far[:1], far[2:]) == pytest.approx(1 / 3)
  assert verse.rhyme(['रात जाए'], []) == 0


@pytest.mark.parametrize('text, n', [
    ('क्षत्रिय राम', 5), ('क़लम', 3), ('क़लम', 3), ('आओ', 2), ('१२ ।', 0),
    ('বাড়ির ক্ষণ', 5), ('বাড়ির', 3), ('خدا کے', 5), ('ḍhale rāta bhaiyā', 6),
    ('jāūm̐', 1), ('राम\u200d', 2), ('सत्\u200dय', 2), ('', 0)])
def test_syllables(text, n):
  assert verse.syllables(text) == n


def test_line_length_is_compared_with_the_opening():
  # An opening of four aksharas a line; lines of 4, 2 and 8.
  song = ['कमलन', 'चलमन', 'कमलन', 'कम', 'कमलनकमलन']
  assert _judge(song, song[2:3])['line_length'] == 1
  assert _judge(song, song[2:])['line_length'] == pytest.approx(2 / 3)
  assert _judge(song, '')['line_length'] == 0


def test_repeated_counts_beyond_the_songs_own_repetitions():
  assert _judge(_SONG, _SONG[2:])['repeated'] == 0
  # All eight lines repeat an earlier one; in the song two of eight do.
  row = _judge(_SONG, [_SONG[0]] * 8)
  assert row['repeated'] == pytest.approx(6 / 8)
  assert row['form'] == 0
  # Within the completion: three of four after the first.
  assert _judge(_GHAZAL, ['क ख'] * 4)['repeated'] == pytest.approx(3 / 4)


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


def test_forms_of_a_letter_are_one():
  # U+095B and ज + nukta; U+09DC and ড + nukta; a joiner.
  assert verse.key('\u095bमीन') == verse.key('\u091c\u093cमीन')
  assert verse.key('বা\u09dcি') == verse.key('বা\u09a1\u09bcি')
  assert verse.key('रा\u200dम, है ।') == verse.key(' राम  है')
  assert verse.key('नीला') != verse.key('नील')  # Vowel signs stay.


def test_overlap_with_the_reference():
  judged = task.judge(
      [_record(_SONG), _record(_GHAZAL)],
      ['\n'.join(_SONG[2:]), '\n'.join(_SONG[2:])])
  assert [row['exact'] for row in judged.rows] == [1, 0]
  assert judged.metrics['exact'] == 0.5
  assert judged.rows[0]['sentence_bleu'] > 0.99
  assert judged.rows[1]['sentence_bleu'] < 0.1
  # Corpus scores lie between those of the songs.
  assert 0.3 < judged.metrics['bleu'] < 0.7
  assert 0.4 < judged.metrics['chrf'] < 0.8


def test_sentence_scores_are_those_of_sacrebleu():
  scores = sacrebleu.metrics.CHRF(word_order=2)
  row = _judge(_SONG, _GHAZAL[2:])
  assert row['sentence_chrf'] == pytest.approx(scores.sentence_score(
      ' '.join(_GHAZAL[2:]), [' '.join(_SONG[2:])]).score / 100)
  # Two words have no four-gram and still score 1.
  row = _judge([*_SONG[:2], 'राम श्याम'], 'राम श्याम')
  assert row['sentence_bleu'] == pytest.approx(1)


def test_bleu_splits_a_danda_from_its_word():
  # With the tokenisation 13a no word would match.
  song = [*_SONG[:2], 'राम। श्याम। काम। नाम।']
  row = _judge(song, 'राम श्याम काम नाम')
  assert 0.05 < row['sentence_bleu'] < 1


def test_a_mean_is_over_the_rows_that_have_the_metric():
  plain = ['पानी आया', 'रात को', 'गाता जाए', 'आता जाए']
  judged = task.judge(
      [_record(_SONG), _record(plain), _record(_GHAZAL)],
      ['\n'.join(_SONG[2:]), '\n'.join(plain[2:]), 'x'])
  assert 'refrain' not in judged.rows[1]
  assert judged.metrics['refrain'] == 0.5 and judged.metrics['n'] == 3


def test_an_opening_without_a_song_has_no_reference():
  asked = records.Record({'opening': '\n'.join(_SONG[:2])}, 'form')
  row, = task.judge([asked], ['\n'.join(_SONG[2:])]).rows
  assert set(row) == {'script', 'rhyme', 'line_length'}
  assert row['script'] == 1


def test_judge_of_nothing():
  assert task.judge([], []).metrics == {task.HEADLINE: 0, 'n': 0}
  judged = task.judge([_record(_SONG)], [''])
  assert judged.metrics['form'] == 0 and judged.metrics['chrf'] == 0


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
