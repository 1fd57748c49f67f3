"""Converts a SentencePiece model to Hugging Face's tokenizer files.

Hugging Face's `tokenizers` need a list of merges, which a SentencePiece model
has only as the scores of its pieces. For Gemma 3 the merges are those of
Google's own `tokenizer.json`.
"""

from typing import Any

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.weights import tokenizer_file

_SPACE = '\u2581'
# What decoding leaves out, in addition to <pad>, <eos>, <bos> and <unk>. Other
# pieces that are not learned (new lines, HTML tags) are text.
_SPECIAL = {
    '<start_of_image>', '<end_of_image>',
    *(tag for tags in chat.TURN_TAGS.values() for tag in tags),
}


def make_tokenizer_json(proto: bytes) -> dict[str, Any]:
  """Returns `tokenizer.json`, which adds BOS and encodes as SentencePiece does.

  There is one difference, due to the format: `tokenizers` reads '<bos>' and the
  like in a text as control tokens, SentencePiece as characters.

  Raises:
    UserError: The model is not one of Gemma: byte-pair encoding that falls back
      on bytes for unknown characters and does not change the text.
  """
  model = _parse(proto)
  bos = model.trainer_spec.bos_piece
  added = [{'id': id_} | token for id_, token in _added_tokens(model).items()]
  # SentencePiece never builds the others out of smaller pieces.
  kinds = type(model).SentencePiece
  scores = {p.piece: p.score for p in model.pieces
            if p.type not in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)}
  begin = {'SpecialToken': {'id': bos, 'type_id': 0}}
  return {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': added,
      'normalizer': {
          'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE},
      # The normalizer replaces all spaces, so that this never splits a line.
      'pre_tokenizer': {
          'type': 'Split', 'pattern': {'String': ' '},
          'behavior': 'MergedWithPrevious', 'invert': False},
      'post_processor': {
          'type': 'TemplateProcessing',
          'single': [begin, {'Sequence': {'id': 'A', 'type_id': 0}}],
          'pair': [
              begin, {'Sequence': {'id': 'A', 'type_id': 0}},
              {'SpecialToken': {'id': bos, 'type_id': 1}},
              {'Sequence': {'id': 'B', 'type_id': 1}}],
          'special_tokens': {bos: {
              'id': bos, 'ids': [model.trainer_spec.bos_id], 'tokens': [bos]}},
      },
      'decoder': {'type': 'Sequence', 'decoders': [
          {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
          {'type': 'ByteFallback'}, {'type': 'Fuse'}]},
      'model': {
          'type': 'BPE',
          'dropout': None,
          'unk_token': model.trainer_spec.unk_piece,
          'continuing_subword_prefix': None,
          'end_of_word_suffix': None,
          'fuse_unk': True,
          'byte_fallback': True,
          'ignore_merges': False,
          'vocab': {p.piece: i for i, p in enumerate(model.pieces)},
          'merges': [list(pair) for pair in tokenizer_file.merges(scores)],
      },
  }


def make_tokenizer_config(
    proto: bytes, *, chat_template: str, model_max_length: int
) -> dict[str, Any]:
  """Returns `tokenizer_config.json`.

  llama.cpp's converter reads `added_tokens_decoder`: without it the turn tags
  would become ordinary text.
  """
  model = _parse(proto)
  trainer = model.trainer_spec
  return {
      'tokenizer_class': 'GemmaTokenizer',
      'add_bos_token': True,
      'add_eos_token': False,
      'bos_token': trainer.bos_piece,
      'eos_token': trainer.eos_piece,
      'pad_token': trainer.pad_piece,
      'unk_token': trainer.unk_piece,
      # So that the answers of a padded batch begin at the same position.
      'padding_side': 'left',
      'model_max_length': model_max_length,
      'clean_up_tokenization_spaces': False,
      'spaces_between_special_tokens': False,
      'sp_model_kwargs': {},
      'added_tokens_decoder': {
          str(id_): token for id_, token in _added_tokens(model).items()},
      'chat_template': chat_template,
  }


def _parse(proto: bytes) -> Any:
  # Imported here, because protobuf is slow to import.
  from google.protobuf import message
  from sentencepiece import sentencepiece_model_pb2 as pb

  try:
    model = pb.ModelProto.FromString(proto)
  except message.DecodeError as error:
    raise errors.UserError(
        f'the tokenizer cannot be read ({error})', 'a SentencePiece model',
        'point --config.model.tokenizer at a tokenizer.model') from error
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  for wrong, what in (
      (trainer.model_type != pb.TrainerSpec.BPE, 'it is not of type BPE'),
      (not trainer.byte_fallback, 'it has no byte fallback'),
      (normalizer.add_dummy_prefix, 'it puts a space before every text'),
      (normalizer.remove_extra_whitespaces, 'it removes spaces'),
      (normalizer.precompiled_charsmap, 'it changes characters'),
      (trainer.treat_whitespace_as_suffix, 'its words end in a space'),
  ):
    if wrong:
      raise errors.UserError(
          f'the tokenizer is not one of Gemma: {what}',
          'byte-pair encoding with byte fallback that does not change the text',
          'use the tokenizer.model that came with the weights')
  return model


def _added_tokens(model: Any) -> dict[int, dict[str, Any]]:
  """Returns id -> token for all pieces that are matched before any merge."""
  trainer = model.trainer_spec
  special = _SPECIAL | {trainer.pad_piece, trainer.eos_piece,
                        trainer.bos_piece, trainer.unk_piece}
  kinds = type(model).SentencePiece
  fixed = (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
  return {
      id_: {
          'content': piece.piece,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
          'special': piece.piece in special,
      }
      for id_, piece in enumerate(model.pieces) if piece.type in fixed
  }
