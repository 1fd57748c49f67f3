"""One order of batches: every example, everywhere, after every resume."""

import collections
import dataclasses
import re

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_sft import batches as batches_lib
from gemma_sft import chat
from gemma_sft import errors

_KEYS = ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')


def _example(number, length):
  """An example of `length` input tokens that all tell its number."""
  tokens = np.full(length + 1, 10 + number, np.int32)
  tokens[0], tokens[-1] = 2, 1
  mask = np.arange(length + 1) >= (length + 2) // 2
  return chat.Example(
      tokens, mask, target_bytes=length, target_characters=length,
      where=f'f:{number}')


def _examples(lengths):
  return [_example(i, length) for i, length in enumerate(lengths)]


def _layout(**changes):
  return batches_lib.Layout(**dict(batch_size=4, max_length=16) | changes)


def _assert_equal(one, other):
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@st.composite
def _settings(draw):
  microbatches, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
  packing = draw(st.booleans())
  layout = _layout(
      batch_size=microbatches * groups * draw(st.integers(1, 3)),
      packing=packing, repeat=draw(st.integers(1, 3)),
      buckets=() if packing else draw(st.sampled_from(
          [(), (16,), (4, 9, 16), (5, 40)])),
      microbatches=microbatches, groups=groups)
  lengths = draw(st.lists(st.integers(2, 16), min_size=1, max_size=20))
  return layout, lengths, draw(st.one_of(st.none(), st.integers(0, 99)))


_MANY = hypothesis.settings(max_examples=60, deadline=None)


def _checked_plan(lengths, layout, seed, epoch):
  """Returns a plan that holds every example, with no row over full."""
  plan = batches_lib.plan_epoch(lengths, layout, seed=seed, epoch=epoch)
  seen = collections.Counter(i for _, rows in plan for row in rows for i in row)
  assert seen == {i: layout.repeat for i in range(len(lengths))}
  for T, rows in plan:
    assert len(rows) == layout.batch_size
    assert T in (layout.buckets or (layout.max_length,))
    assert any(rows), 'a batch of padding alone'
    for row in rows:
      assert sum(lengths[i] for i in row) <= T
      assert layout.packing or len(row) <= 1
  return plan


@_MANY
@hypothesis.given(_settings(), st.integers(0, 3))
def test_an_epoch_holds_every_example_and_no_row_is_over_full(settings, epoch):
  layout, lengths, seed = settings
  # The order is a function of seed and epoch.
  assert _checked_plan(lengths, layout, seed, epoch) == (
      batches_lib.plan_epoch(lengths, layout, seed=seed, epoch=epoch))


@pytest.mark.parametrize('seed, batch_size', (
    (0, 1), (1, 2), (2, 8), (3, 1), (4, 2), (5, 8)))
def test_every_epoch_has_as_many_batches_and_every_example(seed, batch_size):
  # Lengths at which the order decides how many rows are needed.
  lengths = np.random.default_rng(seed).integers(40, 130, 90).tolist()
  layout = _layout(batch_size=batch_size, max_length=256)
  assert len({len(_checked_plan(lengths, layout, seed, epoch))
              for epoch in range(6)}) == 1


@pytest.mark.parametrize('packing', (True, False))
@pytest.mark.parametrize('same_length', (True, False))
def test_epochs_and_seeds_differ(packing, same_length):
  lengths = [8] * 40 if same_length else [3 + i % 9 for i in range(40)]
  layout = _layout(packing=packing)
  plans = [str(batches_lib.plan_epoch(lengths, layout, seed=seed, epoch=epoch))
           for seed in (0, 1, None) for epoch in (0, 1)]
  assert len(set(plans)) == 5
  assert plans[4] == plans[5]  # Without a seed there is no shuffling.


@pytest.mark.parametrize('lengths, changes, wanted', (
    # Without packing or seed the order is that of the data.
    ([3, 4, 5], dict(batch_size=2), [(16, [[0], [1]]), (16, [[2], []])]),
    # An example goes to the smallest bucket that holds it.
    ([4, 5, 8, 9, 1], dict(batch_size=1, buckets=(4, 8, 16)),
     [(4, [[0]]), (8, [[1]]), (8, [[2]]), (16, [[3]]), (4, [[4]])])))
def test_unpacked_rows(lengths, changes, wanted):
  assert batches_lib.plan_epoch(
      lengths, _layout(packing=False, **changes), seed=None, epoch=0) == wanted


# Lengths in tokens like those of public data, rendered for Gemma 3.
_REAL = {
    'code, 98 pairs in five passes': lambda rng: 5 * [290, *np.clip(
        rng.lognormal(4.1, 0.5, 97), 18, 280).astype(int).tolist()],
    'poems of four forms': lambda rng: [
        int(n) for mean in (46, 54, 70, 88)
        for n in rng.normal(mean, 4, 400).clip(40, 183)],
    'questions with the tables of ten databases': lambda rng: [
        int(n) for base in (90, 100, 130, 150, 180, 210, 230, 250, 340, 355)
        for n in base + rng.integers(0, 30, 60)],
    'any up to 200': lambda rng: rng.integers(30, 201, 300).tolist()}


@pytest.mark.parametrize('kind', _REAL)
@pytest.mark.parametrize('batch_size', (2, 8))
def test_packing_fills_at_least_97_percent(kind, batch_size):
  lengths = _REAL[kind](np.random.default_rng(0))
  layout = _layout(max_length=512, batch_size=batch_size, repeat=2)
  for seed in range(2):
    plan = _checked_plan(lengths, layout, seed, 0)
    places = sum(T * len(rows) for T, rows in plan)
    assert layout.repeat * sum(lengths) / places >= 0.97


def test_rows_are_few_and_mix_lengths():
  lengths = _REAL['poems of four forms'](np.random.default_rng(0))
  plan = batches_lib.plan_epoch(
      lengths, _layout(max_length=512, batch_size=1), seed=0, epoch=0)
  # One more than the tokens need at most: all epochs have as many as the order
  # of lengths needs.
  assert 0 <= len(plan) - -(-sum(lengths) // 512) <= 1
  means = [np.mean([lengths[i] for i in row]) for _, [row] in plan]
  # Seven lengths drawn at random have means that scatter by std / sqrt(7).
  assert np.std(means) < 1.5 * np.std(lengths) / 7**0.5


def test_the_order_of_lengths_comes_where_it_saves_a_batch():
  lengths = _REAL['questions with the tables of ten databases'](
      np.random.default_rng(1))
  layout = _layout(max_length=512, batch_size=1)
  order = range(len(lengths))
  mixed, dense = (batches_lib._pack(order, lengths, 512, mixed=mixed)
                  for mixed in (True, False))
  assert len(dense) < len(mixed)
  assert batches_lib._pack_batches(order, lengths, layout) == dense
  # Not where the batches are as many.
  assert batches_lib._pack_batches(
      order, lengths, _layout(max_length=512, batch_size=1000)) == mixed


@pytest.mark.parametrize('lengths', ([], [7], [3, 5], [4, 6, 9], [1], [40, 2]))
def test_sums_of_lengths(lengths):
  is_sum, generators = batches_lib._sums(lengths, 30)
  wanted = {0}
  for _ in range(30):
    wanted |= {a + b for a in wanted for b in lengths if a + b <= 30}
  assert set(np.flatnonzero(is_sum).tolist()) == wanted
  assert generators <= set(lengths)
  assert batches_lib._sums(generators, 30)[0].tolist() == is_sum.tolist()


@pytest.mark.parametrize('changes, got', (
    (dict(batch_size=6, microbatches=2, groups=2), 'batch_size is 6'),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(packing=False, buckets=(4, 8)), r'buckets is \(4, 8\)'),
    (dict(packing=False, buckets=(16, 8)), r'buckets is \(16, 8\)'),
    (dict(packing=False, buckets=(8, 8, 16)), r'buckets is \(8, 8, 16\)')))
def test_a_layout_that_does_not_work_out_is_refused(changes, got):
  with pytest.raises(errors.UserError, match=got) as caught:
    _layout(**changes)
  if 'batch_size' in changes:  # What it suggests works.
    _layout(**changes | dict(batch_size=int(re.search(
        r'batch_size=(\d+)', caught.value.fix)[1])))


def test_a_packed_row_token_by_token():
  examples = [_example(0, 4), _example(1, 3)]
  batch = batches_lib.Batches(
      examples, _layout(max_length=8, batch_size=1), seed=None)[0]
  expected = dict(
      #            first           second      padding
      tokens=     [2, 10, 10, 10,  2, 11, 11,  0],
      targets=    [10, 10, 10, 1,  11, 11, 1,  0],
      positions=  [0, 1, 2, 3,     0, 1, 2,    0],
      segment_ids=[1, 1, 1, 1,     2, 2, 2,    0],
      loss_mask=  [0, 0, 1, 1,     0, 1, 1,    0])
  for key, value in expected.items():
    np.testing.assert_array_equal(batch[key], [[value]], err_msg=key)
    assert batch[key].dtype == (bool if key == 'loss_mask' else np.int32)
  np.testing.assert_array_equal(batch['rows'], [[0]])
  assert batch['n_tokens'] == 7
  # 4 trained, of a share of 8: a multiple of its eighth.
  assert batch['max_trained'] == 4


def _segments(batch):
  """Returns (tokens and last target, loss mask) of each segment."""
  found = []
  T = batch['tokens'].shape[-1]
  for row in zip(*(batch[key].reshape(-1, T) for key in _KEYS)):
    ids = row[_KEYS.index('segment_ids')]
    for segment in range(1, ids.max() + 1):
      at = np.flatnonzero(ids == segment)
      assert (np.diff(at) == 1).all()
      tokens, targets, positions, _, mask = (part[at].tolist() for part in row)
      assert positions == list(range(len(at)))
      assert tokens[1:] == targets[:-1]
      found.append(((*tokens, targets[-1]), tuple(mask)))
    assert not any(part[ids == 0].any() for part in row)
  return found


@_MANY
@hypothesis.given(_settings())
def test_batches_hold_the_examples_whole_and_alone(settings):
  layout, lengths, seed = settings
  examples = _examples(lengths)
  source = batches_lib.Batches(examples, layout, seed=seed)
  batches = [source[i] for i in range(len(source))]
  found = collections.Counter(s for b in batches for s in _segments(b))
  assert found == collections.Counter({
      (tuple(e.tokens.tolist()), tuple(e.loss_mask[1:].tolist())):
      layout.repeat for e in examples})
  assert sum(b['n_tokens'] for b in batches) == sum(lengths) * layout.repeat
  assert source.target_bytes() == sum(lengths) * layout.repeat
  # No device's share trains more than the bound.
  bounds = collections.defaultdict(set)
  for batch in batches:
    shares = batch['loss_mask'].reshape(
        layout.microbatches * layout.groups, -1).sum(axis=1)
    assert 1 <= shares.max() <= batch['max_trained']
    bounds[batch['tokens'].shape[-1]].add(int(batch['max_trained']))
  # Each bound is a program to compile.
  assert all(len(b) == 1 for b in bounds.values())


@pytest.mark.parametrize('packing, hosts', (
    # On a torus of chips the shards of one host need not be consecutive.
    (packing, hosts) for packing in (True, False) for hosts in (
        ((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)), ((1, 3), (0, 2)))))
def test_hosts_share_one_global_batch(packing, hosts):
  examples = _examples([3 + i % 9 for i in range(30)])
  layout = _layout(batch_size=16, microbatches=2, groups=4, packing=packing)
  whole = batches_lib.Batches(examples, layout, seed=3)
  sources = [batches_lib.Batches(examples, layout, seed=3, shards=shards)
             for shards in hosts]
  for i in range(len(whole)):
    for source, shards in zip(sources, hosts):
      part = source[i]
      rows = np.arange(8).reshape(4, 2)[list(shards)].ravel()
      _assert_equal(part, {
          key: value[:, rows] if key in (*_KEYS, 'rows') else value
          for key, value in whole[i].items()})


def test_epochs_follow_one_another():
  def make(epochs):
    return batches_lib.Batches(
        _examples([5] * 8), _layout(packing=False, microbatches=2), seed=0,
        epochs=epochs)

  source, endless = make(3), make(None)
  assert (source.batches_per_epoch, len(source)) == (2, 6)
  assert len(endless) > 10**9
  orders = {source[2 * e]['tokens'].tobytes()
            + source[2 * e + 1]['tokens'].tobytes() for e in range(3)}
  assert len(orders) == 3
  # Rows are numbered through the run.
  np.testing.assert_array_equal(
      [source[i]['rows'] for i in range(6)], np.arange(24).reshape(6, 2, 2))
  # In any order of access.
  _assert_equal(endless[5], source[5])
  _assert_equal(endless[0], source[0])


def _source(packing=True, **changes):
  lengths = np.random.default_rng(1).integers(2, 17, 40).tolist()
  return batches_lib.Batches(
      _examples(lengths), _layout(packing=packing, repeat=2, groups=2), seed=7,
      epochs=None, **changes)


@pytest.mark.parametrize('packing', (True, False))
@pytest.mark.parametrize('k', (0, 1, 7, 25))
def test_an_iterator_goes_on_where_its_state_was_taken(k, packing):
  one, second = (batches_lib.make_iterator(_source(packing, shards=shards))
                 for shards in (None, (1,)))
  for _ in range(k):
    next(one), next(second)
  # The threads have fetched more by now than were consumed.
  state = one.get_state()
  assert state == second.get_state()  # It does not know the number of hosts.
  resumed = batches_lib.make_iterator(_source(packing), state=state)
  source = _source(packing)
  for i in range(k, k + 12):
    wanted = source[i]
    _assert_equal(next(resumed), wanted)
    _assert_equal(next(one), wanted)


def test_the_chain_grows_with_the_batches_consumed():
  source = _source()
  iterator = batches_lib.make_iterator(source)
  chain = batches_lib.EMPTY_CHAIN
  for n in range(1, 13):
    chain = batches_lib.extend_chain(chain, next(iterator)['digest'].tobytes())
    assert chain == batches_lib.chain_of(source, n)
  assert batches_lib.chain_of(source, 0) == batches_lib.EMPTY_CHAIN
  assert batches_lib.chain_of(_source(shards=(1,)), 12) == chain


def _chain(examples, layout=None, seed=0):
  return batches_lib.chain_of(
      batches_lib.Batches(
          examples, layout or _layout(), seed=seed, epochs=None), 4)


def test_the_chain_changes_with_what_reaches_the_model():
  examples = _examples([3 + i % 9 for i in range(20)])
  tokens, mask = examples[3].tokens.copy(), examples[3].loss_mask.copy()
  tokens[1] += 1
  mask[-2] = ~mask[-2]
  chains = [
      _chain(examples), _chain(examples[:-1]), _chain(examples[::-1]),
      _chain(examples, seed=1),
      *(_chain([*examples[:3], dataclasses.replace(examples[3], **changes),
                *examples[4:]])
        for changes in (dict(tokens=tokens), dict(loss_mask=mask))),
      *(_chain(examples, _layout(**changes)) for changes in (
          dict(batch_size=2), dict(max_length=17), dict(packing=False),
          dict(repeat=2)))]
  assert len(set(chains)) == len(chains)
  # Names of files are not data.
  renamed = [dataclasses.replace(e, where='other') for e in examples]
  assert _chain(renamed) == chains[0]
