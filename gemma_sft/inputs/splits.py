"""Reads, renders and audits the splits of `config.data`."""

import dataclasses
import pathlib
import time
from typing import Any
from typing import Sequence

import numpy as np

from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft.inputs import audit
from gemma_sft.inputs import records as records_lib
from gemma_sft.inputs import token_cache

# Seconds. Gemma's tokenizer does about 7,000 short examples a second; finding
# the file and checking its hash takes a sixth of that, and one more file of a
# small data set is worth nothing.
_PAYS = 2.0


@dataclasses.dataclass(frozen=True)
class Split:
  """One split: what was read, what is trained, what the audit counted."""

  records: list[records_lib.Record]
  examples: Sequence[chat.Example]
  report: audit.Report
  data_hash: str


def read_split(section: Any, name: str) -> list[records_lib.Record]:
  """Returns the records of a split of `config.data`, none of them rendered.

  Raises:
    UserError: for the first thing wrong with a file or a row.
  """
  records = records_lib.read(
      section[name], format=section.format, split=name,
      columns=config_lib.parse_columns(section.columns))
  if section.limit and name == 'train':
    records = records[:section.limit]
  if section.fields:
    records = [records_lib.keep_fields(r, section.fields) for r in records]
  return records


def data_hash(records: Sequence[records_lib.Record], task: Any) -> str:
  """Returns the hash of the records and of the files that they refer to.

  A question about a database names the database, and its prompt shows the
  schema: another schema is other data.
  """
  files = (task.referenced_files(records)
           if hasattr(task, 'referenced_files') else ())
  return records_lib.content_hash(records, files)


def load_splits(
    section: Any,
    names: Sequence[str],
    task: Any,
    tokenizer: chat.Tokenizer,
) -> dict[str, Split]:
  """Reads, renders and audits splits of `config.data`; unset ones are left out.

  What took longer than `_PAYS` to render is kept for the next run.

  Raises:
    UserError: for the first thing wrong with a file, a row or a split.
  """
  splits = {}
  for name in names:
    if not section[name]:
      continue
    records = read_split(section, name)
    folder = cache.folder('tokens')
    content = data_hash(records, task)
    key = _tokens_key(name, section, records, content, task, tokenizer)
    kept = token_cache.load(folder, key)
    if kept is None:
      start = time.monotonic()
      kept = _render_split(name, section, records, task, tokenizer)
      if time.monotonic() - start > _PAYS:
        token_cache.save(folder, key, kept)
    splits[name] = Split(
        records, kept.examples, audit.Report(**kept.facts), content)
  _check_leakage(splits, task)
  return splits


def _tokens_key(split, section, records, content, task, tokenizer):
  """Returns a hash over all that decides what `_render_split` returns."""
  package = pathlib.Path(__file__).parents[1]
  return token_cache.make_key(
      split, content, '\n'.join(r.where for r in records), tokenizer.proto,
      tokenizer.generation, task.__name__, section.max_length,
      section.max_cut_share,
      sources=[package / 'chat.py',
               *(package / 'inputs' / f'{module}.py' for module in (
                   'audit', 'splits', 'token_cache')),
               *sorted((package / 'tasks').rglob('*.py'))])


def _render_split(name, section, records, task, tokenizer):
  conversations = [task.to_messages(r) for r in records]
  examples = [
      render(c, tokenizer, r.where) for c, r in zip(conversations, records)]
  examples, report = audit.check_split(
      name, examples, tokenizer, max_length=section.max_length,
      max_cut_share=section.max_cut_share,
      n_control_text=sum(
          chat.has_control_text(_whole_text(c)) for c in conversations))
  prompts = (audit.normalise(_prompt_text(c)) for c in conversations)
  return token_cache.Kept(
      token_cache.make(
          examples, [token_cache.prompt_key(p) for p in prompts]),
      dataclasses.asdict(report))


def _check_leakage(splits, task):
  """Looks at the prompts themselves only where their hashes meet."""
  seen = np.zeros(0, 'V16')
  for split in splits.values():
    keys = np.unique(split.examples.prompt_keys)
    seen = np.concatenate([seen, keys])
  if len(np.unique(seen)) < len(seen):
    audit.check_leakage({
        name: [(_prompt_text(task.to_messages(r)), r.where)
               for r in split.records]
        for name, split in splits.items()})


def render(
    conversation: Sequence[chat.Message] | str,
    tokenizer: chat.Tokenizer,
    where: str,
) -> chat.Example:
  """Renders a conversation, or plain text, for training."""
  if isinstance(conversation, str):
    return chat.render_text(conversation, tokenizer, where)
  return chat.render(conversation, tokenizer, where)


def _whole_text(conversation):
  if isinstance(conversation, str):
    return conversation
  return '\n'.join(m.content for m in conversation)


def _prompt_text(conversation):
  if isinstance(conversation, str):
    return conversation
  return '\n'.join(m.content for m in conversation[:-1])
