"""SentencePiece models: rebuilt from a GGUF, or tiny and made in memory."""

from collections.abc import Mapping
from collections.abc import Sequence
import string
from typing import Any

from gemma_sft import errors

_SPACE = '\u2581'
# Token types of GGUF (llama.cpp, llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


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
