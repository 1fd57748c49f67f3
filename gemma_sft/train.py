"""Fine-tunes a Gemma.

    python -m gemma_sft.train --config=configs/blop.py --workdir=workdirs/blop

A step is `train_step` below plus `loss.py`; a run is `main` and `train`.
Started again with the same command, a run resumes from its last checkpoint and
ends with the same bits.
"""

from gemma_sft import cli

if __name__ == '__main__':
  # Before the heavy imports: `run` parses the flags, then imports this module
  # by its name and calls `main`.
  cli.run(
      'gemma_sft.train', cli.CONFIG, cli.WORKDIR,
      cli.switch('dry_run', False, 'Audit the data, print the plan and stop.'),
      cli.switch(
          'self_test', False, 'Before training, compare the gradient of one'
          ' batch as 1xB, Bx1, packed, padded and on one device; stop if they'
          ' differ.'))

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_sft import batches
from gemma_sft import loss as loss_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.evaluation import during_training
from gemma_sft.monitor import log as log_lib
from gemma_sft.monitor import self_test as self_test_lib
from gemma_sft.monitor import session
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.run import prepare
from gemma_sft.run import resume

# The step --------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=('optimizer', 'settings', 'max_trained'),
    donate_argnames=('state',))
def train_step(
    state: state_lib.TrainState, base: Any, batch: dict[str, jax.Array], *,
    optimizer: optax.GradientTransformation, settings: state_lib.StepSettings,
    max_trained: int) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Applies one update; returns the new state and the step's metrics.

  The gradient is that of the mean over all trained tokens of the batch:
  microbatches and hosts add sums, and the division comes once, at the end.
  `base` is None when all weights are trained. `batch` has arrays (A, B / A, T).
  The program is compiled for `settings`, and for a batch's `max_trained`.
  """
  grads, nll_sum, n_trained = gradient_sums(
      state.trainable, base, batch, state.step, state.loss_scale,
      settings=settings, max_trained=max_trained)
  divisor = jnp.maximum(n_trained, 1.0)
  loss = nll_sum / divisor
  grads = state.unscaled(jax.tree.map(lambda g: g / divisor, grads))
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  new_state, scale_metrics = state.updated(
      trainable, opt_state, loss, grad_norm)
  # Without this the compiler may shard the adapters differently, and the next
  # call would compile again.
  new_state = jax.lax.with_sharding_constraint(
      new_state, sharding.tree_shardings(new_state, settings.mesh))
  return new_state, {'loss': loss, 'grad_norm': grad_norm,
                     'n_trained': n_trained, **scale_metrics}


def gradient_sums(
    trainable: Any, base: Any, batch: dict[str, jax.Array], step: jax.Array,
    loss_scale: Any = None, *, settings: state_lib.StepSettings,
    max_trained: int) -> tuple[Any, jax.Array, jax.Array]:
  """Returns (gradient of the nll sum, nll sum, trained tokens) of a batch.

  In float16 the gradient is that of the sum times the loss scale.
  """

  def nll_sum(trainable, microbatch):
    nll, n = loss_lib.batch_nll(
        trainable, base, microbatch, step, settings=settings,
        max_trained=max_trained)
    scaled = nll if loss_scale is None else nll * loss_scale.scale
    return scaled, (nll, n)

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
  with session.entered(config, workdir):
    run = prepare.prepare(config, workdir, data_only=dry_run)
    if run is None:
      log_lib.say('dry run: nothing was trained')
      return 0
    if self_test:
      self_test_lib.check(run, gradient_sums)
    # However the run ends, a save in progress is finished.
    with (contextlib.closing(resume.open_checkpoints(run)) as checkpoints,
          stop_lib.StopRequest(config.deadline_minutes) as stop):
      finished = train(run, checkpoints, stop)
  return 0 if finished else stop_lib.UNFINISHED


def train(run: prepare.Run, checkpoints: Any, stop: stop_lib.StopRequest
          ) -> bool:
  """Trains to the last step, a stop signal, the deadline or end of patience.

  Returns whether the run is over, which it is not after a signal or deadline.
  """
  # Where the run starts, in this order:
  #   1. the newest intact checkpoint in the workdir,
  #   2. the adapters of another run (config.init_from),
  #   3. fresh.
  state, meta = run.initial_state, None
  if restored := resume.from_checkpoint(run, checkpoints):
    state, meta = restored
  elif run.config.init_from:
    state = resume.from_run(run, run.config.init_from)
  state = run.enter(state)
  start = meta.step if meta else -1  # Evaluated and saved before.
  step, chain = (start, meta.chain) if meta else (0, batches.EMPTY_CHAIN)
  iterator = batches.make_iterator(
      run.source, state=meta.data if meta else None)
  log = log_lib.Log(run, meta, train_step, gradient_sums)

  # Evaluation, checkpoint and log line N describe the weights after N updates.
  while True:
    last, stopping = step == run.total_steps, stop.requested()
    evaluate = (step % run.eval_every == 0 or last) and step > start
    save = step and step % run.save_every == 0
    if evaluate or save or last or stopping:
      # A step whose loss is not finite stops here, before it is evaluated or
      # saved.
      log.read(state)
    scores = {}
    if evaluate:
      with log.paused():
        scores = during_training.evaluate(run, state, step)
      log.evaluated(step, scores)
    finished = last or stopping or log.best.exhausted
    if (save or finished) and step > start:
      checkpoints.save(run.leave(state), run.meta(
          step, iterator.get_state(), chain, metrics=scores,
          best=log.best.found, stale=log.best.stale))
    if finished:
      break
    batch = next(iterator)
    arrays = sharding.put_batch(batch, run.mesh)
    with log.watched(batch):
      state, step_metrics = train_step(
          state, run.base, arrays, optimizer=run.optimizer,
          settings=run.settings, max_trained=int(batch['max_trained']))
    log.read(state)  # Of the step before, so that the device never waits.
    step += 1
    chain = batches.extend_chain(chain, batch['digest'].tobytes())
    log.dispatched(step, step_metrics, batch, chain)
  checkpoints.wait()
  log.end(step, chain, stopped=stop if stopping and not last else None)
  return last or not stopping
