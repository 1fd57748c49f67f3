"""Messages -> token ids and loss mask: the only place that decides what is
trained.

Training, evaluation and inference all render here, so that a tuned model is
served with the prompts that it was tuned on.
"""

import dataclasses
import re
from typing import Sequence

import numpy as np
import sentencepiece

from gemma_sft import errors


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn: `role` is 'system', 'user' or 'model'."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Example:
  """One rendered example.

  The mask is True for the tokens that the model learns to produce. The shift by
  one, from tokens to targets, happens in `batches`.
  """

  tokens: np.ndarray  # int32 (T,), beginning with BOS.
  loss_mask: np.ndarray  # bool (T,).
  target_bytes: int  # UTF-8 length of the trained text, for bits per byte.
  target_characters: int  # Its length in Unicode code points.
  where: str = ''  # The record, for error messages.


# Generation -> (start of turn, end of turn). Their ids come from the tokenizer,
# so that a tokenizer of another generation is an error.
TURN_TAGS = dict.fromkeys((1, 2, 3), ('<start_of_turn>', '<end_of_turn>')) | {
    4: ('<|turn>', '<turn|>')}
# Gemma 1 to 3 were trained without a system turn. Google's templates put the
# system text and a blank line before the first text of the user.
HAS_SYSTEM_ROLE = {1: False, 2: False, 3: False, 4: True}

# What Gemma's tokenizers may read as a control token. (HTML tags are
# user-defined pieces as well, but they are text.) The lookahead consumes
# nothing, so that a tag inside another is found too.
_CONTROL = re.compile(
    r'(?=<(?:(?:start|end)_of_(?:turn|image)|unused\d+|bos|eos|pad|unk|mask'
    r'|2mass)>|\[multimodal\]|\[@BOS@\]|<\|[^<>\s|]*\|?>|<[^<>\s|]+\|>)')


class Tokenizer:
  """A SentencePiece model with the ids of one Gemma generation.

  The library's tokenizer classes wrap the same model, but read control tokens
  in the text of users.
  """

  def __init__(self, model_proto: bytes, generation: int):
    """Loads the bytes of a `tokenizer.model`.

    Raises:
      UserError: if it is damaged, or lacks the generation's turn tags.
    """
    fix = ('point --config.model.tokenizer at the tokenizer.model that came'
           ' with the weights')
    self.generation = generation
    # Its constructor would take empty bytes for none, and crash later.
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model_proto)
    except RuntimeError as error:
      raise errors.UserError(
          f'the tokenizer cannot be read ({error})', 'a SentencePiece model',
          fix) from error
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    self.pad_id = self._processor.pad_id()
    self.turn_ids = tuple(
        self._processor.PieceToId(tag) for tag in TURN_TAGS[generation])
    if self._processor.unk_id() in self.turn_ids:
      raise errors.UserError(
          f'the tokenizer has no {" and ".join(TURN_TAGS[generation])}',
          f'the tokenizer of a Gemma {generation} model', fix)

  @property
  def proto(self) -> bytes:
    """The serialised model, as a `tokenizer.model` holds it."""
    return self._processor.serialized_model_proto()

  @property
  def vocab_size(self) -> int:
    return self._processor.GetPieceSize()

  @property
  def stop_ids(self) -> tuple[int, int]:
    """Ids that end an answer: the end of turn and EOS."""
    return self.turn_ids[1], self.eos_id

  def encode(self, text: str) -> list[int]:
    """Encodes text; control tokens in it are encoded as ordinary characters."""
    ids, start = [], 0
    for tag in _CONTROL.finditer(text):
      # Cut after the first character, so that neither half is a control piece.
      ids += self._processor.EncodeAsIds(text[start:tag.start() + 1])
      start = tag.start() + 1
    return ids + self._processor.EncodeAsIds(text[start:])

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids without the control tokens."""
    control = {self.bos_id, self.eos_id, self.pad_id, *self.turn_ids}
    return self._processor.DecodeIds([int(i) for i in ids if i not in control])

  def piece(self, token: int) -> str:
    """Returns the printable piece of one id."""
    return self._processor.IdToPiece(int(token)).replace('▁', ' ')


def has_control_text(text: str) -> bool:
  """Whether the text contains what looks like a control token."""
  return _CONTROL.search(text) is not None


def render(
    messages: Sequence[Message] | str, tokenizer: Tokenizer, where: str = ''
) -> Example:
  """Renders a conversation, or plain text, for training.

  Plain text becomes `BOS text EOS`, and all but BOS is trained. In a
  conversation only the model's answers and the tags that end them are trained.
  With `S` and `E` for the turn tags (Gemma 3):

      tokens     BOS S user \\n Hi E \\n S model \\n Hello ! E \\n
      loss_mask   0  0  0   0  0 0  0 0   0    0    1   1 1  0

  Leading and trailing white space of contents is removed, as in Google's
  templates. `where` names the record in messages.

  Raises:
    UserError: if roles are out of order, or a text is empty.
  """
  if isinstance(messages, str):
    ids = [tokenizer.bos_id, *tokenizer.encode(messages), tokenizer.eos_id]
    mask, trained = [False, *[True] * (len(ids) - 1)], messages
  elif not messages or messages[-1].role != 'model':
    raise errors.UserError(
        f'{where}: the conversation does not end with the model',
        'a last message of role model, which is trained',
        'drop the open question at the end or add its answer')
  else:
    ids, mask = _render(messages, tokenizer, where)
    trained = ''.join(m.content.strip() for m in messages if m.role == 'model')
  return Example(
      np.asarray(ids, np.int32), np.asarray(mask, bool),
      len(trained.encode()), len(trained), where)


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, where: str = ''
) -> list[int]:
  """Renders a conversation up to the beginning of the model's answer."""
  if not messages or messages[-1].role != 'user':
    raise errors.UserError(
        f'{where}: the prompt does not end with the user',
        'a last message of role user', 'add the question')
  ids, _ = _render(messages, tokenizer, where)
  start, _ = tokenizer.turn_ids
  return [*ids, start, *tokenizer.encode('model\n')]


def _render(messages, tokenizer, where):
  messages = [Message(m.role, m.content.strip()) for m in messages]
  turns = messages[1:] if messages[0].role == 'system' else messages
  if not turns:
    raise errors.UserError(
        f'{where}: a system text alone', 'a user turn after it',
        'add the question')
  if len(turns) < len(messages) and not messages[0].content:
    raise errors.UserError(
        f'{where}: the system text is empty', 'some text, or no system turn',
        'fill it in or leave it out')
  for i, message in enumerate(turns):
    wanted = ('user', 'model')[i % 2]
    if message.role != wanted:
      raise errors.UserError(
          f'{where}: turn {i + 1} is of role {message.role!r}',
          f'role {wanted!r}: user and model take turns, system text first',
          'correct the order of the messages')
    if not message.content:
      raise errors.UserError(
          f'{where}: turn {i + 1} ({message.role}) is empty',
          'some text', 'fill it in or remove the row')
  if len(turns) < len(messages) and not HAS_SYSTEM_ROLE[tokenizer.generation]:
    first = Message('user', f'{messages[0].content}\n\n{turns[0].content}')
    messages = [first, *turns[1:]]
  start, end = tokenizer.turn_ids
  newline = tokenizer.encode('\n')
  ids, mask = [tokenizer.bos_id], [False]
  for message in messages:
    if message.role == 'model':
      head = tokenizer.encode('model\n')
      answer = [*tokenizer.encode(message.content), end]
    else:
      head = [*tokenizer.encode(f'{message.role}\n{message.content}'), end]
      answer = []
    ids += [start, *head, *answer, *newline]
    mask += [False, *[False] * len(head), *[True] * len(answer),
             *[False] * len(newline)]
  return ids, mask
