"""The table base against tuned, its intervals and the picture."""

import json

import pytest

from gemma_sft.evaluation import report
from gemma_sft.monitor import metrics


def _write(folder, name, scores=(), samples=(), judged=(), records=40, **more):
  """Writes a result.

  `judged` maps the judge's metrics to their values on the records, None for a
  record that was not judged; `scores` are further scores.
  """
  judged, values = dict(judged), {}
  for metric, verdicts in judged.items():
    counted = [v for v in verdicts if v is not None]
    records = len(verdicts)
    values |= {f'judge/{metric}': sum(counted) / len(counted),
               'judge/n': len(counted)}
  folder.mkdir(exist_ok=True)
  (folder / f'test-{name.replace(":", "-")}.json').write_text(json.dumps({
      'name': name, 'scores': dict(scores) | values, 'records': records,
      'weights': f'the {name} weights', 'headline': next(iter(judged), ''),
      'samples': [{'prompt': p, 'answer': a, 'verdict': {}}
                  for p, a in samples],
      'answers': [
          {'where': f'f:{i}', 'prompt': f'<b>ask</b> {i}', 'reference': 'ref',
           'answer': f'<script>{name}</script>',
           'verdict': {metric: v[i] for metric, v in judged.items()
                       if v[i] is not None}}
          for i in range(records if judged else 0)], **more}))


def _cells(text):
  return [[cell.strip() for cell in line.strip('|').split('|')]
          for line in text.splitlines()]


def test_table(tmp_path):
  assert _cells(report.table(str(tmp_path), 'test'))[0] == ['test split']
  _write(tmp_path, 'base', {'loss': 2.34567}, judged={'strict': [False] * 40})
  _write(tmp_path, 'tuned', {'loss': 0.5}, judged={
      'strict': [True] * 30 + [False] * 10, 'lint_free': [True] * 40})
  header, rule, *rows = _cells(report.table(str(tmp_path), 'test'))
  assert all(set(cell) == {'-'} for cell in rule)
  assert [header, *rows] == [
      ['test split', 'base', 'tuned', 'gain over base'],
      ['loss', '2.346', '0.5', '+1.846'],
      ['strict', '0.0% (0 of 40; 95 %: 0% to 9%)',
       '75.0% (30 of 40; 95 %: 60% to 86%)', '+75.0 (95 %: +60 to +88)'],
      ['lint free', '-', '100.0% (40 of 40; 95 %: 91% to 100%)', '-'],
      ['records', '40', '40', ''],
      ['weights', 'the base weights', 'the tuned weights', '']]
  (tmp_path / 'test-base.json').unlink()
  header, *_ = _cells(report.table(str(tmp_path), 'test'))
  assert header == ['test split', 'tuned']


def _train(workdir, *lines):
  writer = metrics.Writer(str(workdir), resume_step=-1)
  for step, values in lines:
    writer.write(step, values)
  writer.close()


@pytest.mark.parametrize('judged', (False, True))
def test_picture(tmp_path, judged):
  verdict = {'eval/judge/strict': 0.5, 'eval/judge/n': 4} if judged else {}
  _train(tmp_path, (0, {'eval/loss': 2.0, **verdict}), (1, {'loss': 1.5}),
         (2, {'loss': 1.0}), (2, {'eval/loss': 1.2, **verdict}))
  assert report.picture(str(tmp_path)).startswith(b'\x89PNG')


def test_report(tmp_path):
  _write(tmp_path / 'evaluation', 'base', {'loss': 2.0},
         [('What?', 'No\n```idea```\n')])
  _write(tmp_path / 'evaluation', 'tuned', {'loss': 1.0}, [('What?', 'That.')])
  text_path = tmp_path / 'report' / 'report.md'
  path = report.write(str(tmp_path) + '/', 'test')
  assert path == f'{tmp_path}/report/report.html'
  assert 'training.png' not in text_path.read_text()  # There was no training.
  _train(tmp_path, (1, {'loss': 1.5}))
  report.write(str(tmp_path), 'test')
  text = text_path.read_text()
  assert text.startswith(f'# {tmp_path.name}\n\n')
  assert '\n| test split |' in text and '(training.png)' in text
  assert (tmp_path / 'report' / 'training.png').exists()
  # A fence longer than any in the answer.
  assert '**base**: What?\n\n````\nNo\n```idea```\n````\n' in text
  assert '**tuned**: What?\n\n````\nThat.\n````\n' in text


def _judged(folder, name, values, **more):
  """Writes a result whose headline has these values on the records."""
  _write(folder, name, {'judge/total': 0.25}, judged={'good': values}, **more)


def _results(folder):
  return report.read_results(str(folder), 'test')


def test_a_mean_over_some_records_gets_their_interval(tmp_path):
  _judged(tmp_path, 'tuned', [True] * 30 + [False] * 10 + [None] * 5)
  result = _results(tmp_path)['tuned']
  n, (low, high) = report.interval_of(result, 'judge/good')
  assert n == 40 and (low, high) == pytest.approx((0.5981, 0.8581), abs=1e-4)
  assert report.interval_of(result, 'judge/total') is None  # No row has it.
  # One that is no mean of its rows must not be taken for one.
  result['scores']['judge/good'] = 0.5
  assert report.interval_of(result, 'judge/good') is None


def test_gains_are_of_the_same_records(tmp_path):
  # Record by record tuned is 0.1 better; both vary far more between records.
  base = [i / 20 for i in range(15)]
  _judged(tmp_path, 'base', base)
  _judged(tmp_path, 'tuned', [v + 0.1 for v in base])
  total, row = report.gains(_results(tmp_path))
  assert (row['metric'], row['than'], row['n']) == ('judge/good', 'base', 15)
  assert (row['gain'], row['low'], row['high']) == pytest.approx((0.1,) * 3)
  assert total == {'metric': 'judge/total', 'than': 'base', 'gain': 0}


@pytest.mark.parametrize('tuned, lower, begins', (
    ([1.0] * 20, (), 'Tuning beats the best prompting (rag:4): good 100.0%'
     ' against 30.0%, a gain of 70.0 points (95 %:'),
    ([0.0] * 20, (), 'The best prompting (rag:4) beats tuning:'),
    ([1.0] * 7 + [0.0] * 13, (), 'Tuning and the best prompting (rag:4) cannot'
     ' be told apart:'),
    # The best to beat is then the lowest, 10 %: nearly 0 itself.
    ([0.0] * 20, ('good',), 'Tuning and the untouched model cannot be told'),
    ([1.0] * 20, ('good',), 'The untouched model beats tuning:'),
), ids=('wins', 'loses', 'even', 'lower is even', 'lower loses'))
def test_the_sentence(tmp_path, tuned, lower, begins):
  for name, values in (('base', [1.0] * 2 + [0.0] * 18), ('tuned', tuned),
                       ('rag:4', [1.0] * 6 + [0.0] * 14)):
    _judged(tmp_path, name, values, lower_is_better=lower)
  results = _results(tmp_path)
  assert list(results) == ['base', 'rag:4', 'tuned']
  assert report.sentence(results).startswith(begins)


def test_the_page_and_the_summary(tmp_path):
  folder = tmp_path / 'evaluation'
  _judged(folder, 'base', [0.0, 1.0, 0.0, 1.0, None])
  _judged(folder, 'tuned', [1.0, 1.0, 0.0, 0.0, None])
  path = report.write(str(tmp_path), 'test')
  page = (tmp_path / 'report' / 'report.html').read_text('utf-8')
  assert path.endswith('report.html')
  # What a model wrote is text, and nothing is loaded from elsewhere.
  assert '<script>base' not in page and '&lt;script&gt;base' in page
  assert '<b>ask' not in page
  assert 'http' not in page.replace('http-equiv', '')
  for state in ('won', 'kept', 'lost', 'failed', 'unjudged'):
    assert page.count(f'data-of="{state}"') == 1
  saved = json.loads((folder / 'eval.json').read_text('utf-8'))
  assert saved['sentence'] in page.replace('&#39;', "'")
  entry = saved['results']['tuned']['metrics']['judge/good']
  assert entry['value'] == 0.5 and entry['n'] == 4
  assert entry['low'] < 0.5 < entry['high']
  # eval.json is no result itself.
  assert list(_results(folder)) == ['base', 'tuned']


def test_answers_decoded_otherwise_are_not_compared(tmp_path):
  _judged(tmp_path, 'base', [0.0] * 20, temperature=0.7)
  _judged(tmp_path, 'rag:4', [1.0] * 20, temperature=0.0)
  _judged(tmp_path, 'tuned', [1.0] * 20, temperature=0.7)
  results = _results(tmp_path)
  assert {row['than'] for row in report.gains(results)} == {'base'}
  assert report.sentence(results).startswith('Tuning beats the untouched')
  text = report.table(str(tmp_path), 'test')
  assert 'gain over base' in text and 'temperature 0.0' in text
