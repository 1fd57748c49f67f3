"""The table base against tuned, its intervals and the picture."""

import json

import pytest

from gemma_sft import metrics
from gemma_sft import report


def _keep(folder, name, scores, samples=(), records=40):
  folder.mkdir(exist_ok=True)
  (folder / f'test-{name}.json').write_text(json.dumps({
      'scores': scores, 'records': records, 'weights': f'the {name} weights',
      'samples': [{'prompt': p, 'answer': a} for p, a in samples]}))


@pytest.mark.parametrize('share, n, low, high', (
    # Against R's prop.test(..., correct=FALSE).
    (0.5, 10, 0.2366, 0.7634),
    (0.1, 50, 0.0435, 0.2136),
    (0.0, 20, 0.0, 0.1611),
    (1.0, 20, 0.8389, 1.0),
))
def test_interval(share, n, low, high):
  assert report.interval(share, n) == pytest.approx((low, high), abs=1e-4)


def test_nothing_judged_says_nothing():
  assert report.interval(0.0, 0) == (0.0, 1.0)


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
      ['test split', 'base', 'tuned'],
      ['loss', '2.346', '0.5'],
      ['strict', '0.0% (0 of 40; 95 %: 0% to 9%)',
       '75.0% (30 of 40; 95 %: 60% to 86%)'],
      ['lint free', '-', '100.0% (40 of 40; 95 %: 91% to 100%)'],
      ['records', '40', '40'],
      ['weights', 'the base weights', 'the tuned weights'],
  ]
  assert len({len(line) for line in text.splitlines()}) == 1  # Aligned.


def test_a_table_of_one(tmp_path):
  _keep(tmp_path, 'tuned', {'loss': 0.5})
  assert _cells(report.table(str(tmp_path), 'test'))[0] == [
      'test split', 'tuned']


def _train(workdir, *lines):
  writer = metrics.Writer(str(workdir), resume_step=-1)
  for step, values in lines:
    writer.write(step, values)
  writer.close()


_PNG = b'\x89PNG'


@pytest.mark.parametrize('judged', (False, True))
def test_picture(tmp_path, judged):
  verdict = {'eval/judge/strict': 0.5, 'eval/judge/n': 4} if judged else {}
  _train(tmp_path, (0, {'eval/loss': 2.0, **verdict}), (1, {'loss': 1.5}),
         (2, {'loss': 1.0}), (2, {'eval/loss': 1.2, **verdict}))
  path = tmp_path / 'training.png'
  assert report.picture(str(tmp_path), str(path))
  assert path.read_bytes().startswith(_PNG)


def test_no_metrics_make_no_picture(tmp_path):
  assert not report.picture(str(tmp_path), str(tmp_path / 'training.png'))
  assert not list(tmp_path.iterdir())


def test_report(tmp_path):
  _keep(tmp_path / 'evaluation', 'base', {'loss': 2.0},
        [('What?', 'No\n```idea```\n')])
  _keep(tmp_path / 'evaluation', 'tuned', {'loss': 1.0}, [('What?', 'That.')])
  _train(tmp_path, (1, {'loss': 1.5}))
  path = report.write(str(tmp_path) + '/', 'test')
  text = (tmp_path / 'report' / 'report.md').read_text()
  assert path == f'{tmp_path}/report/report.md'
  assert text.startswith(f'# {tmp_path.name}\n\n| test split |')
  assert '(training.png)' in text
  assert (tmp_path / 'report' / 'training.png').exists()
  # A fence longer than any in the answer.
  assert '**base**: What?\n\n````\nNo\n```idea```\n````\n' in text
  assert '**tuned**: What?\n\n````\nThat.\n````\n' in text


def test_a_report_without_training_has_no_picture(tmp_path):
  _keep(tmp_path / 'evaluation', 'base', {'loss': 2.0})
  report.write(str(tmp_path), 'test')
  assert 'training.png' not in (tmp_path / 'report' / 'report.md').read_text()
