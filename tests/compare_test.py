"""What `compare` says of two workdirs, which are written here."""

import json
import re

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
_END = {'time': '', 'step': 10, 'reason': 'finished', 'finished': True,
        'seconds': 125.0, 'tokens_per_second': 1234.0,
        'peak_bytes': 2_500_000_000}
_HASHES = {'train': 'b' * 64, 'test': 'c' * 64}
_DEFAULTS = dict(config_lib.leaves(default.get_config()))


def write_run(folder, leaves, lines, *, identity='', data=_HASHES, start=(),
              end=_END):
  """Writes what a run leaves: config, record and lines of metrics.jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in ('config.json', leaves), ('run.json', {
      'identity': identity or record_lib.identity(leaves, 'd' * 64, data),
      'config': leaves, 'seed': leaves['seed'], 'base': 'd' * 64, 'data': data,
      'total_steps': 10, 'trained_weights': 1000, 'base_weights': 5000,
      'starts': [_START | dict(start)], 'end': end}):
    (folder / name).write_text(json.dumps(content))
  (folder / 'metrics.jsonl').write_text(''.join(
      json.dumps({'time': 0.0, **line}) + '\n' for line in lines))


def write_scores(folder, verdicts, *, first=0, split='test', place='data',
                 **changes):
  """Writes the tuned model's answers to records `first` and on."""
  (folder / 'evaluation').mkdir(exist_ok=True)
  n = len(verdicts)
  (folder / 'evaluation' / f'{split}-tuned.json').write_text(json.dumps({
      'identity': 'x', 'name': 'tuned', 'weights': 'step 10', 'split': split,
      'headline': 'strict', 'lower_is_better': [], 'records': n, 'seed': 0,
      'temperature': 0.0, 'repetition_penalty': 1.0, 'max_new_tokens': 8,
      'scores': {'loss': 1.5, 'judge/strict': sum(verdicts) / n, 'judge/n': n},
      'judge_note': '', 'samples': [],
      'answers': [
          {'where': f'{place}:{i}', 'prompt': f'question {first + i}',
           'reference': 'r', 'answer': 'a', 'verdict': {'strict': bool(v)}}
          for i, v in enumerate(verdicts)]} | changes))


@pytest.fixture
def make(tmp_path):
  # Losses are on validation, after 0, 10, ... updates.
  def make(name, config=(), *, losses=(3.0, 1.0), scored=None, answers=(),
           **record):
    write_run(
        tmp_path / name, _DEFAULTS | {'data.train': 'train.txt'} | dict(config),
        [{'step': 10 * i, 'time': 100.0 * i, **values}
         for i, loss in enumerate(losses)
         for values in ({'loss': loss / 2}, {'eval/loss': loss})], **record)
    if scored is not None:
      write_scores(tmp_path / name, scored, **dict(answers))
    return str(tmp_path / name)

  return make


def _compare(*workdirs) -> compare_runs.Comparison:
  return compare_runs.compare([
      compare_runs.load(w, name, _DEFAULTS)
      for w, name in zip(workdirs, compare_runs.names(workdirs))])


def _strict_gain(*workdirs):
  return next(r for r in _compare(*workdirs).gains
              if r['metric'] == 'judge/strict')


def test_what_differs_is_shown_and_what_decides_nothing_apart(make):
  a = make('a')
  b = make('b', {
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


def test_results_are_side_by_side(make):
  found = _compare(make('a', losses=(3.0, 1.0, 1.25)),
                   make('b', end=None, losses=(3.0,)))
  assert {row[0]: row[1:] for row in found.results} == {
      'updates': ['20 of 10', '0 of 10'], 'ended by': ['finished', '-'],
      'best': ['loss 1 after 10', 'loss 3 after 0'],
      'last loss, train': ['0.6250', '1.5000'],
      'last loss, validation': ['1.2500', '3.0000'],
      'time': ['2 m 05 s', 'about 0 s'],
      'tokens/s, median': ['1,234', '-'], 'peak memory': ['2.50 GB', '-'],
      'trained weights': ['1,000', '1,000']}
  assert any('b has not ended' in note for note in found.notes)
  # The best is by the metric and mode of the run; ties go to the later step, as
  # in training.
  run = compare_runs.load(
      make('c', {'eval.mode': 'max'}, losses=(2., 3., 3.)), 'c', {})
  assert compare_runs.best_of(run) == dict(metric='loss', value=3.0, step=20)


@pytest.mark.parametrize('mine, theirs, said', (
    ([1] * 30 + [0] * 10, [0] * 40, 'is better beyond chance: strict +75.0'),
    ([0] * 40, [1] * 30 + [0] * 10, 'is worse beyond chance: strict -75.0'),
    ([1, 0] * 20, [0, 1] * 20, 'cannot be told apart: strict +0.0'),
    ([1] * 40, [1] * 40, 'cannot be told apart: strict +0.0')))
def test_the_sentence_says_whether_it_is_chance(make, mine, theirs, said):
  runs = (make('a', scored=theirs), make('b', {'lora.rank': 8}, scored=mine))
  found = _compare(*runs)
  assert said in found.sentences[0] and '40 records' in found.sentences[0]
  row = _strict_gain(*runs)
  assert row['run'] == 'b' and row['n'] == 40 and row['low'] <= row['gain']
  assert found.scores[0] == ['test split', 'a', 'b']


def test_a_paired_interval_is_narrower_than_the_two_would_say(make):
  # 38 of 40 records alike: what is left is certain, though 50 % and 55 % are
  # not told apart by their own intervals.
  row = _strict_gain(make('a', scored=[1] * 20 + [0] * 20),
                     make('b', scored=[1] * 22 + [0] * 18))
  assert row['gain'] == pytest.approx(0.05)
  assert row['high'] - row['low'] < 0.15  # Unpaired: over 0.4.


def test_records_are_the_same_by_what_they_ask(make):
  a = make('a', scored=[0] * 10)
  row = _strict_gain(
      a, make('b', scored=[1] * 10, answers={'place': 'elsewhere'}))
  assert (row['n'], row['gain']) == (10, 1.0)
  # The same lines of the same file, but other questions: 6 are shared.
  found = _compare(
      a, make('c', scored=[1] * 6 + [0] * 4, answers={'first': 4}))
  assert [(r['metric'], r['n']) for r in found.gains] == [('judge/strict', 6)]
  assert any('6 records of test are in both' in note for note in found.notes)
  # Answers that were decoded differently are not paired.
  found = _compare(
      a, make('d', scored=[1] * 10, answers={'temperature': 0.7}))
  assert not found.gains
  assert any('decoded differently (temperature 0.0 and 0.7)' in note
             for note in found.notes)
  assert 'is unknown' in found.sentences[0]


def test_one_training_twice_and_two_places_of_it(make):
  found = _compare(make('a'), make('b'), make('c', {'checkpoint.keep': 1}))
  first, second = found.sentences
  assert first.startswith('b is the same training as a. ')
  assert second.startswith(
      'c is the same training as a: only checkpoint.keep differs, which does'
      ' not affect the result.')
  assert not found.config and not found.origin
  assert 'Config: no difference affects the result.' in compare_page.text(found)


def test_an_older_run_is_shown_with_what_it_has(make, tmp_path):
  a = make('a')
  b = make('b', {'data.train': 'other.txt'})
  (tmp_path / 'b' / 'run.json').unlink()
  found = _compare(a, b)
  # Without a hash another name may be other data.
  assert found.config == [['data.train', 'train.txt', 'other.txt']]
  assert not found.origin
  assert any('b has no run.json' in note for note in found.notes)
  assert ['best', 'loss 1 after 10', 'loss 1 after 10'] in found.results
  # A config that lacks a key has its default.
  config = tmp_path / 'b' / 'config.json'
  saved = json.loads(config.read_text())
  del saved['lora.use_dora']
  config.write_text(json.dumps(saved))
  assert _compare(a, b).config == found.config
  (tmp_path / 'b' / 'metrics.jsonl').unlink()
  assert ['updates', '10 of 10', '-'] in _compare(a, b).results


def test_the_page_is_whole_and_escapes(make, tmp_path, capsys):
  a = make('a', scored=[0, 1] * 5)
  b = make('b', {'task': '<script>x</script>'}, scored=[1, 1] * 5)
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
  # A picture needs curves.
  assert compare_page.picture([
      compare_runs.load(make(n, losses=()), n, {}) for n in 'cd']) is None


@pytest.mark.parametrize('workdirs, out, got', (
    ('a', None, 'compare was given 1 runs'),
    ('aa', None, 'compare was given 2 runs'),
    ('an', None, 'n is not a folder'), ('ae', None, 'has no config.json'),
    # Named before anything is read.
    ('xy', 'page.txt', '--out='), ('xy', 'none/page.html', '--out=')))
def test_wrong_folders_are_named(make, tmp_path, workdirs, out, got):
  make('a')
  (tmp_path / 'e').mkdir()
  with pytest.raises(errors.UserError) as caught:
    compare.main([str(tmp_path / name) for name in workdirs],
                 out and str(tmp_path / out))
  assert got in caught.value.got and caught.value.fix


def test_names_that_are_alike_become_paths():
  assert compare_runs.names(['x/a', 'x/b/']) == ['a', 'b']
  assert compare_runs.names(['x/a', 'y/a', 'tuned']) == [
      './x/a', './y/a', './tuned']
