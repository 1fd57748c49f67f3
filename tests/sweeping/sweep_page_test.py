"""What a sweep says: statistics, fronts, sentences, pages. On written runs."""

import itertools
import json
import math
import pathlib
import re

import compare_test
import numpy as np
import pytest
from scipy import stats

from gemma_sft import pages
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import page
from gemma_sft.sweeping import pictures
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs
from gemma_sft.sweeping import significance

_A, _B = np.array([2.1, 2.4, 2.2, 2.9]), np.array([2.0, 2.1, 2.2, 2.3])
_D_R = np.array([1, 0, 0, 1, -1, 0, 1, 1.0])


@pytest.mark.parametrize('d, expected, n', [
    (significance.paired(_A - _B), stats.ttest_rel(_A, _B), (4, 0)),
    (significance.crossed(_D_R[None]), stats.ttest_1samp(_D_R, 0), (1, 8)),
], ids=['several seeds', 'records of one seed'])
def test_one_dimension_is_students_t(d, expected, n):
  low, high = expected.confidence_interval(0.95)
  np.testing.assert_allclose(
      [d.mean, d.p, d.low, d.high],
      [(low + high) / 2, expected.pvalue, low, high], rtol=1e-12)
  assert (d.n_seeds, d.n_records) == n


def test_seeds_and_records_both_add_to_the_variance():
  # By hand. Seed means 2 and 0, record means 2 and 0, no rest: 2 / 2 + 2 / 2
  # = 2 of variance, 2^2 / (1^2 / 1 + 1^2 / 1) = 2 degrees of freedom, for
  # which P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)), at t = 1 / sqrt(2).
  d = significance.crossed(np.array([[3.0, 1.0], [1.0, -1.0]]))
  assert d.mean == 1.0
  np.testing.assert_allclose(d.p, 1 - 1 / math.sqrt(2) / math.sqrt(2.5))
  # 4.302653 is the 97.5 % point of two degrees of freedom.
  np.testing.assert_allclose(
      [d.low, d.high], 1 + np.array([-1, 1]) * 4.302653 * math.sqrt(2),
      rtol=1e-6)
  # With a rest, by mean squares of the two-way table without repetition:
  # (MS seeds + MS records - MS rest) / (S R).
  rng = np.random.default_rng(3)
  d_SR = (rng.normal(0, 1, (4, 1)) + rng.normal(0, 1, (1, 6))
          + rng.normal(0, 1, (4, 6)))
  ms_seeds = 6 * d_SR.mean(1).var(ddof=1)
  ms_records = 4 * d_SR.mean(0).var(ddof=1)
  ms_rest = (23 * d_SR.var(ddof=1) - 3 * ms_seeds - 5 * ms_records) / 15
  variance = (ms_seeds + ms_records - ms_rest) / 24
  freedom = (24 * variance) ** 2 / (
      ms_seeds ** 2 / 3 + ms_records ** 2 / 5 + ms_rest ** 2 / 15)
  d = significance.crossed(d_SR)
  np.testing.assert_allclose(
      d.high - d.mean,
      stats.t.ppf(0.975, freedom) * math.sqrt(variance), rtol=1e-9)


def test_differences_without_spread():
  one = significance.paired(np.array([0.3]))
  assert one.p is None and one.low is None and not one.beyond_chance
  assert significance.paired(np.zeros(3)).p == 1.0
  # Three seeds of one sign: 2 of 2^3 ways.
  assert significance.paired(np.full(3, 0.1)).p == 0.25
  assert significance.crossed(np.ones((3, 10))).p == 2.0 ** -9


def test_holm_and_pareto_by_hand():
  adjusted = [d and d.adjusted for d in significance.adjust([None, *(
      significance.Difference(0, 0, 0, p, 3, 0)
      for p in (0.01, 0.04, 0.03, None))])]
  # The smallest times 3, then 0.03 * 2, then 0.04 * 1 but no less.
  np.testing.assert_allclose(adjusted[1:4], [0.03, 0.06, 0.06])
  assert adjusted[0] is None and adjusted[4] is None
  # Front, beaten by 0, front, equal to 2: both stand, beaten by 2.
  assert significance.pareto(
      [1.0, 2.0, 3.0, 3.0, 4.0], [0.5, 0.4, 0.9, 0.9, 0.9]) == [
          True, False, True, True, False]


_RECORDS = 40


def _write_run(run, *, share, loss, seconds=60.0, gigabytes=2.0, seed=0):
  rng = np.random.default_rng(1000 * run.seed + seed)
  # The same questions are hard for all.
  hard = np.random.default_rng(7).random(_RECORDS)
  verdicts = hard + rng.normal(0, 0.08, _RECORDS) < share
  folder = pathlib.Path(run.workdir)
  compare_test.write_run(
      folder, dict(run.leaves), [
          {'step': step, 'loss': 5 * 0.9 ** step + loss} | (
              {} if step % 5 else {'eval/loss': 4 * 0.9 ** step + loss})
          for step in range(21)], identity=run.identity,
      end=dict(step=20, finished=True, seconds=seconds, tokens_per_second=100.0,
               peak_bytes=int(gigabytes * 1e9)))
  compare_test.write_scores(
      folder, verdicts, split=run.split, lower_is_better=['fallback'],
      generation_seconds=10.0, scores={
          'loss': loss, 'judge/strict': float(verdicts.mean()),
          'judge/fallback': 0.1, 'judge/n': _RECORDS})


@pytest.fixture
def make_sweep(tmp_path):
  """Returns a function of {cell: (changes, share)}: (sweep, plan), written."""
  def make(cells, seeds=3):
    sweep = grid.Sweep(
        tuple(grid.Cell(name, cell[0]) for name, cell in cells.items()),
        ('lora.rank', 'train.epochs'), tuple(range(seeds)), next(iter(cells)))
    plan = []
    for seed, (i, cell) in itertools.product(
        range(seeds), enumerate(sweep.cells)):
      plan.append(runs.PlannedRun(
          cell, seed, f'{seed}{i}'.zfill(16),
          str(tmp_path / 'w/runs' / f'{i}-{seed}'), (),
          {'seed': seed, 'train.steps': 20}, 'test'))
      if (share := cells[cell.name][1]) is not None:
        _write_run(plan[-1], share=share, loss=2.5 - share + 0.01 * seed,
                   seconds=60.0 + 30 * i, gigabytes=2.0 + 0.1 * (i % 2), seed=i)
    return sweep, plan
  return make


@pytest.fixture
def write(make_sweep, tmp_path, monkeypatch):
  def write(seeds=3, n_runs=None, messages=(), draw=False, **shares):
    if not draw:
      monkeypatch.setattr(pages, 'to_png', lambda figure: b'')
    sweep, plan = make_sweep({
        name: ({'lora.rank': 2 ** i, 'train.epochs': 1}, share)
        for i, (name, share) in enumerate(shares.items())}, seeds)
    return page.write(
        sweep, plan[:n_runs], {plan[i].workdir: text for i, text in messages},
        str(tmp_path / 'w'), 'configs/<i>.py')
  return write


def _kept(tmp_path, name):
  return (tmp_path / 'w' / name).read_text('utf-8')


def test_effects_are_means_over_the_other_factors(make_sweep, tmp_path):
  cells = {f'{r}/{e}': ({'lora.rank': r, 'train.epochs': e},
                        0.3 + 0.02 * (r == 8) + 0.3 * (e == 5))
           for r in (4, 8) for e in (1, 5)}
  sweep, plan = make_sweep(cells)
  found = [results_lib.read(run) for run in plan]
  grouped = significance.by_cell(found, sweep.cells)
  rank, epochs = effects = significance.effects(
      grouped, sweep.cells, sweep.factors, 'judge/strict', '4/1')
  assert [(e.factor, e.value, e.than) for e in effects] == [
      ('lora.rank', 8, 4), ('train.epochs', 5, 1)]
  mean = {name: np.mean([r.scores['judge/strict'] for r in rs])
          for name, rs in grouped.items()}
  np.testing.assert_allclose(
      [rank.difference.mean, epochs.difference.mean],
      [(mean['8/1'] + mean['8/5'] - mean['4/1'] - mean['4/5']) / 2,
       (mean['4/5'] + mean['8/5'] - mean['4/1'] - mean['8/1']) / 2])
  assert epochs.difference.beyond_chance
  assert not rank.difference.beyond_chance
  # Surer than a difference of two cells.
  alone = significance.difference(
      [(grouped['4/5'], grouped['4/1'])], 'judge/strict')
  assert epochs.difference.high - epochs.difference.low < alone.high - alone.low
  summary = page.write(sweep, plan, {}, str(tmp_path / 'w'), 'c')
  assert summary['sentences'][-1] == (
      'Over all settings of the other factors: train.epochs 5 instead of 1'
      f' gains {100 * epochs.difference.mean:.1f} points (each beyond chance).')
  assert 'Effects of the factors' in _kept(tmp_path, 'sweep.html')


def test_the_page_says_which_cell_is_best(write, tmp_path):
  summary = write(base=0.4, close=0.42, good=0.75)
  assert summary['complete'] and summary['headline'] == 'judge/strict'
  said = ' '.join(summary['sentences'])
  assert said.startswith('The best cell is good: strict')
  assert 'This is beyond chance (p' in said
  assert 'adjusted for 2 comparisons' in said
  assert 'Not different' not in said
  kept = json.loads(_kept(tmp_path, 'sweep.json'))
  values = [r['scores']['judge/strict'] for r in kept['runs']
            if r['cell'] == 'good']
  base, close, row = kept['metrics']['judge/strict']
  np.testing.assert_allclose(
      [row['mean'], row['sd']], [np.mean(values), np.std(values, ddof=1)])
  assert row['difference']['n_records'] == _RECORDS
  # The loss is a total of each run: by seed alone, and lower is better.
  loss = kept['metrics']['loss'][2]['difference']
  assert loss['n_records'] == 0 and loss['mean'] > 0.3
  assert [c['on_time'] for c in kept['costs']] == [
      True, close['mean'] > base['mean'], True]
  text = _kept(tmp_path, 'report.md')
  assert f'{100 * row["mean"]:.1f} %' in text and 'base (baseline)' in text


def test_chance_and_a_single_seed_are_called_so(write):
  said = ' '.join(write(base=0.5, other=0.51, third=0.5)['sentences'])
  assert 'This is not beyond chance' in said or 'baseline, base, is' in said
  assert 'Not different from the best beyond chance: ' in said
  assert 'The fastest of them' in said
  said = ' '.join(write(base=0.3, good=0.8, seeds=1)['sentences'])
  assert 'not other seeds' in said


def test_an_unfinished_sweep_shows_what_failed(write, tmp_path):
  summary = write(base=None, other=0.5, messages=[
      (0, 'config.lora.targets <b>matches</b> nothing')])
  assert not summary['complete']
  assert summary['sentences'][0] == 'Unfinished: 3 of 6 runs are missing.'
  assert [r['state'] for r in summary['runs'][:2]] == ['failed', 'finished']
  html = _kept(tmp_path, 'sweep.html')
  assert '&lt;b&gt;matches&lt;/b&gt;' in html and '<b>matches' not in html
  json.loads(_kept(tmp_path, 'sweep.json'), parse_constant=pytest.fail)
  empty = write(base=None, other=None, n_runs=1)
  assert empty['sentences'][1] == 'No run is finished.'


def test_the_page_is_whole_and_escaped(write, tmp_path):
  write(draw=True, **{'<script>alert(1)</script> & "x"': 0.4, 'b|c $x_2$': 0.6})
  html = _kept(tmp_path, 'sweep.html')
  assert '&lt;script&gt;' in html and 'name="viewport"' in html
  for part in '<script', '<i>', 'url(', '@import':
    assert part not in html
  # No outside parts: every source is in the page.
  sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', html)
  assert len(sources) >= 5  # Two fronts, a factor, two curves.
  assert all(s.startswith('data:image/png;base64,') for s in sources)
  assert r'b\|c' in _kept(tmp_path, 'report.md')


def test_runs_without_a_judge_are_compared_by_training_scores(tmp_path):
  lines = [{'step': 0, 'eval/loss': 1.0}, {'step': 1, 'loss': 9.0},
           {'step': 2, 'eval/loss': 3.0, 'eval/perplexity': 20.0},
           {'step': 4, 'eval/loss': 3.5, 'eval/perplexity': 33.0}]
  # Step 0 is the untouched base, no checkpoint.
  assert results_lib.best_scores(lines, 'loss', 'min') == {
      'loss': 3.0, 'perplexity': 20.0}
  assert results_lib.best_scores(lines, 'perplexity', 'max')['loss'] == 3.5
  assert results_lib.best_scores(lines, 'judge/x', 'max') == {}
  assert results_lib.evaluations(lines, 'loss') == [
      (0, 1.0), (2, 3.0), (4, 3.5)]


def test_trials_are_drawn_whatever_they_hold():
  rows = [{'number': 0, 'state': 'complete', 'value': 0.4,
           'parameters': {'lr': 1e-4, 'rank': 4, 'kind': "it's"}},
          {'number': 1, 'state': 'pruned', 'value': 0.1,
           'parameters': {'lr': 1e-2, 'rank': 8, 'kind': 'b'}},
          {'number': 2, 'state': 'failed', 'value': None, 'parameters': {}}]
  assert len(pictures.trials(rows, 'judge/x', lower_is_better=False)) == 1
  assert len(pictures.factors([(r['parameters'], r['value']) for r in rows[:2]],
                              ['lr', 'rank', 'kind'], 'judge/x')) == 3
  assert pictures.trials(rows[2:], 'loss', lower_is_better=True) == []
