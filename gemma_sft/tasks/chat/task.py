"""Any prompt and completion, conversation or plain text, judged by equality."""

from typing import Sequence

from gemma_sft import chat
from gemma_sft import tasks

HEADLINE = 'exact'
LOWER_IS_BETTER = frozenset()
FIELDS = ('prompt',)


def to_messages(record: tasks.Record) -> tasks.Conversation:
  """Returns the record's conversation, or its plain text.

  Raises:
    UserError: if the record has none of the expected columns.
  """
  fields = record.fields
  if 'messages' in fields:
    return [chat.Message(m['role'], m['content']) for m in fields['messages']]
  if 'text' in fields:
    return fields['text']
  # A prompt without completion is from a form: `records.read` refuses it.
  if 'prompt' not in fields:
    raise tasks.wrong_columns(
        record, 'prompt and completion, or messages, or text',
        'prompt=question,completion=answer')
  messages = tasks.conversation(fields['prompt'], fields.get('completion', ''))
  if fields.get('system'):
    messages.insert(0, chat.Message('system', fields['system']))
  return messages


def to_form(record: tasks.Record) -> dict[str, str]:
  """Returns the first question of a conversation."""
  messages = to_messages(record)
  if isinstance(messages, str):
    return {}
  return {'prompt': next(m.content for m in messages if m.role == 'user')}


def prompt(record: tasks.Record) -> str:
  """Returns the last question of a conversation, '' for plain text."""
  messages = to_messages(record)
  return '' if isinstance(messages, str) else messages[-2].content


def answer(record: tasks.Record) -> str:
  """Returns the model's last answer, or the plain text."""
  messages = to_messages(record)
  return messages if isinstance(messages, str) else messages[-1].content


def judge(
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Counts the answers that equal the record's own, ignoring white space.

  A question from a form has no answer of its own and is not judged.
  """
  wanted = [' '.join(answer(r).split()) for r in records]
  rows = [{'exact': ' '.join(c.split()) == w} if w else {}
          for w, c in zip(wanted, completions)]
  return tasks.Judged(
      {'exact': 0.0} | tasks.means(rows, ['exact'])
      | {'n': sum(map(bool, wanted))}, rows)


def check_answers(records: tasks.Records) -> list[str]:
  """Returns nothing, because any answer may be right."""
  return []
