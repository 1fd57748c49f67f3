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
from gemma_sft import errors
from gemma_sft.inputs import audit
from gemma_sft.inputs import records as records_lib
from gemma_sft.inputs import token_cache

# A split that renders faster is not worth the disk space of a cache. Gemma's
# tokenizer renders about 7,000 short examples a second; loading and verifying
# them from the cache takes a sixth of that time.
_MIN_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Split:
  """One split: its records, rendered examples, audit and `data_hash`."""

  records: list[records_lib.Record]
  examples: Sequence[chat.Example]
  report: audit.Report
  data_hash: str


def check_named(section: Any, split: str) -> None:
  """Raises a `UserError` unless `config.data` names a file for a split."""
  names = ('train', 'validation', 'test')
  named = [name for name in names if section[name]]
  if split not in named:
    raise errors.UserError(
        f'--split={split}', f'a split that the config names: {named}',
        f'set --config.data.{split} or choose another split'
        if split in names else f'choose one of {", ".join(names)}')


def read_split(section: Any, name: str) -> list[records_lib.Record]:
  """Returns the records of a split of `config.data`, not yet rendered."""
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

  A question about a database, for example, names the database, and its prompt
  shows the schema: a changed schema is changed data.
  """
  files = (task.referenced_files(records)
           if hasattr(task, 'referenced_files') else ())
  return records_lib.content_hash(records, files)


def load_splits(
    section: Any, names: Sequence[str], task: Any, tokenizer: chat.Tokenizer
) -> dict[str, Split]:
  """Reads, renders and audits splits of `config.data`; skips unset ones.

  A split that took longer than `_MIN_SECONDS` to render is cached.

  Raises:
    UserError: for the first mistake in a file, a row or a split.
  """
  splits = {}
  folder = cache.folder('tokens')
  for name in names:
    if not section[name]:
      continue
    records = read_split(section, name)
    content = data_hash(records, task)
    key = _cache_key(name, section, records, content, task, tokenizer)
    cached = token_cache.load(folder, key)
    if cached is None:
      start = time.monotonic()
      cached = _render_split(name, section, records, task, tokenizer)
      if time.monotonic() - start > _MIN_SECONDS:
        token_cache.save(folder, key, cached)
    splits[name] = Split(
        records, cached.examples, audit.Report(**cached.facts), content)
  _check_leakage(splits, task)
  return splits


def _cache_key(split, section, records, content, task, tokenizer):
  """Returns a hash of everything that decides what `_render_split` returns."""
  package = pathlib.Path(__file__).parents[1]
  return token_cache.make_key(
      split, content, '\n'.join(r.where for r in records), tokenizer.proto,
      tokenizer.generation, task.__name__, section.max_length,
      section.max_cut_share,
      sources=[package / 'chat.py',
               *(package / 'inputs' / f'{module}.py' for module in (
                   'audit', 'splits', 'token_cache')),
               *sorted(path for path in (package / 'tasks').rglob('*')
                       if path.suffix in ('.py', '.json'))])


def _render_split(name, section, records, task, tokenizer):
  conversations = [task.to_messages(r) for r in records]
  examples, report = audit.check_split(
      name,
      [chat.render(c, tokenizer, r.where)
       for c, r in zip(conversations, records)],
      tokenizer, max_length=section.max_length,
      max_cut_share=section.max_cut_share,
      n_control_text=sum(
          chat.has_control_text(_text(c)) for c in conversations))
  keys = [token_cache.prompt_key(audit.normalise(_prompt(c)))
          for c in conversations]
  return token_cache.CachedSplit(
      token_cache.make(examples, keys), dataclasses.asdict(report))


def _check_leakage(splits, task):
  """Compares the prompts themselves only if some of their hashes are equal."""
  keys = [np.zeros(0, 'V16'), *(
      np.unique(split.examples.prompt_keys) for split in splits.values())]
  if len(np.unique(np.concatenate(keys))) < sum(map(len, keys)):
    audit.check_leakage({
        name: [(_prompt(task.to_messages(r)), r.where) for r in split.records]
        for name, split in splits.items()})


def _text(conversation):
  if isinstance(conversation, str):
    return conversation
  return '\n'.join(m.content for m in conversation)


def _prompt(conversation):
  return _text(conversation if isinstance(conversation, str)
               else conversation[:-1])
