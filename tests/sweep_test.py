"""Sweeps: cells, runs as processes, kills, searches."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import threading
import time

import compare_test
import conftest
import jax
import optuna
import pytest

from configs import slang
from configs import tiny
from gemma_sft import cli
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import sweep as sweep_main
from gemma_sft.monitor import metrics
from gemma_sft.run import workdir as workdir_lib
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import processes
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs as runs_lib
from gemma_sft.sweeping import search
from gemma_sft.sweeping import source as source_lib

_TINY = source_lib.SweepSource(
    str(conftest.ROOT / 'configs' / 'tiny.py'), None, {})


@pytest.fixture
def source(run_config):
  """configs/tiny.py made `run_config` by overrides."""
  return _source(run_config)


def _source(config):
  base = dict(config_lib.leaves(tiny.get_config()))
  return dataclasses.replace(_TINY, overrides={
      k: tuple(v) if isinstance(v, list) else v
      for k, v in config_lib.leaves(config) if base[k] != v})


def _write_config(path: pathlib.Path, body: str) -> source_lib.SweepSource:
  path.write_text(
      'from configs import tiny\n\n\n'
      'def get_config(arg: str = "3"):\n  return tiny.get_config(arg)\n\n\n'
      + (body and f'def sweep():\n  {body}\n'), 'utf-8')
  return source_lib.SweepSource(str(path), None, {})


def _plan(source, text, workdir, seeds=1):
  sweep = grid.make_sweep(source, source.load({}), grid=text, seeds=seeds)
  return runs_lib.Planner(source, str(workdir), 'auto').plan(
      sweep.cells, sweep.seeds)


def test_a_grid_is_every_combination_with_values_of_the_keys_types():
  sweep = grid.make_sweep(
      _TINY, tiny.get_config(), seeds=2,
      grid="lora.rank=4,8; optimizer.learning_rate=1e-3;"
      "lora.targets='attn/','q,v';data.packing=true,False;"
      'data.buckets=(64,128),()')
  assert len(sweep.cells) == 2 * 1 * 2 * 2 * 2
  assert sweep.cells[0].changes == {
      'lora.rank': 4, 'optimizer.learning_rate': 1e-3, 'lora.targets': 'attn/',
      'data.packing': True, 'data.buckets': (64, 128)}
  assert sweep.cells[-1].changes['lora.targets'] == 'q,v'
  assert sweep.cells[-1].changes['data.buckets'] == ()
  assert sweep.baseline == sweep.cells[0].name == (
      'rank=4, learning_rate=0.001, targets=attn/, packing=true,'
      ' buckets=(64, 128)')
  assert sweep.seeds == (0, 1)


# What reads a text, {what it is: the texts and parts of the message}.
_MISTAKES = {
    'grid': (('data.epochs=1,5', 'data.epochs', "Did you mean 'train.epochs'?"),
             ('lora.rnk=1', "Did you mean 'lora.rank'?"),
             ('lora.rank=4,many', 'lora.rank=many', 'int'),
             ('lora.rank=4,4', 'each value once'),
             ('lora.rank=4,,8', 'a value between commas'),
             ('lora.rank', 'key=value'),
             ('lora.rank=4;lora.rank=8', 'comes twice'),
             ('data.packing=maybe', 'true or false'),
             ('data.buckets=64', 'tuple'),
             ('seed=1,2', '--seeds')),
    'space': (('lora.rnk=1,2', "Did you mean 'lora.rank'?"),
              ('lora.rank=4', 'at least two values'),
              ('lora.rank=8..4', 'the lower one first'),
              ('optimizer.learning_rate=0..1:log', 'above 0'),
              ('optimizer.learning_rate=1e-5..1e-3:lg', 'low..high:log'),
              ('optimizer.learning_rate=a..b', 'learning_rate=a', 'float'),
              ('data.packing=true..false', 'numbers')),
    'file': (('', 'no --grid, and no sweep()'),
             ('return [1]', 'a dict with grid or cells'),
             ("return {'gird': 'lora.rank=1'}", 'gird'),
             ("return {'grid': {'lora.rank': ('4',)}}", "lora.rank='4'",
              'its default 4'),
             ("return {'grid': {'lora.rnk': (4,)}}",
              "Did you mean 'lora.rank'?"),
             ("return {'grid': 'lora.rank=4', 'baseline': 'rnk=4'}",
              "Did you mean 'rank=4'?"),
             ("return {'grid': 'lora.rank=4', 'seeds': (1, 1)}",
              'seeds: (1, 1)'),
             ("return {'cells': {}}", 'no cell in sweep()')),
    'cell': (('lora.rank=4,0', 'cell rank=0', 'config.lora.rank is 0'),
             ('optimizer.schedule=linear,cosin', 'cell schedule=cosin',
              'linear or cosine'),
             ('train.remat=none,block', 'are the same run'),
             ('data.train=nowhere.txt', 'cell train=nowhere.txt',
              'does not exist'),
             ('task=chat,caht', 'cell task=caht', "'chat'"),
             ('config=3,2,nine', 'nine')),
    'shard': tuple((text, '--shard=') for text in ('2/2', '1', 'a/b', '-1/2'))}


@pytest.mark.parametrize(
    'kind, text, parts', [(kind, text, parts) for kind, rows in
                          _MISTAKES.items() for text, *parts in rows],
    ids=lambda value: value if isinstance(value, str) else '')
def test_a_mistake_is_named_before_any_run(source, tmp_path, kind, text, parts):
  config = tiny.get_config()
  with pytest.raises(errors.UserError) as error:
    if kind == 'grid':
      grid.parse_grid(text, config)
    elif kind == 'space':
      search.parse_space(text, config)
    elif kind == 'file':
      grid.make_sweep(_write_config(tmp_path / 'c.py', text), config)
    elif kind == 'cell':
      _plan(source, text, tmp_path)
    else:
      sweep_main.parse_shard(text)
  for part in parts:
    assert part in str(error.value)
  assert not (tmp_path / 'runs').exists()


def test_the_file_says_what_to_sweep_and_flags_say_it_instead(tmp_path):
  source = _write_config(tmp_path / 'c.py', (
      "return {'cells': {'small': {'lora.rank': 2}, 'wide':\n"
      "      {'lora.rank': 8, 'optimizer.learning_rate': 1, 'config': 2}},\n"
      "          'seeds': (3, 5), 'baseline': 'wide'}"))
  config = tiny.get_config()
  sweep = grid.make_sweep(source, config)
  assert [c.name for c in sweep.cells] == ['small', 'wide']
  assert sweep.cells[1].changes == {
      'lora.rank': 8, 'optimizer.learning_rate': 1.0, 'config': '2'}
  assert (sweep.seeds, sweep.baseline) == ((3, 5), 'wide')
  assert source.load(sweep.cells[1].changes).model.generation == 2
  assert source.arguments(sweep.cells[1].changes)[:2] == [
      f'--config={source.path}:2', '--config.lora.rank=8']
  sweep = grid.make_sweep(source, config, grid='lora.rank=1,2', seeds=1,
                          baseline='lora.rank=2')
  assert (sweep.seeds, sweep.baseline) == ((0,), 'rank=2')


def test_slangs_attempts_are_one_comparison():
  source = source_lib.SweepSource(slang.__file__, None, {})
  sweep = grid.make_sweep(source, slang.get_config())
  assert [c.name for c in sweep.cells] == ['attempt1', 'attempt2', 'attempt3']
  assert len(sweep.seeds) == 3
  assert source.arguments(sweep.cells[1].changes) == [
      f'--config={slang.__file__}:attempt2']


def test_a_run_is_identified_by_what_decides_its_result(source, tmp_path):
  plan = _plan(source, 'lora.rank=4,8;train.steps=2', tmp_path, seeds=2)
  assert [(r.cell.name, r.seed) for r in plan] == [
      ('rank=4, steps=2', 0), ('rank=8, steps=2', 0),
      ('rank=4, steps=2', 1), ('rank=8, steps=2', 1)]
  assert len({r.identity for r in plan}) == 4
  assert {r.split for r in plan} == {'validation'}  # It has no test split.
  # The same run by another name of the cell, in the folder that it has.
  os.makedirs(plan[1].workdir)
  again, = _plan(source, 'lora.rank=8;lora.alpha=16;train.steps=2', tmp_path)
  assert again.identity == plan[1].identity
  assert again.workdir == plan[1].workdir
  # Other data of the same name is another run.
  path = pathlib.Path(source.overrides['data.train'])
  path.write_text(path.read_text('utf-8').replace('4.', '5.'), 'utf-8')
  assert _plan(source, 'lora.rank=8;train.steps=2', tmp_path)[
      0].identity != plan[1].identity


def test_times_are_estimated_by_cell_or_by_updates(source, tmp_path):
  plan = _plan(source, 'lora.rank=4,8;train.epochs=1,4;train.steps=0', tmp_path)
  finished = results_lib.RunResult(
      run=plan[0], steps=10, seconds=20.0, evaluating=5.0, scores={}, rows={},
      headline='loss', lower=frozenset(), train=[], validation=[], peak_bytes=0,
      tokens_per_second=None, trained_weights=0, starts=1)
  assert results_lib.estimate_seconds(plan[0], []) is None
  assert results_lib.estimate_seconds(plan[0], [finished]) == 25.0
  assert results_lib.estimate_seconds(plan[1], [finished]) == 5.0 + 4 * 20.0
  by_steps, other = (_plan(source, text, tmp_path)[0] for text in (
      'train.steps=30', 'data.batch_size=16;train.steps=0'))
  assert results_lib.estimate_seconds(by_steps, [finished]) == 5.0 + 3 * 20.0
  # With other batches the number of updates is unknown.
  assert results_lib.estimate_seconds(other, [finished]) is None


def test_parallel_runs_have_a_device_each(tmp_path):
  def slots(parallel, folder=tmp_path, **environment):
    made = processes.make_slots(parallel, environment, str(folder))
    return made, [slot.get('CUDA_VISIBLE_DEVICES') or slot.get(
        'TPU_VISIBLE_CHIPS') for slot in made]

  assert slots(3, A='1')[0] == [{'A': '1'}] * 3
  for name in ('nvidia0', 'nvidia1', 'nvidiactl'):
    (tmp_path / name).touch()
  assert slots(2)[1] == ['0', '1']
  assert slots(2, CUDA_VISIBLE_DEVICES='4,6,7')[1] == ['4', '6']
  assert slots(1)[0] == [{}]  # All devices.
  with pytest.raises(errors.UserError, match='at most 2, the GPUs'):
    slots(3)
  with pytest.raises(errors.UserError, match='--parallel=0'):
    slots(0)
  tpus = tmp_path / 'tpu'
  tpus.mkdir()
  for i in range(4):
    (tpus / f'accel{i}').touch()
  assert slots(4, tpus)[1] == ['0', '1', '2', '3']


_TIMEOUT = 1200  # Seconds, for a busy machine.


@pytest.fixture
def sweep(run_config, tmp_path, monkeypatch):
  """Returns a function that sweeps `run_config` here, its runs as processes."""
  jax.devices()  # Made now: eight here, one in the runs, which is faster.
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=1')

  def run(**flags):
    source = _source(run_config)
    monkeypatch.setattr(
        cli, 'config_source', lambda: (source.path, source.overrides))
    return sweep_main.main(run_config, str(tmp_path / 'w'), **flags)

  return run


def _records(workdir):
  """Returns {cell and seed: run.json} of the runs that are there."""
  return {path.parent.name.rpartition('-')[0]: json.loads(
      path.read_text('utf-8')) for path in sorted(
          pathlib.Path(workdir, 'runs').glob('*/run.json'))}


def _summary(workdir):
  return json.loads((workdir / 'sweep.json').read_text('utf-8'))


def _wait(condition, process=None):
  deadline = time.monotonic() + _TIMEOUT
  while not condition():
    assert process is None or process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _trained_steps(workdir, name):
  found = list(pathlib.Path(workdir, 'runs').glob(f'{name}-*/metrics.jsonl'))
  return max(conftest.losses(found[0].parent), default=0) if found else 0


def test_a_killed_sweep_continues_and_repeats_nothing(
    run_config, sweep, tmp_path, capfd):
  """Killed outright in its second run, then stopped by SIGTERM in it."""
  run_config.checkpoint.every, run_config.eval.every = 5, 10_000
  workdir = tmp_path / 'w'
  quick, slow = 'steps-2-targets-attn-seed-0', 'steps-10000-targets-attn-seed-0'
  process = conftest.start(
      'sweep', *conftest.flags(run_config), f'--workdir={workdir}',
      '--grid=train.steps=2,10000;lora.targets=attn/', devices=1)
  _wait(lambda: _trained_steps(workdir, slow) >= 6, process)
  os.kill(process.pid, signal.SIGKILL)  # Its child is left running.
  process.communicate()
  done = _records(workdir)[quick]
  assert done['end']['finished'] and len(done['starts']) == 1
  times = {p: p.stat().st_mtime_ns for p in workdir.glob(f'runs/{quick}-*/**/*')
           if p.is_file() and p.name != '.lock'}
  assert any(p.name == 'validation-tuned.json' for p in times)
  child = int(next(workdir.glob(f'runs/{slow}-*/.lock')).read_text().split()[0])
  os.kill(child, signal.SIGTERM)  # It saves and ends.
  reached = _trained_steps(workdir, slow)

  def stop_after_some_updates():
    _wait(lambda: _trained_steps(workdir, slow) > reached + 5)
    os.kill(os.getpid(), signal.SIGTERM)

  watcher = threading.Thread(target=stop_after_some_updates, daemon=True)
  watcher.start()
  # The second cell fails in training: no projection has such a path.
  status = sweep(grid='train.steps=2,10000;lora.targets=attn/,nowhere')
  watcher.join()
  assert status == 128 + signal.SIGTERM
  out = capfd.readouterr().out
  assert '4 runs: 1 finished, 3 to go' in out
  assert 'targets=nowhere | seed 0 | failed after' in out
  assert 'matches no projection' in out
  assert 'targets=attn/ | seed 0 | continues after' in out
  assert 'stopped by SIGTERM; the same command continues from here' in out
  assert {p: p.stat().st_mtime_ns for p in times} == times
  records = _records(workdir)
  assert records[quick] == done
  assert records[slow]['end']['reason'] == 'signal'
  assert [s['step'] > 0 for s in records[slow]['starts']] == [False, True]
  runs = {run['cell']: run for run in _summary(workdir)['runs']}
  # The identity that was planned is that which training found.
  assert runs['steps=2, targets=attn/']['identity'] == done['identity']
  assert [r['state'] for r in runs.values()] == [
      'finished', 'failed', 'failed', 'to do']
  html = (workdir / 'sweep.html').read_text('utf-8')
  assert 'Unfinished: 3 of 4 runs are missing' in html
  assert 'matches no projection' in html
  # By the validation loss that training found, of the best checkpoint.
  assert sweep(grid='train.steps=2;lora.targets=attn/', evaluate='none') == 0
  summary = _summary(workdir)
  assert summary['headline'] == 'loss' and summary['split'] == 'validation'
  run, = summary['runs']
  assert run['starts'] == 1
  found = metrics.read_jsonl(workdir / run['folder'] / 'metrics.jsonl')
  assert run['scores']['loss'] == min(
      r['eval/loss'] for r in found if 'eval/loss' in r and r['step'])


class _Finished(processes.Process):
  """A run that ends when it has been polled as often as its rank says."""

  polls = 0
  open = set()

  def poll(self):
    self.open.add(self)
    assert len(self.open) <= 2
    self.polls += 1
    if self.polls < self.run.leaves['lora.rank']:
      return None
    self.open.remove(self)
    compare_test.write_run(
        pathlib.Path(self.run.workdir), self.run.leaves,
        [{'step': 2, 'eval/loss': 3.0}], identity=self.run.identity)
    return self._outcome('finished', '')


def test_shards_and_parallel_runs_make_one_comparison(
    run_config, sweep, tmp_path, capfd, monkeypatch):
  """The first host's page is unfinished, the second's is whole."""
  monkeypatch.setattr(processes, 'Process', _Finished)
  run_config.train.steps, flags = 2, dict(evaluate='none', parallel=2)
  complete = []
  for shard in ('0/2', '1/2'):
    assert sweep(grid='lora.rank=2,4,8', shard=shard, **flags) == 0
    complete.append(_summary(tmp_path / 'w')['complete'])
  assert complete == [False, True]
  out = capfd.readouterr().out
  assert 'other hosts are still running' in out
  assert [out.count(f'| rank={rank} | seed 0 | starts') for rank in (2, 4, 8)
          ] == [1, 1, 1]
  assert [row['cell'] for row in _summary(tmp_path / 'w')[
      'metrics']['loss']] == ['rank=2', 'rank=4', 'rank=8']
  # Again: nothing is started.
  assert sweep(grid='lora.rank=2,4,8', **flags) == 0
  out = capfd.readouterr().out
  assert '3 runs: 3 finished, 0 to go\n' in out and '| starts' not in out
  # Another rank takes as long as these, by its updates.
  assert sweep(grid='lora.rank=2,16', dry_run=True, **flags) == 0
  assert 'to do       | rank=16 | seed 0 | about 25 s' in capfd.readouterr().out


def test_a_dry_run_estimates_times_by_flops(sweep, tmp_path, capfd):
  # The second cell trains three times as many updates of the same step.
  assert sweep(grid='train.steps=2,6', dry_run=True) == 0
  out = capfd.readouterr().out
  assert re.search(r'to do       \| steps=2 \| seed 0 \| training \S+', out)
  assert 'GFLOP/s that plain products reach here now' in out
  assert re.search(r'2 runs: 0 finished, 2 to go, training .+ to ', out)
  assert not (tmp_path / 'w').exists()


def test_a_workdir_has_one_sweep_at_a_time(sweep, tmp_path):
  with workdir_lib.lock_workdir(str(tmp_path / 'w')):
    with pytest.raises(errors.UserError, match='is in use by process'):
      sweep(grid='lora.rank=4')


def test_a_space_has_ranges_and_choices():
  space = search.parse_space(
      'optimizer.learning_rate=1e-5..1e-3:log;lora.rank=4,8,16;train.epochs='
      '1..5;data.buckets=(64,),(32,64)', tiny.get_config())
  rate, rank, epochs, buckets = space.values()
  assert (rate.low, rate.high, rate.log) == (1e-5, 1e-3, True)
  assert rank.choices == (4, 8, 16)
  assert (epochs.low, epochs.high, epochs.log) == (1, 5, False)
  assert buckets.choices == ('(64,)', '(32, 64)')


def test_a_killed_search_continues_and_ends_hopeless_trials(
    run_config, sweep, tmp_path, capfd):
  """Trials of an earlier call are written; the one under way then is run."""
  run_config.train.steps, run_config.eval.every = 10_000, 3
  workdir = str(tmp_path / 'w')
  flags = dict(
      search='lora.rank=2,4;optimizer.learning_rate=1e-5..1e-3:log', trials=6)
  space = search.parse_space(flags['search'], run_config)
  assert sweep(dry_run=True, **flags) == 0
  assert '0 of 6 trials are done' in capfd.readouterr().out
  assert not os.path.exists(workdir)
  earlier = search.Search(_source(run_config), run_config, space, workdir)
  for i in range(5):  # Far better than any run of this model at each step.
    earlier.study.add_trial(optuna.create_trial(
        params={'lora.rank': 2, 'optimizer.learning_rate': 1e-4 * (i + 1)},
        distributions=space, value=0.1,
        intermediate_values={3: 0.1, 6: 0.1}))
  under_way = earlier.study.ask(space)  # And then the search was killed.
  assert sweep(**flags) == 0
  assert 'pruned after 3 updates' in capfd.readouterr().out
  summary = _summary(tmp_path / 'w')
  assert summary['complete'] and len(summary['trials']) == 6
  last = summary['trials'][-1]
  assert last['state'] == 'pruned' and last['parameters'] == under_way.params
  record, = _records(workdir).values()
  assert record['end']['reason'] == 'signal'  # It has saved; not an error.
  assert record['config']['lora.rank'] == under_way.params['lora.rank']
  assert summary['best']['value'] == 0.1
  html = (tmp_path / 'w/sweep.html').read_text('utf-8')
  assert 'pruned' in html and 'it is too optimistic' in html
  # The same again has nothing to do; another search is not mixed in.
  assert sweep(**flags) == 0
  with pytest.raises(errors.UserError, match='holds trials of'):
    sweep(search='lora.rank=2,4', trials=6)
