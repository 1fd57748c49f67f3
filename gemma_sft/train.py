"""Fine-tunes a Gemma.

    python -m gemma_sft.train --config=configs/blop.py --workdir=workdirs/blop

A step is `train_step` below plus `loss.py`; a run is `main`, with `batches.py`,
`lora.py` and `state.py`. Started again with the same command, a run goes on
from its last checkpoint and ends with the same bits.
"""

from gemma_sft import cli

if __name__ == '__main__':
  # Before the heavy imports: `run` parses the flags, then imports this module
  # by its name and calls `main`.
  cli.run('gemma_sft.train', 'config', 'workdir', 'dry_run',
          'self_test')

import contextlib
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_sft import batches
from gemma_sft import config as config_lib
from gemma_sft import loss as loss_lib
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora
from gemma_sft.evaluation import judge
from gemma_sft.evaluation import validation
from gemma_sft.monitor import log
from gemma_sft.monitor import metrics
from gemma_sft.monitor import out_of_memory
from gemma_sft.monitor import overflow
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import self_test as self_test_lib
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.monitor import tracking
from gemma_sft.nn import loss_scale as loss_scale_lib
from gemma_sft.run import build
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import hosts
from gemma_sft.run import prepare
from gemma_sft.run import resume
from gemma_sft.run import workdir as workdir_lib

# The step --------------------------------------------------------------------


@functools.partial(
    jax.jit,
    static_argnames=('model', 'optimizer', 'settings', 'max_trained'),
    donate_argnames=('state',))
def train_step(
    state: state_lib.TrainState,
    base: Any,
    batch: dict[str, jax.Array],
    *,
    model: model_lib.Model,
    optimizer: optax.GradientTransformation,
    settings: build.StepSettings,
    max_trained: int,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Applies one update.

  The gradient is that of the mean over all trained tokens of the batch:
  microbatches and hosts add sums, and the division comes once, at the end.

  Args:
    state: With step, adapters (or all weights) and optimizer state; donated.
    base: The frozen weights; None when all weights are trained.
    batch: Arrays (A, B / A, T) from `batches.Batches`.
    model: The architecture.
    optimizer: Optax's.
    settings: See `build.StepSettings`.
    max_trained: Bound on trained tokens, see `head.masked_nll`.

  Returns:
    (the state one step on, {loss, grad_norm, n_trained}).
  """
  grads, nll_sum, n_trained = gradient_sums(
      state.trainable, base, batch, state.step, state.loss_scale, model=model,
      settings=settings, max_trained=max_trained)
  divisor = jnp.maximum(n_trained, 1.0)
  grads = jax.tree.map(lambda g: g / divisor, grads)
  grads = loss_scale_lib.unscaled(grads, state.loss_scale)
  updates, opt_state = optimizer.update(
      grads, state.opt_state, state.trainable)
  new_state = state.replace(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      opt_state=opt_state)
  # float16: an update that is not finite is left out and the scale halved.
  grad_norm, loss = optax.tree.norm(grads), nll_sum / divisor
  new_state, told = loss_scale_lib.keep_finite(
      new_state, state, grad_norm, loss)
  # Without this the compiler may shard adapters as it likes, and the next call
  # would be compiled again.
  new_state = jax.lax.with_sharding_constraint(
      new_state, sharding.tree_shardings(new_state, settings.mesh))
  return new_state, {
      'loss': loss, 'grad_norm': grad_norm, 'n_trained': n_trained, **told}


def gradient_sums(
    trainable: Any,
    base: Any,
    batch: dict[str, jax.Array],
    step: jax.Array,
    loss_scale: loss_scale_lib.LossScale | None = None,
    *,
    model: model_lib.Model,
    settings: build.StepSettings,
    max_trained: int,
) -> tuple[Any, jax.Array, jax.Array]:
  """Returns (gradient of the nll sum, nll sum, trained tokens) of a batch.

  The gradient is that of the sum times the loss scale, where there is one.
  """

  def nll_sum(trainable, microbatch):
    if settings.lora_enabled:
      params, adapters = base, trainable
    else:
      # f32 masters, compute in the device's dtype.
      params, adapters = jax.tree.map(
          lambda leaf: leaf.astype(settings.compute_dtype), trainable), None
    nll, n = loss_lib.batch_nll(
        model, params, microbatch, adapters=adapters,
        lora_scale=settings.lora_scale, dropout=lora.make_dropout(
            settings.dropout, settings.seed, step, microbatch['rows']),
        execution=settings.execution, max_trained=max_trained,
        groups=settings.groups, chunk_size=settings.loss_chunk,
        frozen_head=settings.lora_enabled)
    return loss_scale_lib.scaled(nll, loss_scale), (nll, n)

  def add_microbatch(sums, microbatch):
    (_, (nll, n)), grads = jax.value_and_grad(nll_sum, has_aux=True)(
        trainable, microbatch)
    return jax.tree.map(jnp.add, sums, (grads, nll, n)), None

  zeros = (jax.tree.map(jnp.zeros_like, trainable),
           jnp.float32(0), jnp.float32(0))
  return jax.lax.scan(add_microbatch, zeros, batch)[0]


# The run ---------------------------------------------------------------------


def main(
    config: Any, workdir: str, dry_run: bool = False, self_test: bool = False
) -> int:
  """Runs a config in a workdir; see the module's docstring."""
  cli.require('config', config, '--config=configs/blop.py')
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  config_lib.validate(config)
  tracking.check(config.track.wandb)
  with hosts.joined(), workdir_lib.lock_workdir(workdir):
    run = prepare.prepare(config, workdir, data_only=dry_run)
    if run is None:
      hosts.say('dry run: nothing was trained')
      return 0
    if self_test:
      self_test_lib.check(run, gradient_sums)
    checkpoints = checkpoint_lib.Checkpoints(
        workdir, keep=config.checkpoint.keep, metric=config.eval.metric,
        mode=config.eval.mode)
    # However it ends, a save under way is finished and the handlers go.
    with contextlib.closing(checkpoints), out_of_memory.explained(config), (
        stop_lib.StopRequest(config.deadline_minutes)) as stop:
      finished = train(run, checkpoints, stop)
  return 0 if finished else stop_lib.UNFINISHED


def train(
    run: prepare.Run,
    checkpoints: checkpoint_lib.Checkpoints,
    stop: stop_lib.StopRequest,
) -> bool:
  """Trains until the last step, a stop signal, the deadline or patience.

  Returns whether the run is over: the first and the last of these.
  """
  config, total = run.config, run.total_steps

  # Resume order:
  #   1. the newest whole checkpoint in the workdir,
  #   2. the adapters of another run (config.init_from),
  #   3. fresh.
  state, meta = run.initial_state, None
  if restored := checkpoints.restore_latest(
      resume.abstract_state(run), lambda meta: resume.check_resume(run, meta)):
    state, meta = restored
  elif config.init_from:
    state = resume.init_from(run, config.init_from)
  state = run.enter(state)
  step = meta.step if meta else 0
  record = record_lib.Record(run, step, resumed=meta is not None)
  chain = meta.chain if meta else batches.EMPTY_CHAIN
  tracker = log.Tracker(
      config.eval.metric, config.eval.mode, config.eval.patience,
      best=meta.best if meta else {}, stale=meta.stale if meta else 0)
  iterator = batches.make_iterator(
      run.source, state=meta.data if meta else None)
  writer = metrics.Writer(
      run.workdir, resume_step=step if meta else -1,
      active=jax.process_index() == 0,
      mirror=tracking.start(config.track.wandb, record))
  meter = log.Meter(run, writer, functools.partial(
      overflow.explain, run, gradient_sums))
  programs = log.Programs(train_step)

  eval_every = config.eval.every or run.source.batches_per_epoch
  save_every = config.checkpoint.every or eval_every
  pending = None  # The step that may still be running on the device.
  # Evaluation, checkpoint and log line N describe the weights after N updates.
  while True:
    last, stopping = step == total, stop.requested()
    evaluate = (step % eval_every == 0 or last) and (
        meta is None or step > meta.step)
    if evaluate or last or stopping or step % save_every == 0:
      # Nothing of a step whose loss is not finite is evaluated or kept.
      meter.read(pending, state)
      pending = None
    scores = {}
    if evaluate:
      with meter.paused():
        scores = hosts.from_first(evaluate_state(run, state, step))
        writer.write(step, {f'eval/{k}': v for k, v in scores.items()})
        tracker.update(step, scores)
    finished = last or stopping or tracker.exhausted
    due = finished or (step and step % save_every == 0)
    if due and (meta is None or step > meta.step):
      checkpoints.save(run.leave(state), run.meta(
          step, iterator.get_state(), chain, metrics=scores,
          best=tracker.best, stale=tracker.stale))
    if finished:
      break
    batch = next(iterator)
    arrays = sharding.put_batch(batch, run.mesh)
    with programs.watch(arrays['tokens'].shape, int(batch['max_trained'])):
      state, step_metrics = train_step(
          state, run.base, arrays, model=run.model, optimizer=run.optimizer,
          settings=run.settings, max_trained=int(batch['max_trained']))
    # Read one step late, so that the device never waits for the host.
    meter.read(pending, state)
    step += 1
    chain = batches.extend_chain(chain, batch['digest'].tobytes())
    pending = meter.pending(step, step_metrics, batch, chain)
  checkpoints.wait()
  record.end(step, 'finished' if last else stop.cause if stopping
             else 'patience')
  writer.close()
  hosts.say((stop.reason(step, total) if stopping and not last else '')
           or tracker.reason(step)
           or f'finished {total} updates; batches {chain[:16]}')
  hosts.say(f'best: {tracker.describe()}; checkpoints in {run.workdir}')
  return last or not stopping


def evaluate_state(
    run: prepare.Run, state: state_lib.TrainState, step: int
) -> dict[str, float]:
  """Returns the validation scores of the weights after `step` updates."""
  config, scores = run.config, {}
  if run.validation is not None:
    params, adapters = (run.base, state.trainable) if (
        run.settings.lora_enabled) else (run.merged(state.trainable), None)
    scores = validation.evaluate_loss(
        run.model, params, run.validation, run.mesh, adapters=adapters,
        lora_scale=run.settings.lora_scale, execution=run.settings.execution)
  text = ''.join(f' | {k} {v:.4g}' for k, v in scores.items())
  records = run.splits['validation'].records if 'validation' in (
      run.splits) else []
  records = records[:config.eval.judged if config.eval.judged >= 0 else None]
  answers = []
  if records or config.eval.prompts:
    start = time.monotonic()
    judged, _, answers = judge.judge_records(
        run.model, run.merged(state.trainable), run.tokenizer, run.task,
        records, section=config.eval, seed=config.seed,
        training=run.splits['train'].records)
    if records:
      scores |= {f'judge/{k}': v for k, v in judged.metrics.items()}
      text += ''.join(f' | {k} {v:.4g}' for k, v in judged.metrics.items())
      text += f' | {judged.note}' if judged.note else ''
    text += f' ({metrics.duration(time.monotonic() - start)})'
  if text:
    hosts.say(f'evaluation after {step} updates{text}')
  for prompt, answer in zip(config.eval.prompts, answers):
    hosts.say(log.quote(prompt, answer))
  return scores
