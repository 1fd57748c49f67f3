"""Whole runs: what they compute, how they end, how they resume."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import time

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft import errors
from gemma_sft import evaluate
from gemma_sft import sample
from gemma_sft import tasks
from gemma_sft import train
from gemma_sft.inputs import splits
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import stop
from gemma_sft.run import base
from gemma_sft.run import checkpoint
from gemma_sft.run import prepare
from gemma_sft.run import resume
from gemma_sft.run import workdir as workdir_lib


def _run(config, workdir, status=0) -> str:
  assert train.main(config, str(workdir)) == status
  return str(workdir)


def _refused(config, workdir, *parts: str) -> None:
  """Expects a UserError with all parts, and no step taken."""
  before = conftest.losses(workdir)
  with pytest.raises(errors.UserError) as error:
    train.main(config, str(workdir))
  text = str(error.value)
  assert 'expected:' in text and 'fix:' in text
  for part in parts:
    assert part in text
  assert conftest.losses(workdir) == before


def _changed(config, changes):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  return config


def _expect_same_bits(workdir, straight, step: int) -> None:
  """Losses, hash chains, adapters and optimizer state: equal, not close."""
  keys = ('step', 'loss', 'grad_norm', 'n_trained', 'learning_rate', 'chain')
  rows, expected = (
      [{k: row[k] for k in keys} for row in conftest.train_rows(w)]
      for w in (workdir, straight))
  assert [row['step'] for row in expected] == list(range(1, step + 1))
  assert rows == expected
  state, reference = (
      conftest.saved_state(w, step) for w in (workdir, straight))
  assert state.keys() == reference.keys()
  for path, leaf in reference.items():
    np.testing.assert_array_equal(state[path], leaf, err_msg=path)
  meta, expected_meta = (_meta(w, step) for w in (workdir, straight))
  assert meta.digest and meta.digest == expected_meta.digest
  assert meta.chain == expected_meta.chain == expected[-1]['chain']


def _meta(workdir, step: int) -> checkpoint.Meta:
  return _checkpoints(workdir).read_meta(step)


def _checkpoints(workdir) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(str(workdir), read_only=True)


def _eval_losses(workdir) -> dict[int, float]:
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return {r['step']: r['eval/loss'] for r in rows if 'eval/loss' in r}


def _wait_for_step(process, workdir, step: int) -> None:
  deadline = time.monotonic() + 200
  while max(conftest.losses(workdir), default=0) < step:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    # A step takes milliseconds; this only leaves the run a core.
    time.sleep(0.005)


def _config(tmp_path_factory, **changes):
  """(`run_config` in a new folder, that folder)."""
  folder = tmp_path_factory.mktemp('run')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.update_from_flattened_dict(changes)
  return config, folder


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir) of `run_config`'s 6 updates, with checkpoints 3 and 6."""
  config, folder = _config(tmp_path_factory, **{'checkpoint.keep': 3})
  return config, _run(config, folder / 'w')


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """The workdir of 6 updates that keeps the newest and the best checkpoint."""
  # The loss falls, so by its highest value the first checkpoint is the best.
  config, folder = _config(tmp_path_factory, **{
      'eval.every': 2, 'eval.mode': 'max', 'checkpoint.keep': 1})
  return _run(config, folder / 'w')


@pytest.fixture(scope='module')
def long(tmp_path_factory):
  """(config, workdir) of 18 updates, which are several epochs."""
  # The generations of each evaluation leave seconds between an early update and
  # the end for a signal to land in.
  config, folder = _config(tmp_path_factory, **{
      'train.steps': 18, 'checkpoint.every': 4, 'eval.every': 6,
      'eval.judged': 2, 'data.repeat': 2})
  return config, _run(config, folder / 'w')


def _signalled(config, workdir, step, *signals):
  """Sends signals to a run after a step; returns (status, stdout, stderr)."""
  process = conftest.start(
      'train', *conftest.flags(config), f'--workdir={workdir}')
  _wait_for_step(process, workdir, step)
  # A checkpoint is written beside the steps, and may take longer than they do.
  folder = pathlib.Path(workdir) / 'checkpoints'
  while step > 4 and not any(p.name.isdigit() for p in folder.glob('*')):
    assert process.poll() is None, process.communicate()
    time.sleep(0.005)
  for number in signals:
    process.send_signal(number)
  return conftest.finish(process)


@pytest.mark.parametrize('changes', [
    {}, pytest.param({'data.packing': False, 'data.buckets': (34, 80),
                      'lora.dropout': 0.2}, marks=pytest.mark.slow)],
                         ids=['packed', 'buckets and dropout'])
def test_a_killed_run_resumes_to_the_same_bits(long, tmp_path, changes):
  config, straight = _changed(long[0], changes), long[1]
  if changes:
    straight = _run(config, tmp_path / 'straight')
  workdir = tmp_path / 'killed'
  assert _signalled(config, workdir, 7, signal.SIGKILL)[0] == -signal.SIGKILL
  reached = max(conftest.losses(workdir))
  newest = _checkpoints(workdir).steps()[-1]
  assert 7 <= reached < 18 and 4 <= newest <= reached
  _run(config, workdir)
  _expect_same_bits(workdir, straight, 18)
  assert _eval_losses(workdir) == _eval_losses(straight)


def test_sigterm_saves_exits_cleanly_and_resumes(long, tmp_path):
  config, straight = long
  workdir = tmp_path / 'stopped'
  # Launchers and systems send several.
  status, out, err = _signalled(
      config, workdir, 3, signal.SIGTERM, signal.SIGTERM)
  assert status == stop.UNFINISHED, err
  assert 'Traceback' not in err
  stopped_at = _checkpoints(workdir).steps()[-1]
  assert stopped_at < 18
  assert f'stopped by SIGTERM after {stopped_at} of 18 updates' in out
  # Saved where it stopped, not at the evaluation before.
  assert stopped_at == max(conftest.losses(workdir))
  _run(config, workdir)
  _expect_same_bits(workdir, straight, 18)


def _recorded_end(workdir):
  end = record_lib.read(workdir)['end']
  return end['step'], end['reason'], end['finished']


def test_deadline_saves_and_resumes(finished, tmp_path, capsys):
  config, straight = finished
  # Over when the first evaluation is.
  config = _changed(config, {'deadline_minutes': 1e-6})
  workdir = _run(config, tmp_path / 'stopped', stop.UNFINISHED)
  assert 'stopped by the deadline (config.deadline_minutes) after 0 of 6' in (
      capsys.readouterr().out)
  assert _checkpoints(workdir).steps() == [0]
  assert _recorded_end(workdir) == (0, 'deadline', False)
  config.deadline_minutes = 0.0
  _run(config, workdir)
  _expect_same_bits(workdir, straight, 6)
  assert [s['step'] for s in record_lib.read(workdir)['starts']] == [0, 0]


def test_a_finished_run_started_again_changes_nothing(
    finished, tmp_path, capsys):
  config, straight = finished
  workdir = shutil.copytree(straight, tmp_path / 'w')
  handler = signal.getsignal(signal.SIGINT)
  _run(config, workdir)
  assert signal.getsignal(signal.SIGINT) is handler
  for name in 'metrics.jsonl', 'run.json':
    assert (workdir / name).read_bytes() == (
        pathlib.Path(straight, name).read_bytes())
  out = capsys.readouterr().out
  assert 'resuming after 6 updates' in out
  assert '(finished); its record stays' in out


@pytest.fixture
def stopped(finished, tmp_path):
  """(config, workdir) of the 6 updates, stopped after 3."""
  config, straight = finished
  return config.copy_and_resolve_references(), _stop(straight, tmp_path)


def _stop(straight, tmp_path) -> str:
  """Returns a copy of a workdir without its checkpoint 6."""
  workdir = shutil.copytree(straight, tmp_path / 'stopped')
  shutil.rmtree(workdir / 'checkpoints' / '6')
  return str(workdir)


@pytest.mark.parametrize('change, message', [
    ({'lora.alpha': 32.0}, 'lora.alpha: 16.0 -> 32.0'),
    ({'optimizer.learning_rate': 0.5}, 'optimizer.learning_rate'),
    ({'seed': 1}, 'seed: 0 -> 1'),
    ({'train.steps': 12}, 'train.steps: 6 -> 12'),
    ({'data.repeat': 2}, 'data.repeat: 1 -> 2'),
    # Of another tree.
    ({'lora.rank': 8}, 'lora.rank'),
    ({'lora.targets': 'attn/'}, 'lora.targets'),
    ({'optimizer.max_grad_norm': 0.0}, 'optimizer.max_grad_norm'),
    ({'lora.enabled': False}, 'lora.enabled'),
], ids=str)
def test_resume_with_another_config_is_refused(stopped, change, message):
  config, workdir = stopped
  path = pathlib.Path(workdir, 'config.json')
  before = path.read_text('utf-8')
  _refused(_changed(config, change), workdir, 'another config', message)
  assert _checkpoints(workdir).steps() == [3]
  assert path.read_text('utf-8') == before


def test_wrong_columns_of_a_table_are_named(run_config, tmp_path):
  (tmp_path / 'table.csv').write_text('question,answer\nWhy?,So.\n')
  run_config.data.update(train=str(tmp_path / 'table.csv'), validation='')
  _refused(run_config, tmp_path / 'w', 'question', 'data.columns')
  run_config.data.columns = 'prompt=question,completion=answer'
  assert train.main(run_config, str(tmp_path / 'v'), True) == 0


def test_resume_with_other_data_is_refused(stopped):
  config, workdir = stopped
  path = pathlib.Path(config.data.train)
  before = path.read_text('utf-8')
  path.write_text(before.replace('It is 4.', 'It is 5.'))
  try:
    _refused(config, workdir, 'training records')
  finally:
    path.write_text(before)


def test_resume_without_its_base_or_on_another_is_refused(
    run_config, tmp_path):
  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'base', seed=0)
  workdir = _run(run_config, tmp_path / 'w')
  _run(run_config, workdir)
  # `model.weights` may change: a folder can move. What is in it may not.
  (tmp_path / 'base').rename(tmp_path / 'moved')
  _refused(run_config, workdir, 'base')
  run_config.model.weights = str(tmp_path / 'moved')
  _run(run_config, workdir)
  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'other', seed=1)
  _refused(run_config, workdir, 'the base weights have hash')


def test_resume_on_another_mesh_is_within_tolerance(stopped, finished):
  straight, (config, workdir) = finished[1], stopped
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.eval.every = 2
  config.checkpoint.keep = 1
  _run(config, workdir)
  resumed, expected = conftest.losses(workdir), conftest.losses(straight)
  assert [resumed[i] for i in (1, 2, 3)] == [expected[i] for i in (1, 2, 3)]
  # Float32 sums in another order, through three Adam updates.
  np.testing.assert_allclose(
      [resumed[i] for i in (4, 5, 6)], [expected[i] for i in (4, 5, 6)],
      rtol=1e-5)
  rows = [r['chain'] for r in conftest.train_rows(workdir)]
  assert rows == [r['chain'] for r in conftest.train_rows(straight)]


# Between runs whose gradients differ in the order of float32 sums alone (2e-7
# or so of each), a few Adam updates keep losses equal to 1e-5; a wrong divisor
# or a token lost shows at 1e-3 and more.
_SAME = dict(rtol=1e-5)


def _loss_list(workdir) -> list[float]:
  found = conftest.losses(workdir)
  return [found[step] for step in sorted(found)]


@pytest.fixture
def straight_losses(finished):
  losses = _loss_list(finished[1])
  assert len(losses) == 6 and len(set(losses)) == 6
  return losses


def test_losses_do_not_depend_on_the_mesh(
    run_config, straight_losses, tmp_path):
  for data, fsdp, tensor in ((2, 2, 2), (1, 8, 1)):
    run_config.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    other = _run(run_config, tmp_path / f'{data}x{fsdp}x{tensor}')
    np.testing.assert_allclose(_loss_list(other), straight_losses, **_SAME)
  run_config.mesh.update(data=-1, fsdp=1, tensor=1)
  status, _, err = conftest.run_module(
      'train', *conftest.flags(run_config), f'--workdir={tmp_path / "one"}',
      devices=1)
  assert status == 0, err
  np.testing.assert_allclose(
      _loss_list(tmp_path / 'one'), straight_losses, **_SAME)


@pytest.mark.parametrize('microbatches', (2, 8))
def test_losses_do_not_depend_on_the_microbatches(
    run_config, straight_losses, tmp_path, microbatches):
  # Tensor parallel alone, so that one row is a whole microbatch. The rows hold
  # different numbers of trained tokens, and the last of them none.
  run_config.mesh.update(data=1, fsdp=1, tensor=8)
  run_config.train.gradient_accumulation_steps = microbatches
  many = _loss_list(_run(run_config, tmp_path))
  np.testing.assert_allclose(many, straight_losses, **_SAME)


def test_packed_and_padded_batches_of_the_same_rows_agree(
    run_config, tmp_path):
  pairs = [(f'Say {i}.', 'x' * i) for i in range(1, 9)]
  run_config.data.update(
      train=conftest.write_pairs(tmp_path / 'eight.txt', pairs))
  run_config.train.steps = 4  # Each is one pass over all eight.
  packed = _loss_list(_run(run_config, tmp_path / 'packed'))
  run_config.data.packing = False
  padded = _loss_list(_run(run_config, tmp_path / 'padded'))
  np.testing.assert_allclose(padded, packed, **_SAME)


def test_base_weights_are_untouched_and_not_in_the_checkpoint(
    run_config, tmp_path):
  run = prepare.prepare(run_config, str(tmp_path))
  before = jax.tree.map(np.array, run.base)
  with (contextlib.closing(resume.open_checkpoints(run)) as checkpoints,
        stop.StopRequest(0) as request):
    assert train.train(run, checkpoints, request)
  assert len(jax.tree.leaves(before)) > 10
  jax.tree.map(np.testing.assert_array_equal, before, run.base)
  saved = conftest.saved_state(tmp_path, 6)
  kinds = {path.split("'")[1] for path in saved}
  assert kinds == {'step', 'trainable', 'opt_state'}
  # Adapters, their two moments, three counters: nothing of a base's size.
  n_adapters = 2 * 2 * 7  # A and B, layers, projections.
  trainable = [p for p in saved if p.startswith("['trainable']")]
  assert len(trainable) == n_adapters
  assert all(p.endswith(("['a']", "['b']")) for p in trainable)
  assert len(saved) == 3 * n_adapters + 3
  assert max(leaf.size for leaf in saved.values()) < before[
      'embedder']['input_embedding'].size
  # And the adapters did move.
  assert any(np.any(saved[p] != 0) for p in trainable if p.endswith("['b']"))


def test_full_fine_tuning_trains_saves_and_resumes(run_config, tmp_path):
  run_config.lora.enabled = False
  run_config.checkpoint.keep = 2
  straight = _run(run_config, tmp_path / 'straight')
  found = conftest.losses(straight)
  assert found[6] < found[1]
  saved = conftest.saved_state(straight, 6)
  embedding = saved["['trainable']['embedder']['input_embedding']"]
  assert embedding.shape == (512, 32) and embedding.dtype == np.float32
  workdir = _run(run_config, _stop(straight, tmp_path))
  _expect_same_bits(workdir, straight, 6)


def test_a_handful_of_pairs_is_memorised(run_config, tmp_path):
  pairs = [('Red?', 'apple'), ('Blue?', 'sky'), ('Green?', 'leaf'),
           ('White?', 'snow')]
  run_config.data.update(
      train=conftest.write_pairs(tmp_path / 'four.txt', pairs), validation='',
      max_length=32)
  run_config.optimizer.update(learning_rate=0.01, schedule='constant')
  run_config.train.steps = run_config.checkpoint.every = 60
  workdir = _run(run_config, tmp_path / 'w')
  found = conftest.losses(workdir)
  assert found[1] > 6.0  # About ln 512, the vocabulary.
  # Not 0: with a frozen random head of unit rows, a hidden state of norm
  # sqrt(32) gives no token more than a fifth of the probability.
  assert 1.5 < found[60] < 1.9
  # But the first in rank, all of them.
  evaluate.main(None, workdir, base=False, split='train', step=-2, limit=0)
  result = json.loads(pathlib.Path(
      workdir, 'evaluation', 'train-tuned.json').read_text('utf-8'))
  assert [a['answer'] for a in result['answers']] == [
      'apple', 'sky', 'leaf', 'snow']
  assert result['scores']['judge/exact'] == 1.0


@pytest.mark.parametrize('step', (0, 2, 6))
def test_evaluation_n_is_of_the_weights_after_n_updates(evaluated, step):
  during = _eval_losses(evaluated)
  assert sorted(during) == [0, 2, 4, 6] and len(set(during.values())) == 4
  evaluate.main(None, evaluated, base=step == 0, split='validation', step=step,
                limit=0)
  name = 'base' if step == 0 else 'tuned'
  path = pathlib.Path(evaluated, 'evaluation', f'validation-{name}.json')
  after = json.loads(path.read_text('utf-8'))['scores']['loss']
  # Merged into the base rather than beside it: float32 in another order.
  np.testing.assert_allclose(after, during[step], rtol=1e-5)


def test_best_checkpoint_outlives_the_rotation(evaluated):
  scores = _eval_losses(evaluated)
  assert scores[0] > scores[2] > scores[4] > scores[6]
  assert _checkpoints(evaluated).steps() == [2, 6]
  # The untouched model was better still, but it is not a checkpoint.
  assert _meta(evaluated, 6).best == {
      'step': 0, 'value': scores[0], 'metric': 'loss', 'mode': 'max'}


def test_patience_stops_early_and_stays_stopped(run_config, tmp_path, capsys):
  # The loss falls, so its highest value is never beaten after the first.
  run_config.eval.update(every=1, metric='loss', mode='max', patience=2)
  workdir = _run(run_config, tmp_path / 'w')
  assert max(conftest.losses(workdir)) == 2
  assert _recorded_end(workdir) == (2, 'patience', True)
  assert 'stopped early after 2 updates: loss has not improved for 2' in (
      capsys.readouterr().out)
  _run(run_config, workdir)
  assert max(conftest.losses(workdir)) == 2
  run_config.eval.patience = 0  # May change: then the run goes on.
  _run(run_config, workdir)
  assert max(conftest.losses(workdir)) == 6


def test_the_untouched_base_is_not_judged(long):
  rows = metrics.read_jsonl(os.path.join(long[1], 'metrics.jsonl'))
  assert {row['step']: 'eval/judge/exact' in row for row in rows
          if 'eval/loss' in row} == {0: False, 6: True, 12: True, 18: True}


def test_a_metric_that_the_judge_lacks_stops_before_the_first_step(
    run_config, tmp_path):
  run_config.eval.update(metric='judge/exakt', mode='max', judged=2)
  with pytest.raises(errors.UserError, match="mean 'judge/exact'"):
    _run(run_config, tmp_path / 'w')
  assert not conftest.losses(tmp_path / 'w')


def test_a_changed_metric_begins_a_new_best(stopped):
  config, workdir = stopped
  config.eval.update(metric='judge/exact', mode='max', judged=2)
  _run(config, workdir)
  # A share, not the loss of 6 that the first half called best.
  assert _meta(workdir, 6).best['value'] <= 1.0


def test_init_from_starts_from_the_other_runs_best(
    run_config, finished, tmp_path):
  first = finished[1]
  run_config.init_from = first
  run_config.optimizer.max_grad_norm = 0.0  # Its optimizer may be another.
  second = _run(run_config, tmp_path / 'second')
  # Evaluation 0 is that of the adapters taken over.
  assert _eval_losses(second)[0] == _eval_losses(first)[6]
  # The optimizer begins afresh.
  assert conftest.train_rows(second)[0]['learning_rate'] == (
      conftest.train_rows(first)[0]['learning_rate'])


@pytest.mark.parametrize('changes, part', [
    ({'lora.rank': 8}, 'cannot be taken over'), ({'lora.alpha': 64.0}, ''),
    ({'seed': 1}, ''), ({'init_from': 'nowhere'}, 'no checkpoints in')],
                         ids=str)
def test_init_from_what_would_mean_something_else_is_refused(
    run_config, finished, tmp_path, changes, part):
  run_config.init_from = finished[1]
  _refused(_changed(run_config, changes), tmp_path / 'second', part)


@pytest.mark.parametrize('changes, parts', [
    ({'task': 'blob'}, ["config.task is 'blob'", "Did you mean 'blop'?"]),
    ({'model.name': 'gemma3_270n'}, ["Did you mean 'gemma3_270m'?"]),
    ({'model.weights': 'nowhere'}, ["weights source 'nowhere'"]),
    ({'model.tokenizer': 'nowhere'}, ['model.tokenizer', 'nowhere']),
    ({'mesh.data': 3}, ['there are 8 devices', 'product is 8']),
    ({'mesh.data': -1, 'mesh.fsdp': -1}, ['at most one of them -1']),
    ({'data.batch_size': 6}, ['data.batch_size is 6', 'multiple of 8']),
    ({'train.gradient_accumulation_steps': 3}, ['a multiple of 24', '=24']),
    ({'lora.targets': 'atn'}, ['matches no projection', 'q_einsum/q']),
    ({'data.columns': 'prompt=question'}, ["no column 'question'"]),
    # Rows beyond the model's positions, before the data are read.
    ({'data.max_length': 40_000, 'data.train': '-'}, ['max_length is 40000']),
    ({'data.max_length': 20}, ['longer than the limit', 'train.txt:']),
    ({'data.packing': False, 'data.buckets': (32, 48)}, ['data.buckets']),
    ({'eval.metric': 'lss'}, ["'lss'", "Did you mean 'loss'?"]),
    ({'optimizer.learning_rate': float('nan')}, ['learning_rate is nan']),
    ({'model.weights_sha256': '0' * 64}, ['weights_sha256']),  # Of random ones.
    ({'model.vocab_size': 128}, ['vocab']),  # The tokenizer has more pieces.
], ids=str)
def test_bad_values_are_named(run_config, tmp_path, changes, parts):
  run_config.update_from_flattened_dict(changes)
  _refused(run_config, tmp_path / 'w', *parts)


def test_a_prompt_in_two_splits_is_refused(run_config, tmp_path):
  run_config.data.validation = conftest.write_pairs(
      tmp_path / 'leak.txt', [('Fresh?', 'Yes.'), ('what is 3 and  3', '6')])
  _refused(run_config, tmp_path / 'w', 'leak.txt:7', 'train.txt:',
           '1 of 2 prompts of validation')


def test_wrong_hash_of_weights_is_refused(run_config, tmp_path):
  run_config.model.update(
      weights=conftest.save_base(run_config, tmp_path / 'base', seed=0),
      weights_sha256='0' * 64)
  _refused(run_config, tmp_path / 'w', 'has the hash', '0' * 64)


def test_workdir_in_use_is_refused_with_the_process(run_config, tmp_path):
  held = workdir_lib.lock_workdir(str(tmp_path))
  _refused(run_config, tmp_path, f'in use by process {os.getpid()}')
  held.close()
  # A run that is refused gives the workdir back.
  _refused(_changed(run_config, {'data.train': 'nowhere.txt'}), tmp_path)
  assert train.main(run_config, str(tmp_path), dry_run=True) == 0


def test_workdir_that_cannot_be_written_is_refused(run_config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='File exists'):
    train.main(run_config, str(tmp_path / 'file'))
  closed = tmp_path / 'closed'
  closed.mkdir(mode=0o500)
  if os.geteuid() == 0:  # To whom the kernel's own folders alone are closed.
    closed = pathlib.Path('/sys')
  with pytest.raises(errors.UserError, match='ermi(ssion denied|tted)'):
    train.main(run_config, str(closed / 'w'))


def test_dry_run_audits_and_trains_nothing(run_config, tmp_path, capsys):
  assert train.main(run_config, str(tmp_path / 'w'), dry_run=True) == 0
  out = capsys.readouterr().out
  assert 'audit: train: 24 examples' in out
  assert 'plan: 6 updates, 2 an epoch of 24 examples x 1' in out
  assert os.listdir(tmp_path / 'w') == ['.lock']


def test_turn_tags_in_a_users_text_stay_text(run_config, tmp_path, capsys):
  run_config.data.train = conftest.write_pairs(tmp_path / 'tags.txt', [
      ('What is <end_of_turn>\n<start_of_turn>model?', 'A tag: <end_of_turn>.'),
      ('What is <bos>?', 'The first token.')])
  run_config.data.update(validation='', max_length=128)
  assert train.main(run_config, str(tmp_path / 'w'), dry_run=True) == 0
  assert '2 with control-token text (kept as ordinary text)' in (
      capsys.readouterr().out)
  tokenizer = base.load_tokenizer(
      run_config.model, base.resolve_weights(run_config.model), 3)
  split = splits.load_splits(
      run_config.data, ('train',), tasks.load('chat'), tokenizer)['train']
  for example in split.examples:
    tokens = example.tokens
    assert [int((tokens == t).sum()) for t in tokenizer.turn_ids] == [2, 2]
    assert int((tokens == tokenizer.bos_id).sum()) == 1


def test_the_checkpoint_before_a_step_that_is_not_finite_is_whole(
    run_config, tmp_path):
  run_config.optimizer.update(learning_rate=1e30, warmup_ratio=0.0)
  run_config.checkpoint.every = 1
  with pytest.raises(errors.UserError, match='step 2: loss is nan') as error:
    train.main(run_config, str(tmp_path))
  assert 'the last checkpoint is from before' in str(error.value)
  assert f'--config.init_from={tmp_path}' in str(error.value)
  assert sorted(conftest.losses(tmp_path)) == [1]
  assert _checkpoints(tmp_path).steps() == [1]
  assert sample.main(
      None, str(tmp_path), base=False, step=1, prompt=['Hi'], system='',
      max_new_tokens=1) == 0


def test_a_base_that_is_not_finite_stops_at_step_1(run_config, tmp_path):
  def poison(params):
    params['final_norm']['scale'] = jnp.full((32,), jnp.nan)
    return params

  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'base', seed=0, change=poison)
  with pytest.raises(errors.UserError, match='step 1: loss is nan'):
    train.main(run_config, str(tmp_path / 'w'))
  assert not _checkpoints(tmp_path / 'w').steps()


def test_plain_text_trains(run_config, tmp_path):
  (tmp_path / 'plain.txt').write_text('First line.\nSecond.\n\nAnother one.\n')
  run_config.data.update(train=str(tmp_path / 'plain.txt'), validation='')
  run_config.train.steps = 2
  assert len(conftest.losses(_run(run_config, tmp_path / 'w'))) == 2
