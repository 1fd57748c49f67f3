"""The token cache gives back exactly what was rendered, or nothing."""

import dataclasses
import logging
import os
import shutil

import conftest
import numpy as np
import pytest

from gemma_sft import batches
from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import splits
from gemma_sft.inputs import token_cache


def _assert_equal(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    assert (a.where, a.target_bytes) == (b.where, b.target_bytes)
    assert (a.tokens.dtype, a.loss_mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


@pytest.fixture(scope='module')
def examples():
  tokenizer = conftest.make_tokenizer(3)
  return [chat.render([chat.Message('user', 'x' * (3 * i + 1)),
                       chat.Message('model', 'é' * (i % 5 + 1))],
                      tokenizer, f'Größe.txt:{i}') for i in range(20)]


@pytest.fixture(scope='module')
def split(examples):
  keys = [token_cache.prompt_key(str(i)) for i in range(len(examples))]
  return token_cache.CachedSplit(
      token_cache.make(examples, keys), {'split': 'train', 'n': 20})


def test_views_of_the_examples_and_sums_over_them(examples):
  table = token_cache.make(examples)
  _assert_equal(table, examples)
  _assert_equal([table[-1], table[3]], [examples[-1], examples[3]])
  _assert_equal(table[2:9:3], examples[2:9:3])
  with pytest.raises(IndexError):
    table[20]
  assert np.shares_memory(table[3].tokens, table[3].tokens)
  assert token_cache.make(table) is table
  assert table.lengths().tolist() == [len(e.tokens) - 1 for e in examples]
  assert table.trained().tolist() == [
      int(e.loss_mask[1:].sum()) for e in examples]
  assert table.target_bytes() == sum(e.target_bytes for e in examples)
  # A first token is never a target, even if the mask marks it.
  mask = np.ones_like(examples[0].loss_mask)
  odd = dataclasses.replace(examples[0], loss_mask=mask)
  assert token_cache.make([odd, odd]).trained().tolist() == 2 * [len(mask) - 1]


def test_what_is_loaded_equals_what_was_saved(tmp_path, split, examples):
  token_cache.save(tmp_path, 'k', split)
  loaded = token_cache.load(tmp_path, 'k')
  _assert_equal(loaded.examples, examples)
  assert loaded.facts == split.facts
  assert loaded.examples.prompt_keys.tobytes() == (
      split.examples.prompt_keys.tobytes())
  layout = batches.Layout(batch_size=2, max_length=128)
  sources = [batches.Batches(part, layout, seed=0, epochs=2)
             for part in (examples, split.examples, loaded.examples)]
  assert len({batches.chain_of(s, len(s)) for s in sources}) == 1
  assert [p.name for p in tmp_path.iterdir()] == ['k']
  # NumPy alone reads the files, and maps them instead of reading them whole.
  np.testing.assert_array_equal(
      np.load(tmp_path / 'k' / 'tokens.npy'), split.examples.arrays['tokens'])
  tokens = loaded.examples[0].tokens
  assert not tokens.flags.owndata and not tokens.flags.writeable
  assert tokens.flags.aligned


def test_an_entry_is_found_under_its_own_key_only(tmp_path, split):
  token_cache.save(tmp_path, 'k', split)
  assert token_cache.load(tmp_path, 'other') is None
  assert token_cache.load(tmp_path / 'nowhere', 'k') is None
  shutil.copytree(tmp_path / 'k', tmp_path / 'other')
  assert token_cache.load(tmp_path, 'other') is None
  table = token_cache.make([])  # A split may have no examples.
  assert list(table) == [] and table.trained().tolist() == []
  token_cache.save(tmp_path, 'k', token_cache.CachedSplit(table, {}))
  assert list(token_cache.load(tmp_path, 'k').examples) == []
  # A key knows where a part ends.
  keys = {token_cache.make_key('ab', 'c'), token_cache.make_key('a', 'bc')}
  for text in '12':
    (tmp_path / 'a.py').write_text(text)
    keys.add(token_cache.make_key('ab', 'c', sources=[tmp_path / 'a.py']))
  assert len(keys) == 4


def _flip(data, i):
  return data[:i] + bytes([data[i] ^ 1]) + data[i + 1:]


@pytest.mark.parametrize('name, damage', (
    ('tokens.npy', lambda b: b[:-8]), ('loss_mask.npy', lambda b: b''),
    ('starts.npy', lambda b: b'# INPUT\n' + b),
    ('tokens.npy', lambda b: _flip(b, len(b) // 2)),
    ('tokens.npy', lambda b: _flip(b, 20)), ('facts.npy', lambda b: None),
    ('facts.npy', lambda b: _flip(b, len(b) - 2)),
    ('index.json', lambda b: None), ('index.json', lambda b: b'\xff'),
    ('index.json', lambda b: b'[]'), ('index.json', lambda b: b[:-9]),
    ('index.json', lambda b: b.replace(b'"key"', b'"kez"')),
    ('index.json', lambda b: b.replace(b'"starts"', b'"stars"'))),
    ids=('cut', 'empty', 'foreign', 'a bit', 'a bit of the header',
         'no facts', 'a bit of the facts', 'no index', 'not text', 'a list',
         'half an index', 'no key', 'no hash'))
def test_a_damaged_entry_is_reported(tmp_path, split, name, damage, caplog):
  token_cache.save(tmp_path, 'k', split)
  path = tmp_path / 'k' / name
  data = damage(path.read_bytes())
  path.unlink()
  if data is not None:
    path.write_bytes(data)
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert token_cache.load(tmp_path, 'k') is None
  [line] = caplog.messages
  assert f'{tmp_path / "k"} are damaged' in line and '\n' not in line
  token_cache.save(tmp_path, 'k', split)
  assert token_cache.load(tmp_path, 'k') is not None
  assert len(caplog.messages) == 1


def test_the_entries_unused_for_longest_go_first(tmp_path, split):
  def names():
    return {p.name for p in tmp_path.iterdir()}

  token_cache.save(tmp_path, 'size', split)
  size = token_cache._size(tmp_path / 'size')
  shutil.rmtree(tmp_path / 'size')
  # A file of an earlier version is the oldest.
  (tmp_path / 'f.tokens').write_bytes(b'x')
  for key in 'abc':
    token_cache.save(tmp_path, key, split)
  for age, key in ((400, 'f.tokens'), (300, 'a'), (200, 'b'), (100, 'c')):
    path = tmp_path / key
    os.utime(path, (path.stat().st_mtime - age,) * 2)
  token_cache.load(tmp_path, 'a')  # Used now.
  assert names() == {'f.tokens', 'a', 'b', 'c'}
  token_cache.save(tmp_path, 'd', split, max_bytes=3 * size)
  assert names() == {'a', 'c', 'd'}
  token_cache.save(tmp_path, 'e', split, max_bytes=0)
  assert names() == {'e'}


def test_a_full_disk_costs_only_time(tmp_path, split, caplog, monkeypatch):
  def full(path, array):
    del path, array
    raise OSError(28, 'No space left on device')

  (tmp_path / 'file').write_text('')
  with caplog.at_level(logging.WARNING, logger='absl'):
    token_cache.save(tmp_path / 'file', 'k', split)
    monkeypatch.setattr(np, 'save', full)
    token_cache.save(tmp_path / 'cache', 'k', split)
  assert [('are not cached' in m, '\n' in m) for m in caplog.messages] == [
      (True, False)] * 2
  assert not list((tmp_path / 'cache').iterdir())


def test_two_processes_may_write_one_entry(tmp_path, split, monkeypatch):
  rmtree = shutil.rmtree

  def race(path, **kwargs):  # The other process finishes just before.
    rmtree(path, **kwargs)
    if path == tmp_path / 'k':
      monkeypatch.setattr(shutil, 'rmtree', rmtree)
      token_cache.save(tmp_path, 'k', split)

  monkeypatch.setattr(shutil, 'rmtree', race)
  token_cache.save(tmp_path, 'k', split)
  assert [p.name for p in tmp_path.iterdir()] == ['k']
  assert token_cache.load(tmp_path, 'k') is not None


def _load(config, tokenizer, names=('train', 'validation')):
  return splits.load_splits(
      config.data, names, tasks.load(config.task), tokenizer)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The cache, which takes every split, however fast it was rendered."""
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(splits, '_MIN_SECONDS', -1.0)
  return tmp_path / 'cache' / 'tokens'


def test_a_split_is_rendered_once(config, tokenizer, folder, monkeypatch):
  config.data.max_length = 10
  for _ in range(2):  # What was refused is refused again.
    with pytest.raises(errors.UserError, match='longer than the limit'):
      _load(config, tokenizer)
  config.data.max_length = 64
  assert not folder.exists()
  monkeypatch.setattr(splits, '_MIN_SECONDS', 60.0)
  _load(config, tokenizer)
  assert not folder.exists()  # It took less.
  monkeypatch.setattr(splits, '_MIN_SECONDS', -1.0)
  first = _load(config, tokenizer)
  assert len(list(folder.iterdir())) == 2
  monkeypatch.setattr(chat, 'render', None)  # Must not be called.
  again = _load(config, tokenizer)
  for name in first:
    _assert_equal(again[name].examples, first[name].examples)
    assert again[name].report == first[name].report
    assert again[name].records == first[name].records


def test_all_that_decides_is_in_the_key(config, tokenizer, folder, tmp_path):
  train, moved = tmp_path / 'train.txt', tmp_path / 'moved.txt'
  changes = (lambda: None, lambda: config.data.update(max_length=63),
             lambda: config.data.update(max_cut_share=0.5),
             lambda: config.update(task='blop'),
             lambda: conftest.write_pairs(train, [('A?', 'B.')]),
             # Messages name the file.
             lambda: config.data.update(train=str(train.rename(moved))))
  for n_files, change in enumerate(changes, 1):
    change()
    _load(config, tokenizer, ('train',))
    assert len(list(folder.iterdir())) == n_files
  _load(config, conftest.make_tokenizer(2), ('train',))
  assert len(list(folder.iterdir())) == len(changes) + 1


def test_a_common_prompt_is_found(config, tokenizer, folder, tmp_path):
  pairs = [('Why?', 'So.'), ('How?', 'Thus.')]
  config.data.train = conftest.write_pairs(tmp_path / 'a.txt', pairs)
  config.data.validation = conftest.write_pairs(
      tmp_path / 'b.txt', [('WHY', 'Because.')])
  for _ in range(2):
    with pytest.raises(errors.UserError, match=r'b.txt:1 has the prompt of'):
      _load(config, tokenizer)
  assert len(list(folder.iterdir())) == 2
  config.data.validation = ''  # A prompt twice in one split is no leak.
  config.data.train = conftest.write_pairs(tmp_path / 'a.txt', 2 * pairs)
  _load(config, tokenizer)
