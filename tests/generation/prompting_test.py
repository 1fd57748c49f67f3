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
    _talk('Count the tickets.', 'D', system='Be brief.')]


def _indices(text, conversation, seed=0):
  return prompting.Prompter(
      prompting.parse(text), _TRAINING, seed).indices(conversation)


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
  assert _indices('rag:2', asked) == [0, 2]
  # The same without an answer, as it is asked.
  assert _indices('rag:2', asked[:-1]) == [0, 2]
  assert _indices('rag:1', _talk('Name the bakers', '')) == [1]
  for question in ('xyzzy', '?!'):  # No word in common, no word at all.
    assert len(_indices('rag:3', _talk(question, ''))) == 3


def test_few_are_drawn_by_the_seed():
  one = _indices('few:2', _talk('a', ''))
  assert one == _indices('few:2', _talk('b', '')) and len(set(one)) == 2
  drawn = {tuple(_indices('few:2', _talk('a', ''), seed)) for seed in range(20)}
  assert len(drawn) > 5
  with pytest.raises(errors.UserError, match='few:5, with 4 training'):
    _indices('few:5', _talk('a', ''))


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


def test_a_transcript_for_models_that_know_no_turns():
  asked = _talk('What?', 'not shown', system='Be kind.')
  text = prompting.transcript([_TRAINING[1]], asked)
  assert text == ('Prompt:\nList all bakers by name.\n\nAnswer:\nB\n\n'
                  'Be kind.\n\nPrompt:\nWhat?\n\nAnswer:\n')
  assert prompting.transcript([], asked) == prompting.transcript([], asked[:-1])
  assert prompting.question(_talk('a', 'b', system='s')) == 'a'
  # Plain text is continued from its first line.
  assert prompting.question('first\nsecond') == 'first'
  assert prompting.transcript(['a\nb'], 'c\nd') == 'a\nb\n\nc\n'


def test_the_answer_ends_where_the_next_question_begins():
  assert prompting.first_answer('one\ntwo\n\nPrompt:\nmore') == (
      'one\ntwo', True)
  assert prompting.first_answer('Prompt:\nat once') == ('', True)
  # As text inside an answer it is no question.
  assert prompting.first_answer('a Prompt: here') == ('a Prompt: here', False)
