"""The tokenizer of Gemma 4 in the words of a GGUF."""

import re
from typing import Any

from gemma_sft import errors

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_NO_SCORE = -1000.0  # Of llama.cpp's converter, for what is not learned.
_END_OF_TURN = '<turn|>'
# Shown in the text, because llama-server's chat parser reads them there.
_VISIBLE = (
    '<|channel>', '<channel|>', '<|tool_call>', '<tool_call|>',
    '<|tool_response>', '<tool_response|>', '<|"|>',
)
_MARKUP = re.compile(r'<unused\d+>|<mask>|<\|.*>|<.*\|>')


def to_gguf(proto: bytes) -> dict[str, Any]:
  """Returns the `tokenizer.ggml.*` metadata of a Gemma 4 GGUF.

  llama.cpp joins pieces of a Gemma 4 by a list of merges, where for the earlier
  generations it reads the scores; those stand there too. What SentencePiece
  finds whole (new lines, runs of spaces, HTML tags) is user-defined here, which
  llama.cpp finds whole as well; its own converter makes normal tokens of them.

  Args:
    proto: A serialised SentencePiece model (`tokenizer.model`).

  Raises:
    UserError: It lacks a special token or the tag that ends a turn.
  """
  from sentencepiece import sentencepiece_model_pb2 as pb

  model = pb.ModelProto.FromString(proto)
  trainer = model.trainer_spec
  ids = {
      'bos': trainer.bos_id,
      'eos': trainer.eos_id,
      'unknown': trainer.unk_id,
      'padding': trainer.pad_id,
      'eot': next((i for i, piece in enumerate(model.pieces)
                   if piece.piece == _END_OF_TURN), -1),
  }
  for name, id_ in ids.items():
    if not 0 <= id_ < len(model.pieces):
      raise errors.UserError(
          f'the tokenizer has no {_END_OF_TURN if name == "eot" else name}',
          'the special tokens of Gemma 4',
          "use the model's own tokenizer.model",
      )
  tokens, scores, kinds = zip(*map(_gguf_piece, model.pieces))
  values = {
      'model': 'gemma4',
      'tokens': list(tokens),
      'scores': list(scores),
      'token_type': list(kinds),
      'merges': _merges(model),
      **{f'{name}_token_id': id_ for name, id_ in ids.items()},
      'add_bos_token': True,
      'add_eos_token': False,
      'add_space_prefix': False,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in values.items()}


def _gguf_piece(piece: Any) -> tuple[str, float, int]:
  """Returns text, score and GGUF type of a SentencePiece piece."""
  if piece.type in (_NORMAL, _BYTE):
    return piece.piece, piece.score, piece.type
  if piece.type == _USER_DEFINED and (
      piece.piece in _VISIBLE or not _MARKUP.fullmatch(piece.piece)):
    # llama.cpp looks for these before it marks the spaces.
    return piece.piece.replace('\u2581', ' '), _NO_SCORE, _USER_DEFINED
  return piece.piece, _NO_SCORE, _CONTROL


def _merges(model: Any) -> list[str]:
  """Returns 'left right' of every way to join two learned pieces to a third.

  Best first, as SentencePiece joins; of the ways to one piece that with the
  longer left half, as in Google's tokenizer.json.
  """
  scores = {piece.piece: piece.score for piece in model.pieces
            if piece.type == _NORMAL}
  merges = [
      (-score, -cut, f'{text[:cut]} {text[cut:]}')
      for text, score in scores.items()
      for cut in range(1, len(text))
      if text[:cut] in scores and text[cut:] in scores
  ]
  return [merge for *_, merge in sorted(merges)]
