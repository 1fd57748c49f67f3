"""Ratings: their file and their summary."""

import contextlib
import itertools
import sqlite3

import numpy as np
import pytest

from gemma_sft import errors
from gemma_sft.serving import ratings

_RUNS = ('w/a', 'w/b')


def _rating(rater, item, choice, first='a', **marks):
  """`style='42'` marks a's style 4 and b's 2; '.' is none."""
  return ratings.Rating(rater, item, first, choice, {
      (side, criterion): int(mark)
      for criterion, both in marks.items()
      for side, mark in zip('ab', both) if mark != '.'})


def _add(store, *rated):
  return [store.add(r, runs=_RUNS, place='test.txt:1') for r in rated]


def _execute(path, statement):
  """Returns the rows of a statement, by SQLite alone."""
  with contextlib.closing(sqlite3.connect(path)) as connection, connection:
    return connection.execute(statement).fetchall()


@pytest.fixture
def store(tmp_path):
  return ratings.Store(str(tmp_path / 'new' / 'ratings.sqlite'))


def test_a_rating_is_on_disk_as_soon_as_it_is_given(store):
  given = _rating('Ana', 'x', 'b', 'b', style='42', fluency='.5')
  assert _add(store, given) == [True]
  assert _execute(
      store.path, 'SELECT rater, run_a, run_b, item, place, shown_first,'
      ' choice, undone FROM ratings') == [
          ('Ana', *_RUNS, 'x', 'test.txt:1', 'b', 'b', 0)]
  assert sorted(_execute(
      store.path, 'SELECT side, criterion, mark FROM marks')) == [
          ('a', 'style', 4), ('b', 'fluency', 5), ('b', 'style', 2)]
  assert ratings.Store(store.path).ratings() == [given]


def test_a_rater_rates_a_pair_once_and_undoes_the_last_of_these_pairs(store):
  rated = [_rating('Ana', 'x', 'a', style='12'), _rating('Ana', 'y', 'tie')]
  others = [_rating('Ana', 'of another comparison', 'b'),
            _rating('Bo', 'y', 'b')]
  assert _add(store, *rated, _rating('Ana', 'x', 'b'), *others) == [
      True, True, False, True, True]
  assert store.ratings() == [*rated, *others]
  assert [store.undo('Ana', ['x', 'y']) for _ in range(3)] == [
      *rated[::-1], None]
  assert [(r.rater, r.item) for r in store.ratings()] == [
      ('Ana', 'of another comparison'), ('Bo', 'y')]
  # It stays in the file, and the pair can be rated again.
  assert _execute(store.path, 'SELECT sum(undone) FROM ratings') == [(2,)]
  assert _add(store, _rating('Ana', 'x', 'b')) == [True]


def test_an_invalid_rating_is_not_stored(store):
  for wrong in (_rating('Ana', 'x', 'c'), _rating('Ana', 'x', 'a', 'z'),
                _rating('Ana', 'x', 'a', style='60')):
    with pytest.raises(sqlite3.IntegrityError):
      _add(store, wrong)
    assert store.ratings() == []


def test_another_kind_of_file_is_refused(tmp_path):
  text = tmp_path / 'notes.txt'
  text.write_text('not a database, and long enough to tell' * 9)
  _execute(tmp_path / 'other.sqlite', 'CREATE TABLE songs (name)')
  for name, match in (('notes.txt', 'choose another --out'),
                      ('other.sqlite', 'another program'),
                      ('notes.txt/in a file', 'choose another --out')):
    with pytest.raises(errors.UserError, match=match):
      ratings.Store(str(tmp_path / name))
  assert text.read_text().startswith('not a')


# Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section C:
# four observers, twelve units, '.' for a missing value.
_PUBLISHED = ('123321412...', '1233224125.3', '.3332342251.', '12332441251.')


def test_alpha_knows_full_agreement_chance_and_its_opposite():
  # Section D of the publication gives 0.815 for these as ordinal data.
  assert ratings.krippendorff_alpha([
      [int(v) for v in column if v != '.'] for column in zip(*_PUBLISHED)
  ]) == pytest.approx(0.815, abs=5e-4)
  assert ratings.krippendorff_alpha([[0, 0], [1, 1], [2, 2]]) == 1
  assert ratings.krippendorff_alpha([[0, 2], [2, 0], [0, 2]]) < 0
  # 2,000 units: the standard error is about 0.02.
  chance = np.random.default_rng(0).integers(0, 3, (2000, 3)).tolist()
  assert abs(ratings.krippendorff_alpha(chance)) < 0.06
  # A tie is nearer to either than they are to each other.
  near = ratings.krippendorff_alpha([[0, 1], [0, 0], [1, 1], [2, 2]])
  far = ratings.krippendorff_alpha([[0, 2], [0, 0], [1, 1], [2, 2]])
  assert near > far
  for units in ([], [[1], [2]], [[1, 1], [1, 1]], [[1, 1], [2]]):
    assert ratings.krippendorff_alpha(units) is None


def test_win_rate_counts_a_tie_half_and_a_pair_once():
  rate, interval = ratings.win_rate([['a']] * 8 + [['b']] * 2)
  assert rate == 0.8
  # R: prop.test(8, 10, correct=FALSE).
  assert interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
  assert ratings.win_rate([['tie']] * 4)[0] == 0.5
  assert ratings.win_rate([['a', 'a', 'a', 'a'], ['b']])[0] == 0.5
  many = ratings.win_rate([['a'] * 9, ['b'] * 9])[1]
  assert many == ratings.win_rate([['a'], ['b']])[1]  # Not of 18.
  assert ratings.win_rate([]) == (None, (0.0, 1.0))
  # The interval holds the true rate as often as it says.
  rng, hits = np.random.default_rng(1), 0
  for _ in range(400):
    drawn = rng.choice(ratings.CHOICES, 40, p=(0.4, 0.3, 0.3))
    low, high = ratings.win_rate([[c] for c in drawn])[1]
    hits += low <= 0.55 <= high
  # At least the 95 % that it names, three standard errors (0.011) aside.
  assert hits / 400 > 0.917


def test_summary():
  rated = [
      _rating('Ana', 'x', 'a', 'a', style='42', meaning='3.'),
      _rating('Ana', 'y', 'tie', 'b', style='33'),
      _rating('Ana', 'z', 'b', 'a'), _rating('Bo', 'x', 'a', 'b', style='52'),
      _rating('Bo', 'y', 'b', 'b'), _rating('Cy', 'gone', 'b', 'b')]
  got = ratings.summarise(rated, ['x', 'y', 'z', 'unseen'])
  del got['win_interval']
  assert got == {
      'n_items': 4, 'n_rated': 3, 'raters': {'Ana': 3, 'Bo': 2},
      'counts': {'a': 2, 'tie': 1, 'b': 2},
      'win_rate': pytest.approx((1 + 0.25 + 0) / 3), 'agreement': 0.5,
      'alpha': ratings.krippendorff_alpha([[0, 0], [1, 2]]),
      'shown_first': 0.5,  # Ana's x and Bo's y of four.
      'marks': [{  # Nobody marked the meaning of both.
          'criterion': 'style', 'n': 2, 'a': pytest.approx(3.75),
          'b': pytest.approx(2.5), 'gain': pytest.approx(1.25),
          'gain_interval': (0, 2.5),
          'alpha': ratings.krippendorff_alpha([[4, 5], [2, 2]])}]}


def test_report():
  rated = [_rating(who, item, 'a', style='51')
           for who, item in itertools.product(('Ana', 'Bo'), 'xy')]
  text = ratings.report(ratings.summarise(rated, ['x', 'y', 'z']), _RUNS)
  assert '2 of 3 pairs rated by 2: Ana (2), Bo (2)' in text
  assert 'win rate of w/a: 100.0% (95 %: 34% to 100%' in text
  assert "100.0% of choices the same, Krippendorff's alpha -" in text
  assert 'style: w/a 5.00, w/b 1.00, difference +4.00' in text
  nothing = ratings.report(ratings.summarise([], ['x']), _RUNS)
  assert nothing == '0 of 1 pairs rated by 0: nobody yet'
