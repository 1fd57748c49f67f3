"""What a file of tokens gives back is what was rendered."""

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


@pytest.fixture
def examples(tokenizer):
  return [
      chat.render([chat.Message('user', 'x' * (3 * i + 1)),
                   chat.Message('model', 'é' * (i % 5 + 1))],
                  tokenizer, f'Größe.txt:{i}') for i in range(20)]


@pytest.fixture
def kept(examples):
  keys = [token_cache.prompt_key(str(i)) for i in range(len(examples))]
  return token_cache.Kept(
      token_cache.make(examples, keys), {'split': 'train', 'n': 20})


# Arrays -----------------------------------------------------------------------


def test_views_are_the_examples(examples):
  table = token_cache.make(examples)
  _assert_equal(table, examples)
  _assert_equal([table[-1], table[3]], [examples[-1], examples[3]])
  _assert_equal(table[2:9:3], examples[2:9:3])
  with pytest.raises(IndexError):
    table[20]
  # Nothing is copied.
  assert np.shares_memory(table[3].tokens, table[3].tokens)
  assert token_cache.make(table) is table


def test_sums_over_all_examples(examples):
  table = token_cache.make(examples)
  assert table.lengths().tolist() == [len(e.tokens) - 1 for e in examples]
  assert table.trained().tolist() == [
      int(e.loss_mask[1:].sum()) for e in examples]
  assert table.target_bytes() == sum(e.target_bytes for e in examples)
  # A first token is no target, whatever the mask says of it.
  mask = np.ones_like(examples[0].loss_mask)
  odd = dataclasses.replace(examples[0], loss_mask=mask)
  assert token_cache.make([odd, odd]).trained().tolist() == 2 * [len(mask) - 1]


def test_no_examples():
  table = token_cache.make([])
  assert list(table) == [] and table.trained().tolist() == []


# Files ------------------------------------------------------------------------


def test_a_file_gives_back_what_was_kept(tmp_path, kept, examples):
  token_cache.save(tmp_path, 'k', kept)
  loaded = token_cache.load(tmp_path, 'k')
  _assert_equal(loaded.examples, examples)
  assert loaded.facts == kept.facts
  assert loaded.examples.prompt_keys.tobytes() == (
      kept.examples.prompt_keys.tobytes())
  layout = batches.Layout(batch_size=2, max_length=128)
  sources = [batches.Batches(part, layout, seed=0, epochs=2)
             for part in (examples, kept.examples, loaded.examples)]
  chains = {batches.chain_of(s, len(s)) for s in sources}
  assert len(chains) == 1
  assert [p.name for p in tmp_path.iterdir()] == ['k.tokens']
  # Mapped, not read.
  tokens = loaded.examples[0].tokens
  assert not tokens.flags.owndata and not tokens.flags.writeable
  assert tokens.flags.aligned


def test_nothing_is_found_under_another_key(tmp_path, kept):
  token_cache.save(tmp_path, 'k', kept)
  assert token_cache.load(tmp_path, 'other') is None
  assert token_cache.load(tmp_path / 'nowhere', 'k') is None


@pytest.mark.parametrize('damage', (
    lambda b: b[:-8], lambda b: b'', lambda b: b'# INPUT\n' + b,
    lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1])
    + b[len(b) // 2 + 1:],
    lambda b: b.replace(b'"key"', b'"kez"'), lambda b: b[:30] + b'}' + b[31:],
    lambda b: b[:22] + b'\xff' * 4 + b[26:]),
    ids=('cut', 'empty', 'foreign', 'a bit', 'no key', 'header', 'length'))
def test_a_damaged_file_is_told_and_left(tmp_path, kept, damage, caplog):
  token_cache.save(tmp_path, 'k', kept)
  path = tmp_path / 'k.tokens'
  path.write_bytes(damage(path.read_bytes()))
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert token_cache.load(tmp_path, 'k') is None
  [line] = caplog.messages
  assert 'k.tokens are damaged' in line and '\n' not in line
  token_cache.save(tmp_path, 'k', kept)
  assert token_cache.load(tmp_path, 'k') is not None


def test_a_file_moved_under_another_key_is_refused(tmp_path, kept):
  token_cache.save(tmp_path, 'k', kept)
  shutil.copy(tmp_path / 'k.tokens', tmp_path / 'other.tokens')
  assert token_cache.load(tmp_path, 'other') is None


def test_the_files_longest_unused_go_first(tmp_path, kept):
  token_cache.save(tmp_path, 'size', kept)
  size = (tmp_path / 'size.tokens').stat().st_size
  (tmp_path / 'size.tokens').unlink()
  for age, key in ((300, 'a'), (200, 'b'), (100, 'c')):
    token_cache.save(tmp_path, key, kept)
    path = tmp_path / f'{key}.tokens'
    os.utime(path, (path.stat().st_mtime - age,) * 2)
  token_cache.load(tmp_path, 'a')  # Used now.
  token_cache.save(tmp_path, 'd', kept, max_bytes=3 * size + 8)
  assert {p.stem for p in tmp_path.iterdir()} == {'a', 'c', 'd'}
  token_cache.save(tmp_path, 'e', kept, max_bytes=0)
  assert {p.stem for p in tmp_path.iterdir()} == {'e'}


def test_a_folder_that_cannot_be_written_is_told(tmp_path, kept, caplog):
  (tmp_path / 'file').write_text('')
  with caplog.at_level(logging.WARNING, logger='absl'):
    token_cache.save(tmp_path / 'file', 'k', kept)
  assert 'are not kept' in caplog.text


def test_a_key_knows_where_a_part_ends(tmp_path):
  (tmp_path / 'a.py').write_text('1')
  source = tmp_path / 'a.py'
  keys = [token_cache.make_key('ab', 'c'), token_cache.make_key('a', 'bc'),
          token_cache.make_key('ab', 'c', sources=[source])]
  source.write_text('2')
  keys.append(token_cache.make_key('ab', 'c', sources=[source]))
  assert len(set(keys)) == 4


# Splits -----------------------------------------------------------------------


def _load(config, tokenizer, names=('train', 'validation')):
  return splits.load_splits(
      config.data, names, tasks.load(config.task), tokenizer)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where tokens are kept: all, however fast they were made."""
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(splits, '_PAYS', -1.0)
  return tmp_path / 'cache' / 'tokens'


def test_a_split_is_rendered_once(config, tokenizer, folder, monkeypatch):
  first = _load(config, tokenizer)
  assert len(list(folder.iterdir())) == 2
  monkeypatch.setattr(splits, 'render', None)  # Must not be called.
  again = _load(config, tokenizer)
  for name in first:
    _assert_equal(again[name].examples, first[name].examples)
    assert again[name].report == first[name].report
    assert again[name].records == first[name].records


def test_a_small_split_leaves_no_file(config, tokenizer, folder, monkeypatch):
  monkeypatch.setattr(splits, '_PAYS', 60.0)
  _load(config, tokenizer)
  assert not folder.exists()


def test_all_that_decides_is_in_the_key(config, tokenizer, folder, tmp_path):
  n_files = 0

  def check():
    nonlocal n_files
    _load(config, tokenizer, ('train',))
    n_files += 1
    assert len(list(folder.iterdir())) == n_files

  check()
  config.data.max_length = 63
  check()
  config.data.max_cut_share = 0.5
  check()
  config.task = 'blop'
  check()
  tokenizer = conftest.make_tokenizer(2)
  check()
  conftest.write_pairs(tmp_path / 'train.txt', [('A?', 'B.')])
  check()
  os.rename(tmp_path / 'train.txt', tmp_path / 'moved.txt')
  config.data.train = str(tmp_path / 'moved.txt')
  check()  # Messages name the file.


def test_what_was_refused_is_refused_again(config, tokenizer, folder):
  config.data.max_length = 10
  for _ in range(2):
    with pytest.raises(errors.UserError, match='longer than the limit'):
      _load(config, tokenizer)
  assert not folder.exists()


def test_a_common_prompt_is_found_among_kept_splits(
    config, tokenizer, folder, tmp_path):
  pairs = [('Why?', 'So.'), ('How?', 'Thus.')]
  config.data.train = conftest.write_pairs(tmp_path / 'a.txt', pairs)
  config.data.validation = conftest.write_pairs(
      tmp_path / 'b.txt', [('WHY', 'Because.')])
  for _ in range(2):
    with pytest.raises(errors.UserError, match=r'b.txt:1 has the prompt of'):
      _load(config, tokenizer)
  assert len(list(folder.iterdir())) == 2
  # A prompt twice in one split is no leak.
  config.data.validation = ''
  config.data.train = conftest.write_pairs(tmp_path / 'a.txt', 2 * pairs)
  _load(config, tokenizer)
