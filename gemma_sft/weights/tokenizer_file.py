"""SentencePiece models: converted from and to GGUF, or built in memory."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
import string
from typing import Any

from gemma_sft import chat
from gemma_sft import errors

_SPACE = '\u2581'
# Token types of GGUF (llama.cpp, llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# llama.cpp's score of a token that no merge produces.
_NO_SCORE = -1000.0
# User-defined pieces that become control tokens in GGUF, so that llama.cpp
# matches them as tags and does not print them. HTML and image tags stay
# user-defined.
_TAGS = re.compile(
    r'<unused\d+>|<mask>|<2mass>|\[@BOS@\]|<(start|end)_of_turn>')
_GEMMA4_TAGS = re.compile(r'<unused\d+>|<mask>|<\|.*>|<.*\|>')
# Printed, because the chat parser of llama-server looks for them in the text.
_GEMMA4_VISIBLE = (
    '<|channel>', '<channel|>', '<|tool_call>', '<tool_call|>',
    '<|tool_response>', '<tool_response|>', '<|"|>',
)
# GGUF key -> field of SentencePiece's trainer_spec.
_SPECIAL_IDS = {'padding': 'pad_id', 'eos': 'eos_id', 'bos': 'bos_id',
                'unknown': 'unk_id'}


def from_gguf(metadata: Mapping[str, Any], where: str) -> bytes:
  """Rebuilds `tokenizer.model` from the tokenizer arrays of a GGUF.

  GGUF marks <unusedN>, <mask> and the turn tags as control tokens. In Google's
  file they are user-defined, which makes each tag one token in a rendered
  prompt; only <pad>, <eos>, <bos> and <unk> are special.

  Raises:
    UserError: Something is missing or does not fit together in the metadata of
      the file `where`.
  """

  def value(name):
    key = f'tokenizer.ggml.{name}'
    if key not in metadata:
      raise errors.UserError(
          f'{where}: no metadata key {key}',
          'a SentencePiece vocabulary, as llama.cpp writes it',
          'use a GGUF made by llama.cpp or by this project')
    return metadata[key]

  arrays = [value(name) for name in ('tokens', 'scores', 'token_type')]
  ids = {name: value(f'{name}_token_id') for name in _SPECIAL_IDS}
  model = metadata.get('tokenizer.ggml.model')
  if model != 'llama':
    raise errors.UserError(
        f'{where}: tokenizer.ggml.model is {model!r}',
        "'llama', a SentencePiece vocabulary", 'use a GGUF of Gemma 1, 2 or 3')
  _check_arrays(arrays, list(ids.values()), where)
  special = {index: name for name, index in ids.items()}
  pieces = []
  for index, (text, score, kind) in enumerate(zip(*arrays, strict=True)):
    if index in special:
      kind = _UNKNOWN if special[index] == 'unknown' else _CONTROL
    elif kind in (_CONTROL, _USER_DEFINED):
      kind, text = _USER_DEFINED, text.replace(' ', _SPACE)
    if kind not in (_NORMAL, _BYTE):
      score = 0.0
    pieces.append((text, score, kind))
  return _model(pieces, ids)


def _check_arrays(arrays: Sequence[Any], ids: Sequence[Any], where: str):
  """Raises a `UserError` unless arrays and special ids fit together."""
  kinds = (str, (float, int), int)
  n = len(arrays[0]) if isinstance(arrays[0], list) else 0
  if not (
      all(isinstance(array, list) and len(array) == n
          and all(isinstance(item, kind) for item in array)
          for array, kind in zip(arrays, kinds))
      and all(kind in range(_NORMAL, _BYTE + 1) for kind in arrays[2])
      and all(isinstance(i, int) and 0 <= i < n for i in ids)
      and len(set(ids)) == len(ids)):
    raise errors.UserError(
        f'{where}: its tokenizer.ggml arrays do not fit together',
        'tokens, scores and types of one length, and special ids among them',
        'use a GGUF made by llama.cpp or by this project')


def to_gguf(proto: bytes, generation: int) -> dict[str, Any]:
  """Returns the `tokenizer.ggml.*` metadata of a GGUF.

  For Gemma 1 to 3 it is the inverse of `from_gguf`, with the types and scores
  that llama.cpp's converter gives the official vocabularies. The arrays have
  one element per piece; llama.cpp requires an embedding of as many rows.

  For Gemma 4 llama.cpp reads a list of merges instead of the scores, which are
  written nevertheless. What SentencePiece matches before any merge (new lines,
  runs of spaces, HTML tags) is user-defined here, so that llama.cpp does the
  same; llama.cpp's own converter makes normal tokens of it.

  Raises:
    UserError: A special token or the tag that ends a turn is missing.
  """
  from sentencepiece import sentencepiece_model_pb2 as pb

  model = pb.ModelProto.FromString(proto)
  texts = [piece.piece for piece in model.pieces]
  ids = {name: getattr(model.trainer_spec, field)
         for name, field in _SPECIAL_IDS.items()}
  _, end_of_turn = chat.TURN_TAGS[generation]
  missing = [f'{name} token' for name, i in ids.items()
             if not 0 <= i < len(texts)]
  if missing or end_of_turn not in texts:
    raise errors.UserError(
        f'the tokenizer has no {", ".join(missing) or end_of_turn}',
        f'the special tokens of Gemma {generation}',
        "use the model's own tokenizer.model")
  ids['eot'] = texts.index(end_of_turn)
  is_gemma4 = generation == 4
  if is_gemma4:
    ids = {name: ids[name]
           for name in ('bos', 'eos', 'unknown', 'padding', 'eot')}
  tokens, scores, kinds = zip(
      *(_gguf_piece(piece, is_gemma4) for piece in model.pieces))
  values = {
      'model': 'gemma4' if is_gemma4 else 'llama',
      **({} if is_gemma4 else {'pre': 'default'}),
      'tokens': list(tokens),
      'scores': list(scores),
      'token_type': list(kinds),
      **({'merges': _gguf_merges(model)} if is_gemma4 else {}),
      **{f'{name}_token_id': index for name, index in ids.items()},
      'add_bos_token': True,
      'add_eos_token': False,
      'add_space_prefix': False,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in values.items()}


def _gguf_piece(piece: Any, is_gemma4: bool) -> tuple[str, float, int]:
  """Returns the text, the score and the GGUF type of a SentencePiece piece."""
  if piece.type in (_NORMAL, _BYTE):
    return piece.piece, piece.score, piece.type
  if is_gemma4:
    is_tag = (piece.piece not in _GEMMA4_VISIBLE
              and _GEMMA4_TAGS.fullmatch(piece.piece))
  else:
    is_tag = _TAGS.fullmatch(piece.piece)
  if piece.type == _USER_DEFINED and not is_tag:
    # llama.cpp looks for these before it replaces spaces.
    return piece.piece.replace(_SPACE, ' '), _NO_SCORE, _USER_DEFINED
  return piece.piece, _NO_SCORE, _CONTROL


def _gguf_merges(model: Any) -> list[str]:
  scores = {piece.piece: piece.score for piece in model.pieces
            if piece.type == _NORMAL}
  return [f'{left} {right}' for left, right in merges(scores)]


def merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  """Returns every split of a piece into two pieces, best merge first.

  SentencePiece joins the neighbours whose union has the highest score. Among
  pieces of equal score, and among the splits of one piece, the longer left half
  comes first, as in the tokenizer.json of Google; this rarely matters. `scores`
  are in the order of the vocabulary.
  """
  found = []
  for index, (piece, score) in enumerate(scores.items()):
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in scores and right in scores:
        found.append((-score, -cut, cut - len(piece), index, left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def byte_tokenizer(generation: int = 3) -> bytes:
  """Returns a `tokenizer.model` of fewer than 512 pieces, the same every time.

  Its special ids are those of the official tokenizers: the turn tags are 105
  and 106 in Gemma 3 and 4, 106 and 107 in Gemma 1 and 2. Characters other than
  printable ASCII become bytes, so that every text survives a round trip.
  """
  reserved = ('<mask>', '<2mass>', '[@BOS@]')
  if generation >= 3:
    reserved = ('<mask>', '[multimodal]')
  tags = (*reserved, *(f'<unused{i}>' for i in range(99)),
          *chat.TURN_TAGS[generation], '\n')
  printable = string.digits + string.ascii_letters + string.punctuation
  # Each word joins two earlier pieces; earlier words are merged first.
  words = (
      'th', 'the', 'in', 'an', 'and', 'er', 'on', 're', 'he', 'is', 'it', 'of',
      'to', 'at', 'ou', 'you', 'st', 'ing', 'for', 'or',
  )
  joined = (*words, *(_SPACE + word for word in words if word != 'ing'))
  pieces = [
      ('<pad>', 0.0, _CONTROL),
      ('<eos>', 0.0, _CONTROL),
      ('<bos>', 0.0, _CONTROL),
      ('<unk>', 0.0, _UNKNOWN),
      *((tag, 0.0, _USER_DEFINED) for tag in tags),
      *((f'<0x{byte:02X}>', 0.0, _BYTE) for byte in range(256)),
      *((text, -float(rank), _NORMAL)
        for rank, text in enumerate((*joined, _SPACE, *printable))),
  ]
  return _model(pieces, {'padding': 0, 'eos': 1, 'bos': 2, 'unknown': 3})


def _model(
    pieces: Sequence[tuple[str, float, int]], ids: Mapping[str, int]
) -> bytes:
  from sentencepiece import sentencepiece_model_pb2 as pb

  model = pb.ModelProto()
  for text, score, kind in pieces:
    # The type numbers of GGUF are those of SentencePiece.
    model.pieces.add(piece=text, score=score, type=kind)
  trainer = model.trainer_spec
  trainer.model_type = pb.TrainerSpec.BPE
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  trainer.treat_whitespace_as_suffix = False
  for name, field in _SPECIAL_IDS.items():
    setattr(trainer, field, ids[name])
    setattr(trainer, field.replace('_id', '_piece'), pieces[ids[name]][0])
  normalizer = model.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return model.SerializeToString(deterministic=True)
