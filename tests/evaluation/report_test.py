"""The table base against tuned, its intervals and the picture."""

import json

import pytest

from gemma_sft.evaluation import report
from gemma_sft.monitor import metrics


def _keep(folder, name, scores, samples=(), records=40, **more):
  folder.mkdir(exist_ok=True)
  (folder / f'test-{name.replace(":", "-")}.json').write_text(json.dumps({
      'name': name, 'answers': [], 'scores': scores, 'records': records,
      'weights': f'the {name} weights',
      'samples': [{'prompt': p, 'answer': a, 'verdict': {}}
                  for p, a in samples], **more}))


def _cells(text):
  return [[cell.strip() for cell in line.strip('|').split('|')]
          for line in text.splitlines()]


def test_table(tmp_path):
  _keep(tmp_path, 'base', {
      'loss': 2.34567, 'judge/strict': 0.0, 'judge/n': 40})
  _keep(tmp_path, 'tuned', {
      'loss': 0.5, 'judge/strict': 0.75, 'judge/lint_free': 1.0, 'judge/n': 40})
  text = report.table(str(tmp_path), 'test')
  rule, rows = _cells(text).pop(1), _cells(text)
  del rows[1]
  assert all(set(cell) == {'-'} for cell in rule)
  assert rows == [
      ['test split', 'base', 'tuned', 'gain over base'],
      ['loss', '2.346', '0.5', '+1.846'],
      ['strict', '0.0% (0 of 40; 95 %: 0% to 9%)',
       '75.0% (30 of 40; 95 %: 60% to 86%)', '+75.0'],
      ['lint free', '-', '100.0% (40 of 40; 95 %: 91% to 100%)', '-'],
      ['records', '40', '40', ''],
      ['weights', 'the base weights', 'the tuned weights', ''],
  ]


def test_a_table_of_one_result_or_none(tmp_path):
  assert _cells(report.table(str(tmp_path), 'test'))[0] == ['test split']
  _keep(tmp_path, 'tuned', {'loss': 0.5})
  assert _cells(report.table(str(tmp_path), 'test'))[0] == [
      'test split', 'tuned']


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
  _keep(tmp_path / 'evaluation', 'base', {'loss': 2.0},
        [('What?', 'No\n```idea```\n')])
  _keep(tmp_path / 'evaluation', 'tuned', {'loss': 1.0}, [('What?', 'That.')])
  _train(tmp_path, (1, {'loss': 1.5}))
  path = report.write(str(tmp_path) + '/', 'test')
  text = (tmp_path / 'report' / 'report.md').read_text()
  assert path == f'{tmp_path}/report/report.html'
  assert text.startswith(f'# {tmp_path.name}\n\n')
  assert '\n| test split |' in text
  assert '(training.png)' in text
  assert (tmp_path / 'report' / 'training.png').exists()
  # A fence longer than any in the answer.
  assert '**base**: What?\n\n````\nNo\n```idea```\n````\n' in text
  assert '**tuned**: What?\n\n````\nThat.\n````\n' in text


def test_a_report_without_training_has_no_picture(tmp_path):
  assert report.picture(str(tmp_path)) is None
  _keep(tmp_path / 'evaluation', 'base', {'loss': 2.0})
  report.write(str(tmp_path), 'test')
  assert 'training.png' not in (tmp_path / 'report' / 'report.md').read_text()


def _judged(folder, name, values, metric='good', lower=()):
  """Keeps a result whose metric is the mean of values, None for not judged."""
  counted = [v for v in values if v is not None]
  _keep(folder, name, {f'judge/{metric}': sum(counted) / len(counted),
                       'judge/n': len(counted), 'judge/total': 0.25},
        records=len(values), headline=metric, lower_is_better=list(lower),
        answers=[{'where': f'f:{i}', 'prompt': f'<b>ask</b> {i}',
                  'reference': 'ref', 'answer': f'<script>{name}</script>',
                  'verdict': {} if v is None else {metric: v}}
                 for i, v in enumerate(values)])


def test_a_mean_over_some_records_gets_their_interval(tmp_path):
  _judged(tmp_path, 'tuned', [True] * 30 + [False] * 10 + [None] * 5)
  result = report.read_results(str(tmp_path), 'test')['tuned']
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
  results = report.read_results(str(tmp_path), 'test')
  row = next(r for r in report.gains(results) if r['metric'] == 'judge/good')
  assert (row['than'], row['n']) == ('base', 15)
  assert (row['gain'], row['low'], row['high']) == pytest.approx((0.1,) * 3)
  total = next(r for r in report.gains(results) if r['metric'] == 'judge/total')
  assert total['gain'] == 0 and 'low' not in total


@pytest.mark.parametrize('tuned, lower, begins', (
    ([1.0] * 20, (), 'Tuning beats the best prompting (rag:4): good 100.0%'
     ' against 30.0%, a gain of 70.0 points (95 %:'),
    ([0.0] * 20, (), 'The best prompting (rag:4) beats tuning:'),
    ([1.0] * 7 + [0.0] * 13, (), 'Tuning and the best prompting (rag:4) cannot'
     ' be told apart:'),
    # The best to beat is then the lowest, 10 %: nearly 0 itself.
    ([0.0] * 20, ('good',), 'Tuning and the untouched model cannot be told'),
    ([1.0] * 20, ('good',), 'The untouched model beats tuning:'),
), ids=(
    'wins', 'loses', 'even', 'lower is even', 'lower loses'))
def test_the_sentence(tmp_path, tuned, lower, begins):
  _judged(tmp_path, 'base', [1.0] * 2 + [0.0] * 18, lower=lower)
  _judged(tmp_path, 'rag:4', [1.0] * 6 + [0.0] * 14, lower=lower)
  _judged(tmp_path, 'tuned', tuned, lower=lower)
  results = report.read_results(str(tmp_path), 'test')
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
  kept = json.loads((folder / 'eval.json').read_text('utf-8'))
  assert kept['sentence'] in page.replace('&#39;', "'")
  entry = kept['results']['tuned']['metrics']['judge/good']
  assert entry['value'] == 0.5 and entry['n'] == 4
  assert entry['low'] < 0.5 < entry['high']
  # eval.json is no result itself.
  assert list(report.read_results(str(folder), 'test')) == ['base', 'tuned']


def test_answers_made_otherwise_are_not_compared(tmp_path):
  folder = tmp_path / 'evaluation'
  _judged(folder, 'base', [0.0] * 20)
  _judged(folder, 'rag:4', [1.0] * 20)
  _judged(folder, 'tuned', [1.0] * 20)
  for name, temperature in (('base', 0.7), ('rag-4', 0.0), ('tuned', 0.7)):
    path = folder / f'test-{name}.json'
    path.write_text(json.dumps(
        json.loads(path.read_text()) | {'temperature': temperature}))
  results = report.read_results(str(folder), 'test')
  assert {row['than'] for row in report.gains(results)} == {'base'}
  assert report.sentence(results).startswith('Tuning beats the untouched')
  text = report.table(str(folder), 'test')
  assert 'gain over base' in text and 'temperature 0.0' in text
