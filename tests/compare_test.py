"""What `compare` says of two workdirs, which are written here."""

import json
import re

import conftest
import pytest

from configs import default
from gemma_sft import compare
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.evaluation import compare_page
from gemma_sft.evaluation import compare_runs
from gemma_sft.monitor import record as record_lib

_START = {
    'time': '2026-01-01T00:00:00.000+00:00', 'step': 0, 'seconds': 60.0,
    'command': ['python'], 'commit': 'a' * 40, 'dirty': False,
    'packages': {'jax': '0.12.0', 'optax': '0.2.6'}, 'python': '3.12.1',
    'devices': {'platform': 'cpu', 'kind': 'cpu', 'count': 1}, 'hosts': 1}
_HASHES = {'train': 'b' * 64, 'test': 'c' * 64}


def _make(folder, *, config=None, record=True, data=_HASHES, start=None,
          end=True, losses=(3.0, 1.0), scored=None):
  """Writes a workdir; returns its path.

  Args:
    folder: To make.
    config: {key: value} over the defaults.
    record: Whether it has a run.json.
    data: Hashes in it.
    start: Changes to `_START`.
    end: Whether the run has ended.
    losses: On validation, after 0, 10, ... updates.
    scored: Verdicts on the test answers, or None if not evaluated.
  """
  folder.mkdir()
  leaves = dict(config_lib.leaves(default.get_config())) | {
      'data.train': 'train.txt'} | (config or {})
  (folder / 'config.json').write_text(json.dumps(leaves))
  if record:
    (folder / 'run.json').write_text(json.dumps({
        'identity': record_lib.identity(leaves, 'd' * 64, data),
        'config': leaves, 'seed': leaves['seed'], 'base': 'd' * 64,
        'data': data, 'total_steps': 10, 'trained_weights': 1000,
        'base_weights': 5000, 'starts': [_START | (start or {})],
        'end': {'time': '', 'step': 10, 'reason': 'finished', 'finished': True,
                'seconds': 125.0, 'tokens_per_second': 1234.0,
                'peak_bytes': 2_500_000_000} if end else None}))
  with open(folder / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for i, loss in enumerate(losses):
      for values in ({'loss': loss / 2}, {'eval/loss': loss}):
        file.write(json.dumps(
            {'step': 10 * i, 'time': 100.0 * i, **values}) + '\n')
  if scored is not None:
    _score(folder, scored)
  return str(folder)


def _score(folder, verdicts, *, first=0, split='test', place='data', **changes):
  """Writes the tuned model's answers to records `first` and on."""
  (folder / 'evaluation').mkdir(exist_ok=True)
  n = len(verdicts)
  result = {
      'identity': 'x', 'name': 'tuned', 'weights': 'step 10', 'split': split,
      'headline': 'strict', 'lower_is_better': [], 'records': n, 'seed': 0,
      'temperature': 0.0, 'repetition_penalty': 1.0, 'max_new_tokens': 8,
      'scores': {'loss': 1.5, 'judge/strict': sum(verdicts) / n, 'judge/n': n},
      'judge_note': '', 'samples': [],
      'answers': [
          {'where': f'{place}:{i}', 'prompt': f'question {first + i}',
           'reference': 'r', 'answer': 'a', 'verdict': {'strict': bool(v)}}
          for i, v in enumerate(verdicts)]} | changes
  (folder / 'evaluation' / f'{split}-tuned.json').write_text(
      json.dumps(result))


def _compare(*workdirs) -> compare_runs.Comparison:
  defaults = dict(config_lib.leaves(default.get_config()))
  return compare_runs.compare([
      compare_runs.load(w, name, defaults)
      for w, name in zip(workdirs, compare_runs.names(workdirs))])


def test_what_differs_is_shown_and_what_decides_nothing_apart(tmp_path):
  a = _make(tmp_path / 'a')
  b = _make(tmp_path / 'b', config={
      'lora.rank': 8, 'seed': 1, 'train.log_every': 1, 'data.train': 'moved'},
      data=_HASHES | {'test': 'e' * 64},
      start={'commit': 'f' * 40, 'dirty': True,
             'packages': {'jax': '0.12.0', 'optax': '0.2.7'},
             'devices': {'platform': 'gpu', 'kind': 'H200', 'count': 2}})
  found = _compare(a, b)
  assert found.names == ['a', 'b']
  assert found.config == [['lora.rank', '16', '8'], ['seed', '0', '1']]
  assert found.free == [
      ['data.train', 'train.txt', 'moved'], ['train.log_every', '10', '1']]
  assert found.origin == [
      ['data: test', 'c' * 16, 'e' * 16],
      ['code', 'a' * 12, 'f' * 12 + ' with changes'],
      ['devices', '1 x cpu', '2 x H200'], ['optax', '0.2.6', '0.2.7']]
  assert found.sentences[0].startswith(
      'b differs from a in lora.rank (16 -> 8), seed (0 -> 1), data: test,'
      ' code, devices and optax.')


def test_results_are_side_by_side(tmp_path):
  a = _make(tmp_path / 'a', losses=(3.0, 1.0, 1.25))
  b = _make(tmp_path / 'b', end=False, losses=(3.0,))
  found = _compare(a, b)
  assert {row[0]: row[1:] for row in found.results} == {
      'updates': ['20 of 10', '0 of 10'], 'ended by': ['finished', '-'],
      'best': ['loss 1 after 10', 'loss 3 after 0'],
      'last loss, train': ['0.6250', '1.5000'],
      'last loss, validation': ['1.2500', '3.0000'],
      'time': ['2 m 05 s', 'about 0 s'],
      'tokens/s, median': ['1,234', '-'], 'peak memory': ['2.50 GB', '-'],
      'trained weights': ['1,000', '1,000']}
  assert any('b has not ended' in note for note in found.notes)


def test_the_best_is_by_the_metric_and_mode_of_the_run(tmp_path):
  a = _make(tmp_path / 'a', config={'eval.mode': 'max'}, losses=(2., 3., 3.))
  run = compare_runs.load(a, 'a', {})
  # Ties go to the later step, as in training.
  assert compare_runs.best_of(run) == {
      'metric': 'loss', 'value': 3.0, 'step': 20}


@pytest.mark.parametrize('mine, theirs, said', (
    ([1] * 30 + [0] * 10, [0] * 40, 'is better beyond chance: strict +75.0'),
    ([0] * 40, [1] * 30 + [0] * 10, 'is worse beyond chance: strict -75.0'),
    ([1, 0] * 20, [0, 1] * 20, 'cannot be told apart: strict +0.0'),
    ([1] * 40, [1] * 40, 'cannot be told apart: strict +0.0')))
def test_the_sentence_says_whether_it_is_chance(tmp_path, mine, theirs, said):
  a = _make(tmp_path / 'a', scored=theirs)
  b = _make(tmp_path / 'b', config={'lora.rank': 8}, scored=mine)
  found = _compare(a, b)
  assert said in found.sentences[0] and '40 records' in found.sentences[0]
  row = next(r for r in found.gains if r['metric'] == 'judge/strict')
  assert row['run'] == 'b' and row['n'] == 40 and row['low'] <= row['gain']
  assert found.scores[0] == ['test split', 'a', 'b']


def test_a_paired_interval_is_narrower_than_the_two_would_say(tmp_path):
  # 38 of 40 records alike: what is left is certain, though 50 % and 55 % are
  # not told apart by their own intervals.
  theirs = [1] * 20 + [0] * 20
  a = _make(tmp_path / 'a', scored=theirs)
  b = _make(tmp_path / 'b', scored=theirs[:20] + [1] * 2 + [0] * 18)
  row = next(r for r in _compare(a, b).gains if r['metric'] == 'judge/strict')
  assert row['gain'] == pytest.approx(0.05)
  assert row['high'] - row['low'] < 0.15  # Unpaired: over 0.4.


def test_records_are_the_same_by_what_they_ask_not_by_their_place(tmp_path):
  a = _make(tmp_path / 'a', scored=[0] * 10)
  b = _make(tmp_path / 'b')
  _score(tmp_path / 'b', [1] * 10, place='elsewhere')
  row = next(r for r in _compare(a, b).gains if r['metric'] == 'judge/strict')
  assert (row['n'], row['gain']) == (10, 1.0)
  # The same lines of the same file, but other questions: 6 are shared.
  _score(tmp_path / 'b', [1] * 6 + [0] * 4, first=4)
  found = _compare(a, b)
  assert [(r['metric'], r['n']) for r in found.gains] == [('judge/strict', 6)]
  assert any('6 records of test are in both' in note for note in found.notes)


def test_answers_decoded_unlike_are_not_paired(tmp_path):
  a = _make(tmp_path / 'a', scored=[0] * 10)
  b = _make(tmp_path / 'b')
  _score(tmp_path / 'b', [1] * 10, temperature=0.7)
  found = _compare(a, b)
  assert not found.gains
  assert any('decoded differently (temperature 0.0 and 0.7)' in note
             for note in found.notes)
  assert 'is unknown' in found.sentences[0]


def test_one_training_twice_and_two_places_of_it(tmp_path):
  a, b = _make(tmp_path / 'a'), _make(tmp_path / 'b')
  c = _make(tmp_path / 'c', config={'checkpoint.keep': 1})
  found = _compare(a, b, c)
  assert found.sentences[0].startswith('b is the same training as a. ')
  assert found.sentences[1].startswith(
      'c is the same training as a: only checkpoint.keep differs, which does'
      ' not affect the result.')
  assert not found.config and not found.origin
  assert 'Config: no difference affects the result.' in (
      compare_page.text(found))


def test_an_older_run_is_shown_with_what_it_has(tmp_path):
  a = _make(tmp_path / 'a')
  b = _make(tmp_path / 'b', record=False, config={'data.train': 'other.txt'})
  found = _compare(a, b)
  # Without a hash another name may be other data.
  assert found.config == [['data.train', 'train.txt', 'other.txt']]
  assert not found.origin
  assert any('b has no run.json' in note for note in found.notes)
  assert ['best', 'loss 1 after 10', 'loss 1 after 10'] in found.results
  # A config that lacks a key has its default.
  saved = json.loads((tmp_path / 'b' / 'config.json').read_text())
  del saved['lora.use_dora']
  (tmp_path / 'b' / 'config.json').write_text(json.dumps(saved))
  assert _compare(a, b).config == found.config
  (tmp_path / 'b' / 'metrics.jsonl').unlink()
  assert ['updates', '10 of 10', '-'] in _compare(a, b).results


def test_names_that_are_alike_or_mean_something_become_paths():
  assert compare_runs.names(['x/a', 'x/b/']) == ['a', 'b']
  assert compare_runs.names(['x/a', 'y/a', 'tuned']) == [
      './x/a', './y/a', './tuned']


def test_the_page_is_whole_and_escapes(tmp_path, capsys):
  a = _make(tmp_path / 'a', scored=[0, 1] * 5)
  b = _make(tmp_path / 'b', config={'task': '<script>x</script>'},
            scored=[1, 1] * 5)
  out = tmp_path / 'page.html'
  assert compare.main([a, b], str(out)) == 0
  printed = capsys.readouterr().out
  assert '| task | chat | <script>x</script> |' in printed
  assert compare_page.CAVEAT in printed and f'page: {out}' in printed
  page = out.read_text('utf-8')
  assert '<script' not in page and '&lt;script&gt;x' in page
  assert 'data:image/png;base64,iVBOR' in page
  assert not re.search(r'(src|href)="(?!data:)', page)
  for part in ('<th>a</th><th>b</th>', 'Scores on the test split',
               'Gain over a'):
    assert part in page


def test_a_picture_needs_curves(tmp_path):
  a, b = (compare_runs.load(_make(tmp_path / name, losses=()), name, {})
          for name in 'ab')
  assert compare_page.picture([a, b]) is None


@pytest.mark.parametrize('make, got', (
    (lambda p: ['a'], 'compare was given 1 runs'),
    (lambda p: ['a', 'a'], 'compare was given 2 runs'),
    (lambda p: ['a', str(p / 'none')], 'is not a folder'),
    (lambda p: ['a', str(p)], 'has no config.json')))
def test_wrong_folders_are_named(tmp_path, make, got):
  a = _make(tmp_path / 'a')
  workdirs = [a if w == 'a' else w for w in make(tmp_path)]
  with pytest.raises(errors.UserError) as caught:
    compare.main(workdirs)
  assert got in caught.value.got and caught.value.fix


@pytest.mark.parametrize('out', ('page.txt', 'none/page.html'))
def test_a_wrong_out_is_named_before_anything_is_read(tmp_path, out):
  with pytest.raises(errors.UserError, match='--out='):
    compare.main(['a', 'b'], str(tmp_path / out))


def test_the_command_takes_folders_and_ends_with_2(tmp_path):
  a = _make(tmp_path / 'a')
  status, out, err = conftest.run_module('compare', a, str(tmp_path / 'none'))
  assert status == 2 and not out
  assert f'error: {tmp_path / "none"} is not a folder\n  expected: ' in err
  assert 'Traceback' not in err
