"""Writes metrics.jsonl and TensorBoard files; formats the progress line."""

import json
import math
import os
import time
from typing import Any
from typing import Mapping

import jax

from gemma_sft import errors
from gemma_sft import pages
from gemma_sft import progress

# Dense bf16 FLOP/s of a chip, from the vendors' data sheets.
PEAK_FLOPS = {
    'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA A100': 312e12,
    'NVIDIA L4': 121e12, 'Tesla T4': 65e12,
    'TPU v2': 23e12, 'TPU v3': 61e12, 'TPU v4': 275e12,
    'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12,
    'TPU v5': 459e12, 'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
}


def peak_flops() -> float | None:
  """Returns the peak FLOP/s of all devices, or None if it is not known."""
  kind = jax.devices()[0].device_kind
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAK_FLOPS[name] * jax.device_count()
  return None


def step_flops(
    *, body_params: int, embedding_params: int, n_tokens: float,
    n_trained: float, frozen_base: bool) -> float:
  """Returns the FLOPs that a step needs, without attention and adapters.

  2 per weight and token in the forward pass, 2 for the gradient of the
  activations and, when all weights are trained, 2 for theirs. The head runs on
  trained tokens only. Recomputation does not count.
  """
  per_weight = 4 if frozen_base else 6
  return per_weight * (body_params * n_tokens + embedding_params * n_trained)


class Writer:
  """Appends metrics of a run to metrics.jsonl and TensorBoard files."""

  def __init__(self, workdir: str, *, resume_step: int, active: bool = True,
               mirror: Any = None):
    """Opens the files.

    Lines of steps after `resume_step` are dropped, because a run that was
    killed after its last checkpoint repeats those steps. All hosts but the
    first are not `active`, and write nothing. `mirror` (`tracking.Mirror`), if
    given, gets the same numbers.
    """
    self._active, self._mirror = active, mirror
    if not active:
      return
    from tensorboardX import SummaryWriter

    path = os.path.join(workdir, 'metrics.jsonl')
    kept = [line for line in read_jsonl(path) if line['step'] <= resume_step]
    pages.write(path, ''.join(json.dumps(line) + '\n' for line in kept))
    self._file = open(path, 'a', encoding='utf-8')
    self._board = SummaryWriter(
        os.path.join(workdir, 'tensorboard'), purge_step=resume_step + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers (and texts, to the JSON alone) of a step."""
    if not self._active:
      return
    line = {'step': step, 'time': round(time.time(), 3), **values}
    numbers = {name: value for name, value in values.items()
               if isinstance(value, (int, float))}
    try:
      self._file.write(json.dumps(line) + '\n')
      self._file.flush()
      for name, value in numbers.items():
        self._board.add_scalar(name, value, step)
    except OSError as error:
      raise errors.UserError(
          f'metrics cannot be written: {error.strerror} ({self._file.name})',
          'room on the disk',
          'make room and start the same command again: it resumes from the'
          ' last checkpoint') from error
    if self._mirror:
      self._mirror.write(step, numbers)

  def close(self) -> None:
    if self._active:
      self._file.close()
      self._board.close()
    if self._mirror:
      self._mirror.close()


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines file.

  A half-written last line, which a kill can leave, is ignored.
  """
  if not os.path.exists(path):
    return []
  rows = []
  with open(path, encoding='utf-8') as file:
    for line in file:
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


def progress_line(
    *, step: int, total_steps: int, loss: float, grad_norm: float,
    tokens_per_second: float, flops_per_second: float, seconds_left: float
) -> str:
  """Returns the line that a training run prints."""
  peak = peak_flops()
  share = f'{100 * flops_per_second / peak:.1f} % of peak | ' if peak else ''
  width = len(str(total_steps))
  return (f'step {step:{width}d}/{total_steps} | loss {loss:.4f} |'
          f' grad norm {grad_norm:.3f} | {tokens_per_second:,.0f} tokens/s |'
          f' {share}{progress.duration(seconds_left)} left')


def summarise(nll_sum: float, n_tokens: float, n_bytes: int, n_characters: int
              ) -> dict[str, float]:
  """Returns loss, perplexity, bits per byte and per character of the answers.

  `nll_sum` is the sum of -ln p over their tokens, terminators included. Bits
  per UTF-8 byte can be compared between models with different tokenizers;
  perplexities per token cannot.
  """
  loss, bits = nll_sum / n_tokens, nll_sum / math.log(2)
  return {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)),
          'bits_per_byte': bits / max(1, n_bytes),
          'bits_per_character': bits / max(1, n_characters)}
