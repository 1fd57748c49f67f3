"""SentencePiece models: rebuilt from a GGUF, or tiny and made in memory."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
import string
from typing import Any

from gemma_sft import errors
from gemma_sft.weights import gemma4_tokenizer

_SPACE = '\u2581'
# Token types of GGUF (llama.cpp, llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# User-defined pieces that llama.cpp is to match as tags, never to print. HTML
# tags and the image tags are user-defined in GGUF too.
_TAGS = re.compile(
    r'<unused\d+>|<mask>|<2mass>|\[@BOS@\]|<(start|end)_of_turn>'
)
_END_OF_TURN = '<end_of_turn>'
# llama.cpp's score of a token that no merge makes.
_NO_SCORE = -1000.0
# GGUF key -> field of SentencePiece's trainer_spec.
_SPECIAL_IDS = {
    'padding': 'pad_id', 'eos': 'eos_id', 'bos': 'bos_id', 'unknown': 'unk_id'
}


def from_gguf(metadata: Mapping[str, Any], where: str) -> bytes:
  """Rebuilds `tokenizer.model` from the tokenizer arrays of a GGUF.

  GGUF marks <unusedN>, <mask> and the turn tags as control tokens; in Google's
  file they are user-defined, which is what makes the tags single tokens in a
  rendered prompt. Only <pad>, <eos>, <bos> and <unk> are special there.

  Args:
    metadata: The GGUF's metadata with its arrays.
    where: The file, for the message.
  """
  for key in (
      'tokens', 'scores', 'token_type',
      *(f'{name}_token_id' for name in ('padding', 'eos', 'bos', 'unknown')),
  ):
    if f'tokenizer.ggml.{key}' not in metadata:
      raise errors.UserError(
          f'{where}: no metadata key tokenizer.ggml.{key}',
          'a SentencePiece vocabulary, as llama.cpp writes it',
          'use a GGUF made by llama.cpp or by this project',
      )
  model = metadata.get('tokenizer.ggml.model')
  if model != 'llama':
    raise errors.UserError(
        f'{where}: tokenizer.ggml.model is {model!r}',
        "'llama', a SentencePiece vocabulary",
        'use a GGUF of Gemma 1, 2 or 3',
    )
  _check_arrays(metadata, where)
  special = {
      metadata[f'tokenizer.ggml.{name}_token_id']: name
      for name in ('padding', 'eos', 'bos', 'unknown')
  }
  pieces = []
  for index, (text, score, kind) in enumerate(
      zip(
          metadata['tokenizer.ggml.tokens'],
          metadata['tokenizer.ggml.scores'],
          metadata['tokenizer.ggml.token_type'],
          strict=True,
      )
  ):
    if index in special:
      kind = _UNKNOWN if special[index] == 'unknown' else _CONTROL
    elif kind in (_CONTROL, _USER_DEFINED):
      kind, text = _USER_DEFINED, text.replace(' ', _SPACE)
    if kind not in (_NORMAL, _BYTE):
      score = 0.0
    pieces.append((text, score, kind))
  ids = {name: index for index, name in special.items()}
  return _model(pieces, ids)


def _check_arrays(metadata: Mapping[str, Any], where: str) -> None:
  """Raises a `UserError` unless arrays and special ids go together."""
  arrays = [
      metadata[f'tokenizer.ggml.{name}']
      for name in ('tokens', 'scores', 'token_type')
  ]
  ids = [
      metadata[f'tokenizer.ggml.{name}_token_id']
      for name in ('padding', 'eos', 'bos', 'unknown')
  ]
  kinds = (str, (float, int), int)
  n = len(arrays[0]) if isinstance(arrays[0], list) else 0
  if not (
      all(
          isinstance(array, list)
          and len(array) == n
          and all(isinstance(item, kind) for item in array)
          for array, kind in zip(arrays, kinds)
      )
      and all(kind in range(_NORMAL, _BYTE + 1) for kind in arrays[2])
      and all(isinstance(i, int) and 0 <= i < n for i in ids)
      and len(set(ids)) == len(ids)
  ):
    raise errors.UserError(
        f'{where}: its tokenizer.ggml arrays do not go together',
        'tokens, scores and types of one length, and special ids among them',
        'use a GGUF made by llama.cpp or by this project',
    )


def to_gguf(proto: bytes, generation: int) -> dict[str, Any]:
  """Returns the `tokenizer.ggml.*` metadata of a GGUF.

  The inverse of `from_gguf`, with the types and scores that llama.cpp's
  converter gives the official vocabularies. The arrays have one element per
  piece; llama.cpp wants an embedding of as many rows.

  Args:
    proto: A serialised SentencePiece model (`tokenizer.model`).
    generation: 1 to 3.

  Raises:
    UserError: It lacks a special token or the tag that ends a turn.
  """
  from sentencepiece import sentencepiece_model_pb2 as pb

  if generation == 4:  # Another model of tokenizer, with merges.
    return gemma4_tokenizer.to_gguf(proto)
  return _to_sentencepiece_gguf(pb.ModelProto.FromString(proto))


def _to_sentencepiece_gguf(model: Any) -> dict[str, Any]:
  """Returns the metadata of Gemma 1 to 3."""
  texts = [piece.piece for piece in model.pieces]
  ids = {
      f'{name}_token_id': getattr(model.trainer_spec, field)
      for name, field in _SPECIAL_IDS.items()
  }
  missing = [name for name, i in ids.items() if not 0 <= i < len(texts)]
  if missing or _END_OF_TURN not in texts:
    raise errors.UserError(
        f'the tokenizer has no {", ".join(missing) or _END_OF_TURN}',
        'the special tokens of Gemma 1, 2 or 3',
        "use the model's own tokenizer.model",
    )
  ids['eot_token_id'] = texts.index(_END_OF_TURN)
  tokens, scores, kinds = zip(*map(_gguf_piece, model.pieces))
  metadata = {
      'model': 'llama',
      'pre': 'default',
      'tokens': list(tokens),
      'scores': list(scores),
      'token_type': list(kinds),
      **ids,
      'add_bos_token': True,
      'add_eos_token': False,
      'add_space_prefix': False,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in metadata.items()}


def _gguf_piece(piece: Any) -> tuple[str, float, int]:
  """Returns text, score and GGUF type of a SentencePiece piece."""
  if piece.type in (_NORMAL, _BYTE):
    return piece.piece, piece.score, piece.type
  if piece.type == _USER_DEFINED and not _TAGS.fullmatch(piece.piece):
    return piece.piece.replace(_SPACE, ' '), _NO_SCORE, _USER_DEFINED
  return piece.piece, _NO_SCORE, _CONTROL


def byte_tokenizer(generation: int = 3) -> bytes:
  """Returns a `tokenizer.model` of fewer than 512 pieces, the same every time.

  Its special ids are those of the official tokenizers: the turn tags are 105
  and 106 in Gemma 3 and 4, 106 and 107 in Gemma 1 and 2. Characters outside
  printable ASCII become bytes, so every text survives a round trip.
  """
  reserved = ('<mask>', '<2mass>', '[@BOS@]')
  if generation >= 3:
    reserved = ('<mask>', '[multimodal]')
  turn_tags = ('<start_of_turn>', '<end_of_turn>')
  if generation == 4:
    turn_tags = ('<|turn>', '<turn|>')
  tags = (
      *reserved,
      *(f'<unused{i}>' for i in range(99)),
      *turn_tags,
      '\n',
  )
  printable = string.digits + string.ascii_letters + string.punctuation
  # Each joins two pieces that stand before it; the order is the priority.
  words = (
      'th', 'the', 'in', 'an', 'and', 'er', 'on', 're', 'he', 'is', 'it', 'of',
      'to', 'at', 'ou', 'you', 'st', 'ing', 'for', 'or',
  )
  merges = (*words, *(_SPACE + word for word in words if word != 'ing'))
  pieces = [
      ('<pad>', 0.0, _CONTROL),
      ('<eos>', 0.0, _CONTROL),
      ('<bos>', 0.0, _CONTROL),
      ('<unk>', 0.0, _UNKNOWN),
      *((tag, 0.0, _USER_DEFINED) for tag in tags),
      *((f'<0x{byte:02X}>', 0.0, _BYTE) for byte in range(256)),
      *(
          (text, -float(rank), _NORMAL)
          for rank, text in enumerate((*merges, _SPACE, *printable))
      ),
  ]
  return _model(pieces, {'padding': 0, 'eos': 1, 'bos': 2, 'unknown': 3})


def _model(
    pieces: Sequence[tuple[str, float, int]], ids: Mapping[str, int]
) -> bytes:
  from sentencepiece import sentencepiece_model_pb2 as pb

  model = pb.ModelProto()
  for text, score, kind in pieces:
    # GGUF took its type numbers from SentencePiece's own enum.
    model.pieces.add(piece=text, score=score, type=kind)
  trainer = model.trainer_spec
  trainer.model_type = pb.TrainerSpec.BPE
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  trainer.treat_whitespace_as_suffix = False
  trainer.pad_id, trainer.eos_id = ids['padding'], ids['eos']
  trainer.bos_id, trainer.unk_id = ids['bos'], ids['unknown']
  trainer.pad_piece = pieces[ids['padding']][0]
  trainer.eos_piece = pieces[ids['eos']][0]
  trainer.bos_piece = pieces[ids['bos']][0]
  trainer.unk_piece = pieces[ids['unknown']][0]
  normalizer = model.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return model.SerializeToString(deterministic=True)
