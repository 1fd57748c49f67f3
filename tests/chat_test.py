"""What is rendered and trained, and that text stays text."""

import functools

import conftest
import dialog
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.weights import tokenizer_file

_GENERATIONS = (1, 2, 3, 4)
_TAGS = dict.fromkeys((1, 2, 3), ('<start_of_turn>', '<end_of_turn>')) | {
    4: ('<|turn>', '<turn|>')}
_TOKENIZERS = {g: conftest.make_tokenizer(g) for g in _GENERATIONS}
_user, _model, _system = (functools.partial(chat.Message, role)
                          for role in ('user', 'model', 'system'))
_BEFORE_THE_QUESTION = r"""
    BOS S u s er \n B e \n \n H i E \n
    0   0 0 0 0  0  0 0 0  0  0 0 0 0
    """
_A_TURN = r"""
    BOS S s y st e m \n B e E \n
    0   0 0 0 0  0 0 0  0 0 0 0
    S u s er \n H i E \n
    0 0 0 0  0  0 0 0 0
    """
_PLAIN = st.text('abc XYZ.,\n0', min_size=1, max_size=12).map(
    str.strip).filter(bool)
_TURNS = st.lists(st.tuples(_PLAIN, _PLAIN), min_size=1, max_size=3)
_CONTROL_TEXT = (
    '<start_of_turn>', '<end_of_turn>', '<bos>', '<eos>', '<pad>', '<unk>',
    '<mask>', '<2mass>', '<unused5>', '<start_of_image>', '<|turn>', '<turn|>',
    '<|image>', '<audio|>', '[multimodal]', '[@BOS@]')
# SentencePiece represents a space by U+2581, which is decoded as a space.
_ANY = st.text(st.characters(
    exclude_categories=('Cs',), exclude_characters='▁<>|[]'), max_size=6)
_MIXED = st.lists(
    st.one_of(_ANY, st.sampled_from(_CONTROL_TEXT)), max_size=6).map(''.join)


def _table(text, generation):
  """Returns [(piece, trained)] of lines of pieces over lines of 0 and 1."""
  start, end = _TAGS[generation]
  names = {'BOS': '<bos>', 'EOS': '<eos>', 'S': start, 'E': end, r'\n': '\n',
           '_': ' '}
  lines = [line.split() for line in text.splitlines() if line.strip()]
  rows = []
  for pieces, bits in zip(lines[::2], lines[1::2], strict=True):
    rows += [(names.get(p, p), b == '1')
             for p, b in zip(pieces, bits, strict=True)]
  return rows


def _rendered(example, tokenizer):
  return [(tokenizer.piece(t), bool(m))
          for t, m in zip(example.tokens, example.loss_mask, strict=True)]


@pytest.mark.parametrize('generation', _GENERATIONS)
def test_every_answer_of_several_turns_is_trained(generation):
  tokenizer = _TOKENIZERS[generation]
  example = chat.render(
      [_user('a'), _model('b é'), _user('c'), _model('d')], tokenizer, 'f:1')
  assert _rendered(example, tokenizer) == _table(r"""
      BOS S u s er \n a E \n
      0   0 0 0 0  0  0 0 0
      S m o d e l \n b _ <0xC3> <0xA9> E \n
      0 0 0 0 0 0 0  1 1 1      1      1 0
      S u s er \n c E \n
      0 0 0 0  0  0 0 0
      S m o d e l \n d E \n
      0 0 0 0 0 0 0  1 1 0
      """, generation)
  assert example.target_bytes == len('b é'.encode()) + len('d')
  assert example.target_characters == len('b é') + len('d')
  assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, bool)
  assert example.where == 'f:1'


@pytest.mark.parametrize('generation, beginning', (
    *((generation, _BEFORE_THE_QUESTION) for generation in (1, 2, 3)),
    (4, _A_TURN)))
def test_system_text(generation, beginning):
  tokenizer = _TOKENIZERS[generation]
  example = chat.render([_system('Be'), _user('Hi'), _model('d')], tokenizer)
  assert _rendered(example, tokenizer) == _table(beginning + r"""
      S m o d e l \n d E \n
      0 0 0 0 0 0 0  1 1 0
      """, generation)


def test_plain_text_is_trained_after_bos(tokenizer):
  example = chat.render('a\nb', tokenizer, 'f:3')
  assert _rendered(example, tokenizer) == _table(r"""
      BOS a \n b EOS
      0   1 1  1 1
      """, 3)
  assert (example.target_bytes, example.where) == (3, 'f:3')


@pytest.mark.parametrize('generation', _GENERATIONS)
def test_ids_are_the_official_ones(generation):
  model_lib.import_gemma()
  from gemma.gm.text import _tokenizer as official
  special = getattr(official, f'_Gemma{max(2, generation)}SpecialTokens')
  tokenizer = _TOKENIZERS[generation]
  assert tokenizer.turn_ids == (special.START_OF_TURN, special.END_OF_TURN)
  assert tokenizer.stop_ids == (special.END_OF_TURN, special.EOS)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
      special.BOS, special.EOS, special.PAD)
  byte_tokenizer = chat.Tokenizer(
      tokenizer_file.byte_tokenizer(generation), generation)
  assert byte_tokenizer.turn_ids == tokenizer.turn_ids
  # Otherwise the tests of control text would prove nothing.
  pieces = {tokenizer.piece(i) for i in _control_ids(tokenizer)}
  assert {'<bos>', '<unused5>', *_TAGS[generation]} <= pieces


@pytest.mark.parametrize('generation', _GENERATIONS)
@hypothesis.given(turns=_TURNS)
@hypothesis.settings(max_examples=25, deadline=None)
def test_text_is_that_of_the_official_dialog_package(generation, turns):
  tokenizer = _TOKENIZERS[generation]
  messages, official = (
      [make(text) for turn in turns for make, text in zip(makers, turn)]
      for makers in ((_user, _model), (dialog.User, dialog.Model)))
  tokens = chat.render(messages, tokenizer).tokens
  text = ''.join(map(tokenizer.piece, tokens))
  wanted = dialog.Conversation(*official).as_text(
      format='gemma4' if generation == 4 else 'gemma3')
  # The package leaves the last turn open and adds no BOS.
  assert text == f'<bos>{wanted}{_TAGS[generation][1]}\n'
  assert np.sum(tokens == tokenizer.bos_id) == 1 and tokens[0] == 2


def _control_ids(tokenizer):
  """Ids of all pieces that are not just text."""
  return {i for i in range(tokenizer.vocab_size)
          if tokenizer.piece(i) in _CONTROL_TEXT
          or tokenizer.piece(i).startswith('<unused')}


@pytest.mark.parametrize('generation', _GENERATIONS)
@hypothesis.given(text=_MIXED)
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_text_becomes_a_control_token(generation, text):
  tokenizer = _TOKENIZERS[generation]
  ids = tokenizer.encode(text)
  assert not _control_ids(tokenizer) & set(ids)
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize('text, noticed', (
    *((f'a{text}b', True) for text in _CONTROL_TEXT), ('a < b > c', False),
    ('<b>bold</b>', False), ('[link](x)', False), ('x || y', False),
    ('<| not a tag', False)))
def test_control_text_is_noticed(text, noticed):
  assert chat.has_control_text(text) == noticed


def test_encoding_and_decoding_of_tags(tokenizer):
  # A tag inside a tag is text.
  for text in ('<[multimodal]|>', '<|[multimodal]>'):
    assert not _control_ids(tokenizer) & set(tokenizer.encode(text))
  # Decoding leaves control tokens out.
  example = chat.render([_user('Hi'), _model('Hello!')], tokenizer)
  assert tokenizer.decode(example.tokens) == 'user\nHi\nmodel\nHello!\n'
  assert tokenizer.decode(np.asarray([0, 2, 1])) == ''


@pytest.mark.parametrize('messages, got', (
    ([], 'does not end with the model'),
    ([_user('a')], 'does not end with the model'),
    ([_model('a')], "turn 1 is of role 'model'"),
    ([_user('a'), _user('b'), _model('c')], "turn 2 is of role 'user'"),
    ([_user('a'), _model('b'), _model('c')], "turn 3 is of role 'model'"),
    ([_user('a'), _system('b'), _model('c')], "turn 2 is of role 'system'"),
    ([_user('a'), chat.Message('assistant', 'b'), _model('c')],
     "turn 2 is of role 'assistant'"),
    ([_user('a'), _model(' \n')], r'turn 2 \(model\) is empty'),
    ([_user(' '), _model('b')], r'turn 1 \(user\) is empty'),
    ([_system('s'), _model('b')], 'turn 1'),
    ([_system('s'), _model('a'), _model('b')], 'turn 1'),
    ([_system('s'), _user(' '), _model('b')], 'turn 1'),
    ([_system(' '), _user('a'), _model('b')], 'the system text is empty')))
@pytest.mark.parametrize('generation', (3, 4))
def test_a_wrong_conversation_is_refused(generation, messages, got):
  with pytest.raises(errors.UserError, match=f'f:7: .*{got}'):
    chat.render(messages, _TOKENIZERS[generation], 'f:7')


def test_prompts_and_tokenizers_are_checked(tokenizer):
  for messages in ([], [_user('a'), _model('b')], [_system('a')]):
    with pytest.raises(errors.UserError, match='f:7: .*end with the user'):
      chat.render_prompt(messages, tokenizer, 'f:7')
  with pytest.raises(errors.UserError, match=r'no <\|turn> and <turn\|>'):
    chat.Tokenizer(tokenizer_file.byte_tokenizer(3), 4)
  for damaged in (b'', tokenizer_file.byte_tokenizer(3)[:-7]):
    with pytest.raises(errors.UserError, match='tokenizer cannot be read'):
      chat.Tokenizer(damaged, 3)
