"""The results: agreement of the losses, the table, the figure."""

import dataclasses
import pathlib
import statistics
from typing import Any

import numpy as np

from gemma_sft import pages
from peers import common

TOLERANCES = {'float32': 1e-3, 'bfloat16': 2e-2}  # Relative, of every loss.

# name: (row's title, module, whether it needs PyTorch, remark).
PEERS = {
    'ours': ('**gemma_sft** `train_step`', 'ours', False, ''),
    'peft_completion': (
        'PEFT loop by hand, completion logits', 'peft_loop', True,
        'the strongest peer: head over trained positions only'),
    'peft_full': ('PEFT loop by hand, all logits', 'peft_loop', True, ''),
    'trl': (
        'TRL SFTTrainer + PEFT', 'trl_trainer', True,
        'without Triton it scores every position, and folds entropy and top-1'
        ' accuracy: not its GPU path'),
    'official': (
        'gemma library, its LoRA, all logits', 'official', False,
        'k and v share one A: losses are compared at the first step only'),
    'tunix_loss': (
        "Tunix's default loss, our model", 'ours', False,
        'their loss in our harness: not their model or trainer'),
    'unsloth': ('Unsloth', '', False, '')}


@dataclasses.dataclass
class Outcome:
  """The runs of one peer of `PEERS`."""

  peer: str
  # What its processes printed, one per round.
  results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  problem: str = ''  # Why it was not run or is not shown.

  @property
  def steps(self) -> list[float]:
    """Seconds of all measured steps, sorted."""
    return sorted(s for result in self.results for s in result['step_s'])

  def lowest(self, field: str) -> float:
    """The least of a figure over the rounds."""
    return min(result[field] for result in self.results)


def deviation(outcome: Outcome, ours: Outcome) -> float:
  """Returns the largest relative difference of a loss from ours."""
  expected = np.array(ours.results[0]['losses'])
  n = 1 if outcome.peer == 'official' else len(expected)
  return max(
      float(np.max(np.abs(np.array(r['losses'][:n]) / expected[:n] - 1)))
      for r in outcome.results)


def check_losses(outcomes: list[Outcome], dtype: str) -> list[Outcome]:
  """Hides the speed of every peer whose losses differ from ours."""
  shown = list(outcomes)
  for i, outcome in enumerate(outcomes):
    # `not`, because NaN is not above a limit either.
    if outcome.results and not (
        by := deviation(outcome, outcomes[0])) <= TOLERANCES[dtype]:
      shown[i] = dataclasses.replace(
          outcome,
          problem=f'no speed: its losses differ from ours by {by:.1e}')
  return shown


def ratio(outcome: Outcome, ours: Outcome) -> str:
  """Returns its time over ours: of the best step (range over rounds)."""
  rounds = [min(theirs['step_s']) / min(own['step_s'])
            for theirs, own in zip(outcome.results, ours.results)]
  return (f'{outcome.steps[0] / ours.steps[0]:.2f}x'
          f' ({min(rounds):.2f} to {max(rounds):.2f})')


def markdown(outcomes: list[Outcome], spec: common.Spec,
             machine: dict[str, Any]) -> str:
  """Returns title, table and remarks."""
  ours = outcomes[0]
  peak = max(r['product_gflops'] for o in outcomes for r in o.results)
  unit = 's' if spec.gpu else 'CPU-s'
  work = common.flops(spec) / 1e9
  header = (
      '', f'{unit} a step: best / median / worst', f'tokens/{unit}',
      'time over ours (by round)',
      f'useful GFLOP/{unit}, share of the best product; own product',
      'memory above the weights, MB: steps / with the first',
      f'start to first step done, {unit}', 'losses differ by')
  rows, remarks = [], []
  for outcome in outcomes:
    title, _, _, remark = PEERS[outcome.peer]
    if remark:
      remarks.append(f'- {title}: {remark}.')
    if outcome.problem:
      rows.append((title, outcome.problem, *[''] * (len(header) - 2)))
      continue
    steps, rate = outcome.steps, work / outcome.steps[0]
    if spec.gpu:
      memory = f'{outcome.lowest("device_bytes") / 1e6:,.0f}'
    else:
      later, first = (outcome.lowest(f'peak_{name}_bytes') / 1e6
                      for name in ('steps', 'first'))
      memory = f'{later:,.0f} / {max(later, first):,.0f}'
    rows.append((
        title, f'{steps[0]:.3g} / {statistics.median(steps):.3g}'
        f' / {steps[-1]:.3g}', f'{spec.rows * spec.length / steps[0]:,.0f}',
        '1' if outcome is ours else ratio(outcome, ours),
        f'{rate:.0f}, {rate / peak:.0%};'
        f' {max(r["product_gflops"] for r in outcome.results):.0f}',
        memory, _start(outcome, spec),
        '-' if outcome is ours else f'{deviation(outcome, ours):.0e}'))
  return '\n'.join([
      f'Gemma 3 {spec.shape}, {spec.rows} x {spec.length} tokens, no padding,'
      f' {spec.share:.0%} trained, {spec.dtype}, LoRA rank {common.RANK} on q,'
      f' k, v, o; {machine["device"]}; {len(ours.results)} rounds.',
      f'A step needs {work:.0f} GFLOP; the best product of the same run made'
      f' {peak:.0f} GFLOP/{unit}. Commit {machine["commit"]}.',
      '', pages.table(header, rows), '', *remarks, ''])


def _start(outcome, spec):
  field = 'cold_wall_s' if spec.gpu else 'cold_cpu_s'
  if PEERS[outcome.peer][2]:
    return f'{outcome.lowest(field):.1f}'
  # JAX: the first process filled the cache of compiled programs.
  cold, *warm = (result[field] for result in outcome.results)
  return f'{cold:.1f}' + (
      f'; compiled before: {min(warm):.1f}' if warm else '')


def draw(outcomes: list[Outcome], path: pathlib.Path) -> None:
  """Draws the loss curves over each other."""
  figure, (axes,) = pages.make_figure(width=7, height=4.5)
  shown = [outcome for outcome in outcomes if outcome.results]
  for i, outcome in enumerate(shown):
    losses = outcome.results[0]['losses']
    # Wide to narrow, so that equal curves stay visible.
    axes.plot(
        range(1, len(losses) + 1), losses, label=outcome.peer,
        linewidth=2 * (len(shown) - i), alpha=0.7)
  axes.set(xlabel='step', ylabel='loss (nats a trained token)')
  axes.legend()
  path.write_bytes(pages.to_png(figure))
