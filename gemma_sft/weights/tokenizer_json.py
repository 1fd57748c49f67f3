"""`tokenizer.json` and `tokenizer_config.json` out of a SentencePiece model.

Hugging Face's tokenizers run byte-pair encoding from a list of merges, which a
SentencePiece model has only as the scores of its pieces. For Gemma 3 the result
is Google's own file, merge for merge.
"""

from typing import Any

from gemma_sft import chat
from gemma_sft import errors

_SPACE = '\u2581'
# Beside <pad>, <eos>, <bos> and <unk>: what decoding leaves out. Everything
# else that is not learned (new lines, HTML tags) is text.
_SPECIAL = {
    '<start_of_image>', '<end_of_image>',
    *(tag for tags in chat.TURN_TAGS.values() for tag in tags),
}


def make_tokenizer_json(proto: bytes) -> dict[str, Any]:
  """Returns `tokenizer.json`, which adds BOS and encodes as SentencePiece does.

  One difference is the format's: `tokenizers` reads '<bos>' and its like in a
  text as control tokens, where SentencePiece sees characters.

  Args:
    proto: Bytes of a `tokenizer.model`.

  Raises:
    UserError: if it is not of Gemma's kind, byte-pair encoding with bytes for
      unknown characters and without changes to the text.
  """
  model = _parse(proto)
  bos = model.trainer_spec.bos_piece
  added = [{'id': id_} | token for id_, token in _added_tokens(model).items()]
  begin = {'SpecialToken': {'id': bos, 'type_id': 0}}
  return {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': added,
      'normalizer': {
          'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE},
      # The normalizer has left no space: this keeps lines in one piece.
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
          'merges': _merges(model),
      },
  }


def make_tokenizer_config(
    proto: bytes, *, chat_template: str, model_max_length: int
) -> dict[str, Any]:
  """Returns `tokenizer_config.json`.

  llama.cpp's converter reads `added_tokens_decoder` from here: without it the
  turn tags become ordinary text.

  Args:
    proto: Bytes of a `tokenizer.model`.
    chat_template: From `templates.jinja`.
    model_max_length: Positions that the model is good for.
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
      # Answers begin at the right end of a padded batch.
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
  # Imported here: it drags in protobuf.
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
          'byte-pair encoding with byte fallback, which leaves the text as it'
          ' is', 'use the tokenizer.model that came with the weights')
  return model


def _added_tokens(model: Any) -> dict[int, dict[str, Any]]:
  """Returns id -> token for everything that is matched before any merge."""
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


def _merges(model: Any) -> list[list[str]]:
  """Returns every split of a piece into two pieces, best merge first.

  SentencePiece joins the neighbours whose union scores highest. Of the splits
  of one piece, and of pieces that score alike, the one with the longer left
  half comes first, as in Google's file; it seldom matters.
  """
  kinds = type(model).SentencePiece
  # SentencePiece never builds these out of smaller pieces.
  never = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
  scores = {p.piece: p.score for p in model.pieces if p.type not in never}
  found = []
  for id_, (piece, score) in enumerate(scores.items()):
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in scores and right in scores:
        found.append((-score, -cut, cut - len(piece), id_, left, right))
  found.sort()
  return [[left, right] for *_, left, right in found]
