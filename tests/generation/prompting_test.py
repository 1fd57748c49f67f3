"""Which training examples stand before a question, and how."""

import pytest

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.generation import prompting


def _talk(question, answer, system=''):
  first = [chat.Message('system', system)] if system else []
  return [*first, chat.Message('user', question), chat.Message('model', answer)]


_TRAINING = [
    _talk('How heavy is the oldest whale?', 'A'),
    _talk('List all bakers by name.', 'B'),
    _talk('How heavy is the youngest whale of the bay?', 'C'),
    _talk('Count the tickets.', 'D', system='Be brief.'),
]


def _prompter(text, seed=0, training=_TRAINING):
  return prompting.Prompter(prompting.parse(text), training, seed)


def test_parse():
  assert prompting.parse('zero') == prompting.Baseline('zero', 0)
  assert str(prompting.parse(' few:4 ')) == 'few:4'
  for wrong in ('few', 'few:0', 'few:-1', 'zero:1', 'rag:x', 'rga:4', 'few:²'):
    with pytest.raises(errors.UserError, match='way of prompting'):
      prompting.parse(wrong)
  with pytest.raises(errors.UserError, match='rag'):
    prompting.parse('rga:4')


def test_nearest_by_bm25_the_nearest_last():
  asked = _talk('How heavy is the youngest whale?', 'not looked at: bakers')
  assert _prompter('rag:2').indices(asked) == [0, 2]
  # The same without an answer, as it is asked.
  assert _prompter('rag:2').indices(asked[:-1]) == [0, 2]
  assert _prompter('rag:1').indices(_talk('Name the bakers', '')) == [1]


def test_no_word_in_common_and_no_word_at_all():
  assert len(_prompter('rag:3').indices(_talk('xyzzy', ''))) == 3
  assert len(_prompter('rag:3').indices(_talk('?!', ''))) == 3


def test_few_are_drawn_by_the_seed():
  one = _prompter('few:2').indices(_talk('a', ''))
  assert one == _prompter('few:2').indices(_talk('b', ''))
  assert len(set(one)) == 2
  drawn = {tuple(_prompter('few:2', seed=s).indices(_talk('a', '')))
           for s in range(20)}
  assert len(drawn) > 5


def test_more_than_there_are():
  with pytest.raises(errors.UserError, match='few:5, with 4 training'):
    _prompter('few:5')


def test_examples_are_turns_after_the_system_text():
  asked = _talk('What?', 'That.', system='Be kind.')
  shown = prompting.before([_TRAINING[3], _TRAINING[1]], asked)
  assert [(m.role, m.content) for m in shown] == [
      ('system', 'Be kind.'), ('user', 'Count the tickets.'), ('model', 'D'),
      ('user', 'List all bakers by name.'), ('model', 'B'), ('user', 'What?'),
      ('model', 'That.')]
  with pytest.raises(errors.UserError, match='plain text'):
    prompting.before(['text'], asked)


def test_words_of_many_scripts():
  assert prompting.words('Don’t STOP, 3 times') == [
      'don', 't', 'stop', '3', 'times']
  # A vowel sign belongs to its word; Chinese has no spaces.
  assert prompting.words('तुझे देखा') == ['तुझे', 'देखा']
  assert prompting.words('春眠a') == ['春', '眠', '春眠', 'a']


def test_a_text_is_asked_by_its_first_line():
  assert prompting.question('first\nsecond') == 'first'
  assert prompting.question(_talk('a', 'b', system='s')) == 'a'


def test_a_transcript_for_models_that_know_no_turns():
  asked = _talk('What?', 'not shown', system='Be kind.')
  text = prompting.transcript([_TRAINING[1]], asked)
  assert text == ('Prompt:\nList all bakers by name.\n\nAnswer:\nB\n\n'
                  'Be kind.\n\nPrompt:\nWhat?\n\nAnswer:\n')
  assert prompting.transcript([], asked) == prompting.transcript(
      [], asked[:-1])
  # Plain text is continued from its first line.
  assert prompting.transcript(['a\nb'], 'c\nd') == 'a\nb\n\nc\n'


def test_the_answer_ends_where_the_next_question_begins():
  assert prompting.first_answer('one\ntwo\n\nPrompt:\nmore') == (
      'one\ntwo', True)
  assert prompting.first_answer('Prompt:\nat once') == ('', True)
  # As text inside an answer it is no question.
  assert prompting.first_answer('a Prompt: here') == ('a Prompt: here', False)
