"""Whole runs: what they compute, how they end, how they go on."""

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
from gemma_sft.monitor import stop
from gemma_sft.run import base
from gemma_sft.run import checkpoint
from gemma_sft.run import prepare as prepare_lib
from gemma_sft.run import workdir as workdir_lib


def _run(config, workdir, status=0) -> str:
  assert train.main(config, str(workdir), False) == status
  return str(workdir)


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
  path = os.path.join(workdir, 'metrics.jsonl')
  deadline = time.monotonic() + 200
  while not any(row['step'] >= step for row in metrics.read_jsonl(path)
                if 'loss' in row):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    # A step takes milliseconds; this only leaves the run a core.
    time.sleep(0.005)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir) of `run_config`'s 6 updates, with checkpoints 3 and 6."""
  folder = tmp_path_factory.mktemp('finished')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.checkpoint.keep = 3
  return config, _run(config, folder / 'w')


# Resume ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'changes', [
        {'data.packing': True, 'data.repeat': 2},
        pytest.param(
            {'data.packing': False, 'data.buckets': (34, 80),
             'lora.dropout': 0.2}, marks=pytest.mark.slow),
    ], ids=['packed', 'buckets and dropout'])
def test_killed_run_goes_on_to_the_same_bits(run_config, tmp_path, changes):
  # 30 updates are several epochs; the generations of each evaluation leave
  # seconds between update 8 and the end for the kill to land in.
  run_config.train.steps = 30
  run_config.checkpoint.every = 3
  run_config.eval.update(every=6, judged=2)
  run_config.update_from_flattened_dict(changes)
  straight = _run(run_config, tmp_path / 'straight')

  workdir = tmp_path / 'killed'
  process = conftest.start(
      'train', *conftest.flags(run_config), f'--workdir={workdir}')
  _wait_for_step(process, workdir, 8)
  os.kill(process.pid, signal.SIGKILL)
  assert conftest.finish(process)[0] == -signal.SIGKILL
  reached = max(conftest.losses(workdir))
  newest = _checkpoints(workdir).steps()[-1]
  assert 8 <= reached < 30 and 3 <= newest <= reached

  _run(run_config, workdir)
  _expect_same_bits(workdir, straight, 30)
  assert _eval_losses(workdir) == _eval_losses(straight)


def test_sigterm_saves_exits_cleanly_and_resumes(run_config, tmp_path):
  run_config.train.steps = 30
  run_config.eval.update(every=6, judged=2)
  straight = _run(run_config, tmp_path / 'straight')
  workdir = tmp_path / 'stopped'
  process = conftest.start(
      'train', *conftest.flags(run_config), f'--workdir={workdir}')
  _wait_for_step(process, workdir, 3)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)  # Launchers and systems send several.
  status, out, err = conftest.finish(process)
  assert status == stop.UNFINISHED, err
  assert 'Traceback' not in err
  stopped_at = _checkpoints(workdir).steps()[-1]
  assert stopped_at < 30
  assert f'stopped by SIGTERM after {stopped_at} of 30 updates' in out
  # Saved where it stopped, not at the evaluation before.
  assert stopped_at == max(conftest.losses(workdir))
  _run(run_config, workdir)
  _expect_same_bits(workdir, straight, 30)


def test_deadline_saves_and_resumes(finished, tmp_path, capsys):
  config, straight = finished
  config = config.copy_and_resolve_references()
  config.deadline_minutes = 1e-6  # Over when the first evaluation is.
  workdir = _run(config, tmp_path / 'stopped', stop.UNFINISHED)
  assert 'stopped by the deadline (config.deadline_minutes) after 0 of 6' in (
      capsys.readouterr().out)
  assert _checkpoints(workdir).steps() == [0]
  config.deadline_minutes = 0.0
  _run(config, workdir)
  _expect_same_bits(workdir, straight, 6)


def test_a_finished_run_started_again_changes_nothing(
    finished, tmp_path, capsys):
  config, straight = finished
  workdir = shutil.copytree(straight, tmp_path / 'w')
  _run(config, workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == (
      pathlib.Path(straight, 'metrics.jsonl').read_bytes())
  assert 'resuming after 6 updates' in capsys.readouterr().out


@pytest.fixture
def stopped(run_config, finished, tmp_path):
  """`run_config` and the workdir of its 6 updates, stopped after 3."""
  config, straight = finished
  run_config.update(config)
  workdir = shutil.copytree(straight, tmp_path / 'w')
  _drop_checkpoint(workdir, 6)
  return str(workdir)


def _drop_checkpoint(workdir, step):
  pathlib.Path(workdir, 'checkpoints', str(step)).rename(
      pathlib.Path(workdir, f'dropped-{step}'))


@pytest.mark.parametrize('change, message', [
    ({'lora.alpha': 32.0}, 'lora.alpha: 16.0 -> 32.0'),
    ({'optimizer.learning_rate': 0.5}, 'optimizer.learning_rate'),
    ({'seed': 1}, 'seed: 0 -> 1'),
    ({'train.steps': 12}, 'train.steps: 6 -> 12'),
    ({'data.repeat': 2}, 'data.repeat: 1 -> 2'),
])
def test_resume_with_another_config_is_refused(
    run_config, stopped, change, message):
  run_config.update_from_flattened_dict(change)
  with pytest.raises(errors.UserError, match='another config') as error:
    train.main(run_config, stopped, False)
  assert message in str(error.value)
  assert _checkpoints(stopped).steps() == [3]


@pytest.mark.parametrize('change', [
    {'lora.rank': 8}, {'lora.targets': 'attn/'},
    {'optimizer.max_grad_norm': 0.0}, {'lora.enabled': False}],
    ids=lambda c: next(iter(c)))
def test_resume_with_another_tree_is_refused_and_moves_nothing(
    run_config, stopped, change):
  run_config.update_from_flattened_dict(change)
  with pytest.raises(errors.UserError, match='another config') as error:
    train.main(run_config, stopped, False)
  assert next(iter(change)) in str(error.value)
  assert _checkpoints(stopped).steps() == [3]


def test_a_refused_resume_leaves_the_runs_config(run_config, stopped):
  path = pathlib.Path(stopped, 'config.json')
  before = path.read_text('utf-8')
  run_config.lora.alpha = 32.0
  with pytest.raises(errors.UserError):
    train.main(run_config, stopped, False)
  assert path.read_text('utf-8') == before


def test_resume_with_other_data_is_refused(run_config, stopped):
  path = pathlib.Path(run_config.data.train)
  before = path.read_text('utf-8')
  path.write_text(before.replace('It is 4.', 'It is 5.'))
  try:
    with pytest.raises(errors.UserError, match='training records') as error:
      train.main(run_config, stopped, False)
  finally:
    path.write_text(before)
  assert 'expected:' in str(error.value) and 'fix:' in str(error.value)


def test_resume_on_another_base_is_refused(run_config, tmp_path):
  run_config.model.update(weights=conftest.save_base(
      run_config, tmp_path / 'base', seed=0))
  workdir = _run(run_config, tmp_path / 'w')
  _run(run_config, workdir)
  # `model.weights` may change: a folder can move. What is in it may not.
  (tmp_path / 'base').rename(tmp_path / 'moved')
  run_config.model.weights = str(tmp_path / 'moved')
  _run(run_config, workdir)
  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'other', seed=1)
  with pytest.raises(errors.UserError, match='the base weights have hash'):
    train.main(run_config, workdir, False)


def test_resume_without_its_base_is_refused(run_config, tmp_path):
  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'base', seed=0)
  workdir = _run(run_config, tmp_path / 'w')
  before = conftest.losses(workdir)
  (tmp_path / 'base').rename(tmp_path / 'moved')
  with pytest.raises(errors.UserError, match='base') as error:
    train.main(run_config, workdir, False)
  assert 'expected:' in str(error.value) and 'fix:' in str(error.value)
  assert conftest.losses(workdir) == before
  (tmp_path / 'moved').rename(tmp_path / 'base')
  _run(run_config, workdir)


def test_resume_on_another_mesh_goes_on_within_tolerance(
    run_config, stopped, finished):
  straight = finished[1]
  run_config.mesh.update(data=2, fsdp=2, tensor=2)
  run_config.eval.every = 2
  run_config.checkpoint.keep = 1
  _run(run_config, stopped)
  resumed, expected = conftest.losses(stopped), conftest.losses(straight)
  assert [resumed[i] for i in (1, 2, 3)] == [expected[i] for i in (1, 2, 3)]
  # Float32 sums in another order, through three Adam updates.
  np.testing.assert_allclose(
      [resumed[i] for i in (4, 5, 6)], [expected[i] for i in (4, 5, 6)],
      rtol=1e-5)
  rows = [r['chain'] for r in conftest.train_rows(stopped)]
  assert rows == [r['chain'] for r in conftest.train_rows(straight)]


# What a step computes --------------------------------------------------------


# Between runs whose gradients differ in the order of float32 sums alone (2e-7
# or so of each), a few Adam updates keep losses equal to 1e-5; a wrong divisor
# or a token lost shows at 1e-3 and more.
_SAME = dict(rtol=1e-5)


def _loss_list(config, workdir) -> list[float]:
  found = conftest.losses(_run(config, workdir))
  return [found[step] for step in sorted(found)]


def test_losses_do_not_depend_on_the_mesh(run_config, tmp_path):
  run_config.train.steps = 4
  straight = _loss_list(run_config, tmp_path / '8x1x1')
  assert len(straight) == 4 and len(set(straight)) == 4
  for data, fsdp, tensor in ((2, 2, 2), (1, 8, 1)):
    run_config.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    other = _loss_list(run_config, tmp_path / f'{data}x{fsdp}x{tensor}')
    np.testing.assert_allclose(other, straight, **_SAME)
  run_config.mesh.update(data=-1, fsdp=1, tensor=1)
  status, _, err = conftest.run_module(
      'train', *conftest.flags(run_config), f'--workdir={tmp_path / "one"}',
      devices=1)
  assert status == 0, err
  one = conftest.losses(tmp_path / 'one')
  np.testing.assert_allclose([one[i] for i in (1, 2, 3, 4)], straight, **_SAME)


def test_losses_do_not_depend_on_the_microbatches(run_config, tmp_path):
  # Tensor parallel alone, so that one row is a whole microbatch. The rows hold
  # different numbers of trained tokens, and the last of them none.
  run_config.mesh.update(data=1, fsdp=1, tensor=8)
  run_config.train.steps = 4
  once = _loss_list(run_config, tmp_path / '1x8')
  for microbatches in (2, 8):
    run_config.train.gradient_accumulation_steps = microbatches
    many = _loss_list(run_config, tmp_path / f'{microbatches}')
    np.testing.assert_allclose(many, once, **_SAME)


def test_packed_and_padded_batches_of_the_same_rows_agree(
    run_config, tmp_path):
  pairs = [(f'Say {i}.', 'x' * i) for i in range(1, 9)]
  run_config.data.update(
      train=conftest.write_pairs(tmp_path / 'eight.txt', pairs))
  run_config.train.steps = 4  # Each is one pass over all eight.
  packed = _loss_list(run_config, tmp_path / 'packed')
  run_config.data.packing = False
  padded = _loss_list(run_config, tmp_path / 'padded')
  np.testing.assert_allclose(padded, packed, **_SAME)


def test_base_weights_are_untouched_and_not_in_the_checkpoint(
    run_config, tmp_path, monkeypatch):
  prepared = []

  def prepare(*arguments, **options):
    run = sound(*arguments, **options)
    prepared.append((run, jax.tree.map(np.array, run.base)))
    return run

  sound = prepare_lib.prepare
  monkeypatch.setattr(prepare_lib, 'prepare', prepare)
  _run(run_config, tmp_path)
  (run, before), = prepared
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
  workdir = shutil.copytree(straight, tmp_path / 'resumed')
  _drop_checkpoint(workdir, 6)
  _run(run_config, workdir)
  _expect_same_bits(workdir, straight, 6)


def test_a_handful_of_pairs_is_memorised(run_config, tmp_path):
  pairs = [('Red?', 'apple'), ('Blue?', 'sky'), ('Green?', 'leaf'),
           ('White?', 'snow')]
  run_config.data.update(
      train=conftest.write_pairs(tmp_path / 'four.txt', pairs), validation='',
      max_length=32)
  run_config.optimizer.update(learning_rate=0.01, schedule='constant')
  run_config.train.steps = 60
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


# Evaluation, best and early stopping -----------------------------------------


def test_evaluation_n_is_of_the_weights_after_n_updates(run_config, tmp_path):
  run_config.eval.every = 2
  run_config.checkpoint.keep = 3
  workdir = _run(run_config, tmp_path / 'w')
  during = _eval_losses(workdir)
  assert sorted(during) == [0, 2, 4, 6]
  for step in (0, 2, 6):
    evaluate.main(
        None, workdir, base=step == 0, split='validation', step=step, limit=0)
    name = 'base' if step == 0 else 'tuned'
    path = pathlib.Path(workdir, 'evaluation', f'validation-{name}.json')
    after = json.loads(path.read_text('utf-8'))['scores']['loss']
    # Merged into the base rather than beside it: float32 in another order.
    np.testing.assert_allclose(after, during[step], rtol=1e-5)
  assert len(set(during.values())) == 4


def test_best_checkpoint_outlives_the_rotation(run_config, tmp_path):
  # The loss falls, so by its highest value the first checkpoint is the best.
  run_config.eval.update(every=2, metric='loss', mode='max')
  run_config.checkpoint.update(keep=1)
  workdir = _run(run_config, tmp_path / 'w')
  scores = _eval_losses(workdir)
  assert scores[0] > scores[2] > scores[4] > scores[6]
  best = 2
  assert _checkpoints(workdir).steps() == [best, 6]
  # The untouched model was better still, but it is not a checkpoint.
  assert _meta(workdir, 6).best == {
      'step': 0, 'value': scores[0], 'metric': 'loss', 'mode': 'max'}
  checkpoints = _checkpoints(workdir)
  assert checkpoint.choose_step(checkpoints, -1) == best
  assert checkpoint.choose_step(checkpoints, -2) == 6
  assert checkpoint.choose_step(checkpoints, 6) == 6
  with pytest.raises(errors.UserError, match='no checkpoint of step 4'):
    checkpoint.choose_step(checkpoints, 4)


def test_patience_stops_early_and_stays_stopped(run_config, tmp_path, capsys):
  # The loss falls, so its highest value is never beaten after the first.
  run_config.eval.update(every=1, metric='loss', mode='max', patience=2)
  workdir = _run(run_config, tmp_path / 'w')
  assert max(conftest.losses(workdir)) == 2
  assert 'stopped early after 2 updates: loss has not improved for 2' in (
      capsys.readouterr().out)
  _run(run_config, workdir)
  assert max(conftest.losses(workdir)) == 2
  run_config.eval.patience = 0  # May change: then the run goes on.
  _run(run_config, workdir)
  assert max(conftest.losses(workdir)) == 6


def test_a_changed_metric_begins_a_new_best(run_config, stopped):
  run_config.eval.update(metric='judge/exact', mode='max', judged=2)
  _run(run_config, stopped)
  # A share, not the loss of 6 that the first half called best.
  assert _meta(stopped, 6).best['value'] <= 1.0


@pytest.mark.parametrize('changes', [
    {'eval.metric': 'judge/exact', 'eval.mode': 'max'},
    {'eval.patience': 2, 'data.validation': ''}], ids=['judged=0', 'patience'])
def test_a_metric_that_cannot_come_is_refused(run_config, tmp_path, changes):
  run_config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError):
    train.main(run_config, str(tmp_path / 'w'), False)


def test_init_from_starts_from_the_other_runs_best(
    run_config, finished, tmp_path):
  first = finished[1]
  run_config.init_from = first
  second = _run(run_config, tmp_path / 'second')
  # Evaluation 0 is that of the adapters taken over.
  assert _eval_losses(second)[0] == _eval_losses(first)[6]
  # The optimizer begins afresh.
  assert conftest.train_rows(second)[0]['learning_rate'] == (
      conftest.train_rows(first)[0]['learning_rate'])
  run_config.lora.rank = 8
  with pytest.raises(errors.UserError, match='cannot be taken over'):
    train.main(run_config, str(tmp_path / 'third'), False)
  run_config.init_from = str(tmp_path / 'nowhere')
  with pytest.raises(errors.UserError, match='no checkpoints in'):
    train.main(run_config, str(tmp_path / 'fourth'), False)


def test_init_from_takes_a_run_with_another_optimizer(
    run_config, finished, tmp_path):
  run_config.init_from = finished[1]
  run_config.optimizer.max_grad_norm = 0.0
  run_config.train.steps = 1
  _run(run_config, tmp_path / 'second')


@pytest.mark.parametrize('changes', [{'lora.alpha': 64.0}, {'seed': 1}],
                         ids=str)
def test_init_from_what_would_mean_something_else_is_refused(
    run_config, finished, tmp_path, changes):
  run_config.init_from = finished[1]
  run_config.train.steps = 1
  run_config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError):
    train.main(run_config, str(tmp_path / 'second'), False)


# Bad input -------------------------------------------------------------------


def _refused(config, workdir, *parts: str) -> None:
  """Expects a UserError with all parts, and no step taken."""
  with pytest.raises(errors.UserError) as error:
    train.main(config, str(workdir), False)
  text = str(error.value)
  assert 'expected:' in text and 'fix:' in text
  for part in parts:
    assert part in text
  assert not conftest.losses(workdir)


@pytest.mark.parametrize('changes, parts', [
    ({'task': 'blob'}, ["config.task is 'blob'", "Did you mean 'blop'?"]),
    ({'model.name': 'gemma3_270n'}, ["Did you mean 'gemma3_270m'?"]),
    ({'model.weights': 'nowhere'}, ["weights source 'nowhere'"]),
    ({'model.tokenizer': 'nowhere'}, ['model.tokenizer', 'nowhere']),
    ({'mesh.data': 3}, ['there are 8 devices', 'product is 8']),
    ({'mesh.data': -1, 'mesh.fsdp': -1}, ['at most one of them -1']),
    ({'mesh.tensor': 0}, ['config.mesh.tensor is 0']),
    ({'data.batch_size': 6}, ['data.batch_size is 6', 'multiple of 8']),
    ({'train.gradient_accumulation_steps': 3}, ['a multiple of 24', '=24']),
    ({'lora.rank': 0}, ['config.lora.rank is 0']),
    ({'lora.targets': '('}, ["config.lora.targets is '('"]),
    ({'lora.targets': 'atn'}, ['matches no projection', 'q_einsum/q']),
    ({'data.columns': 'prompt'}, ['name=column']),
    ({'data.columns': 'prompt=question'}, ["no column 'question'"]),
    ({'data.max_length': 20}, ['longer than the limit', 'train.txt:']),
    ({'data.packing': False, 'data.buckets': (32, 48)}, ['data.buckets']),
    ({'eval.metric': 'lss'}, ["'lss'", "Did you mean 'loss'?"]),
    ({'optimizer.schedule': 'cosin'}, ['optimizer.schedule']),
    ({'optimizer.learning_rate': float('nan')}, ['learning_rate is nan']),
    ({'train.steps': -1}, ['config.train.steps is -1']),
], ids=str)
def test_bad_values_are_named(run_config, tmp_path, changes, parts):
  run_config.update_from_flattened_dict(changes)
  _refused(run_config, tmp_path / 'w', *parts)


_GOOD = '# INPUT\nWhat is 1?\n\n# OUTPUT\nOne.\n\n'


@pytest.mark.parametrize('content, parts', [
    (b'', ['no records in', 'bad.txt']),
    (_GOOD.encode() + b'# INPUT\nCaf\xe9?\n# OUTPUT\nYes\n',
     ['bad.txt:8', '0xE9', 'UTF-8']),
    (_GOOD.encode() + b'# INPUT\nWhy?\n\n# OUTPUT\n\n',
     ['bad.txt:7', 'completion is empty']),
    (_GOOD.encode() + b'# INPUT\nWhy?\n', ['bad.txt:7', 'no # OUTPUT']),
], ids=['empty', 'not UTF-8', 'no completion', 'no output'])
def test_bad_files_are_named_with_their_line(
    run_config, tmp_path, content, parts):
  (tmp_path / 'bad.txt').write_bytes(content)
  run_config.data.train = str(tmp_path / 'bad.txt')
  _refused(run_config, tmp_path / 'w', *parts)


def test_a_missing_file_is_named_with_the_nearest(run_config, tmp_path):
  run_config.data.train = str(tmp_path / 'trian.txt')
  _refused(run_config, tmp_path / 'w', 'does not exist', "'train.txt'")


def test_wrong_columns_of_a_table_are_named(run_config, tmp_path):
  (tmp_path / 'table.csv').write_text('question,answer\nWhy?,So.\n')
  run_config.data.train = str(tmp_path / 'table.csv')
  _refused(run_config, tmp_path / 'w', 'question', 'data.columns')
  run_config.data.columns = 'prompt=question,completion=answer'
  run_config.data.validation = ''
  assert train.main(run_config, str(tmp_path / 'v'), True) == 0


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


def test_a_hash_of_random_weights_is_refused(run_config, tmp_path):
  run_config.model.weights_sha256 = '0' * 64
  _refused(run_config, tmp_path / 'w', 'weights_sha256')


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    run_config, tmp_path):
  run_config.model.vocab_size = 128
  _refused(run_config, tmp_path / 'w', 'vocab')


@pytest.mark.parametrize('changes', [
    {'seed': 2**70}, {'optimizer.b1': 1.0}, {'optimizer.b2': 1.5},
    {'optimizer.learning_rate': float('inf')}, {'model.head_dim': 15},
    {'data.packing': False, 'data.buckets': ('a',)}], ids=str)
def test_values_outside_their_range_are_refused(run_config, tmp_path, changes):
  run_config.update_from_flattened_dict(changes)
  key = list(changes)[-1]
  _refused(run_config, tmp_path / 'w', key)


def test_workdir_in_use_is_refused_with_the_process(run_config, tmp_path):
  held = workdir_lib.lock_workdir(str(tmp_path / 'w'))
  _refused(run_config, tmp_path / 'w', f'in use by process {os.getpid()}')
  held.close()
  run_config.train.steps = 1
  _run(run_config, tmp_path / 'w')


def test_a_refused_run_gives_the_workdir_back(run_config, tmp_path):
  good = run_config.data.train
  run_config.data.train = 'nowhere.txt'
  with pytest.raises(errors.UserError) as error:
    train.main(run_config, str(tmp_path / 'w'), False)
  run_config.data.train = good
  run_config.train.steps = 1
  _run(run_config, tmp_path / 'w')
  assert error.value.fix


def test_signal_handlers_are_put_back(run_config, tmp_path):
  before = signal.getsignal(signal.SIGINT)
  run_config.train.steps = 1
  _run(run_config, tmp_path / 'w')
  assert signal.getsignal(signal.SIGINT) is before


def test_workdir_that_is_a_file_is_refused(run_config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='File exists'):
    train.main(run_config, str(tmp_path / 'file'), False)


def test_workdir_that_cannot_be_written_is_refused(run_config, tmp_path):
  closed = tmp_path / 'closed'
  closed.mkdir(mode=0o500)
  if os.geteuid() == 0:  # To whom the kernel's own folders alone are closed.
    closed = pathlib.Path('/sys')
  with pytest.raises(errors.UserError, match='ermi(ssion denied|tted)'):
    train.main(run_config, str(closed / 'w'), False)


def test_dry_run_audits_and_trains_nothing(run_config, tmp_path, capsys):
  assert train.main(run_config, str(tmp_path / 'w'), True) == 0
  out = capsys.readouterr().out
  assert 'audit: train: 24 examples' in out
  assert 'plan: 6 updates, 2 an epoch of 24 examples x 1' in out
  assert os.listdir(tmp_path / 'w') == ['.lock']


def test_turn_tags_in_a_users_text_stay_text(run_config, tmp_path, capsys):
  run_config.data.train = conftest.write_pairs(tmp_path / 'tags.txt', [
      ('What is <end_of_turn>\n<start_of_turn>model?', 'A tag: <end_of_turn>.'),
      ('What is <bos>?', 'The first token.')])
  run_config.data.update(validation='', max_length=128)
  run_config.train.steps = 2
  _run(run_config, tmp_path / 'w')
  assert '2 with control-token text (kept as ordinary text)' in (
      capsys.readouterr().out)
  tokenizer = base.load_tokenizer(
      run_config.model, weights_of(run_config), 3)
  split = splits.load_splits(
      run_config.data, ('train',), tasks.load('chat'), tokenizer)['train']
  for example in split.examples:
    tokens = example.tokens
    assert [int((tokens == t).sum()) for t in tokenizer.turn_ids] == [2, 2]
    assert int((tokens == tokenizer.bos_id).sum()) == 1


def weights_of(config):
  return base.resolve_weights(config.model)


def test_a_step_that_is_not_finite_is_named(run_config, tmp_path):
  run_config.optimizer.update(learning_rate=1e30, warmup_ratio=0.0)
  with pytest.raises(errors.UserError, match='step 2: loss is nan') as error:
    train.main(run_config, str(tmp_path), False)
  assert 'the last checkpoint is from before' in str(error.value)
  assert sorted(conftest.losses(tmp_path)) == [1]


def test_the_checkpoint_before_a_step_that_is_not_finite_is_whole(
    run_config, tmp_path):
  run_config.optimizer.update(learning_rate=1e30, warmup_ratio=0.0)
  run_config.checkpoint.every = 1
  status, _, err = conftest.run_module(
      'train', *conftest.flags(run_config), f'--workdir={tmp_path / "w"}')
  assert status == 2 and 'step 2: loss is nan' in err
  assert _checkpoints(tmp_path / 'w').steps() == [1]
  assert sample.main(
      None, str(tmp_path / 'w'), base=False, step=1, prompt=['Hi'], system='',
      max_new_tokens=1) == 0


def test_the_advice_after_a_nan_can_be_followed(run_config, tmp_path):
  run_config.optimizer.update(learning_rate=1e30, warmup_ratio=0.0)
  with pytest.raises(errors.UserError) as error:
    train.main(run_config, str(tmp_path), False)
  assert 'init_from' in str(error.value) or '--workdir' in str(error.value)


def test_a_base_that_is_not_finite_stops_at_step_1(run_config, tmp_path):
  def poison(params):
    params['final_norm']['scale'] = jnp.full((32,), jnp.nan)
    return params

  run_config.model.weights = conftest.save_base(
      run_config, tmp_path / 'base', seed=0, change=poison)
  with pytest.raises(errors.UserError, match='step 1: loss is nan'):
    train.main(run_config, str(tmp_path / 'w'), False)
  assert not _checkpoints(tmp_path / 'w').steps()


def test_plain_text_trains(run_config, tmp_path):
  (tmp_path / 'plain.txt').write_text('First line.\nSecond.\n\nAnother one.\n')
  run_config.data.update(train=str(tmp_path / 'plain.txt'), validation='')
  run_config.train.steps = 2
  assert len(conftest.losses(_run(run_config, tmp_path / 'w'))) == 2
