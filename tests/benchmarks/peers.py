"""Compares the training speed of `train_step` and its peers on equal work.

    python tests/benchmarks/peers.py --shape=270m --rows=2 --length=256 \
        --share=0.25 --dtype=float32 --rounds=3 --out=FOLDER

Prints one table; see README.md in this folder for its rows and rules.
"""

import dataclasses
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
from peers import common
from peers import table

_SHAPE = flags.DEFINE_enum(
    'shape', '270m', sorted(common.MODELS), 'The model.')
_ROWS = flags.DEFINE_integer('rows', 2, 'Rows of a batch.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 256, 'Tokens of a row.', lower_bound=8)
_SHARE = flags.DEFINE_float(
    'share', 0.25, 'Share of the tokens that are trained.', 0.01, 0.99)
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', sorted(table.TOLERANCES), 'Of the base and of compute.')
_ROUNDS = flags.DEFINE_integer(
    'rounds', 3, 'Processes per peer, in turn.', lower_bound=1)
_PEERS = flags.DEFINE_list(
    'peers', [p for p in table.PEERS if p != 'ours'], 'Peers to compare with.')
_OUT = flags.DEFINE_string('out', None, 'Folder for results.', required=True)
_DEVICE = flags.DEFINE_enum(
    'device', 'auto', ['auto', 'cpu', 'gpu'], 'auto: a GPU where there is one.')
_TORCH_PYTHON = flags.DEFINE_string(
    'torch_python', '', 'Interpreter that has torch, transformers, peft and'
    ' trl; default: .venv-runtimes beside the package, or else this one.')


def start(spec: common.Spec, module: str, torch: bool) -> dict:
  """Runs one peer in its own process and returns what it printed."""
  spec = dataclasses.replace(spec, started=time.time())
  file = pathlib.Path(spec.work, 'spec.json')
  file.write_text(json.dumps(dataclasses.asdict(spec)))
  beside = common.ROOT / '.venv-runtimes/bin/python'
  python = sys.executable
  if torch and (_TORCH_PYTHON.value or beside.exists()):
    python = _TORCH_PYTHON.value or str(beside)
  try:
    return common.run_process(
        [python, '-W', 'ignore', '-m', f'peers.{module}', str(file)],
        {'GEMMA_SFT_CACHE': f'{spec.work}/cache',
         # The package sets its own folder; the other JAX peers use this one.
         'JAX_COMPILATION_CACHE_DIR': f'{spec.work}/cache-peers',
         'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'},
        gpu=spec.gpu, stderr=subprocess.PIPE)
  except subprocess.CalledProcessError as error:
    pathlib.Path(_OUT.value, f'{spec.peer}.log').write_text(error.stderr)
    lines = error.stderr.strip().splitlines() or [f'exit {error.returncode}']
    raise RuntimeError(f'not run: {lines[-1][:120]}') from error


def choose_torch_settings(spec: common.Spec) -> tuple[common.Spec, list[dict]]:
  """Returns the spec with the fastest settings of the completion loop.

  Tried: both attention implementations, `torch.compile` with the faster one
  and, in bfloat16, autocast.
  """
  best, trials = float('inf'), []
  changes = [{}, {'attention': 'eager'}, {'compiled': True}]
  if spec.dtype == 'bfloat16':
    changes.insert(2, {'autocast': True})
  for change in changes:
    candidate = dataclasses.replace(
        spec, peer='peft_completion', steps=4, **change)
    trial = {name: getattr(candidate, name)
             for name in ('attention', 'autocast', 'compiled')}
    try:
      trial['best_s'] = min(start(candidate, 'peft_loop', True)['step_s'])
      # A gain below 3 % does not justify the less plain settings.
      if trial['best_s'] < 0.97 * best:
        spec, best = dataclasses.replace(spec, **change), trial['best_s']
    except RuntimeError as error:
      trial['problem'] = str(error)
    common.say(f'  trial {trial}')
    trials.append(trial)
  return spec, trials


def take_turn(
    outcome: table.Outcome, spec: common.Spec, torch_spec: common.Spec) -> str:
  """Runs a peer once and returns what to tell."""
  _, module, torch, _ = table.PEERS[outcome.peer]
  chosen = dataclasses.replace(
      torch_spec if torch else spec, peer=outcome.peer)
  if outcome.peer == 'trl':
    # It chooses autocast itself, and its fused head needs a plain model.
    chosen = dataclasses.replace(chosen, compiled=False, autocast=False)
  try:
    result = start(chosen, module, torch)
  except RuntimeError as error:
    outcome.problem = str(error)
    return outcome.problem
  outcome.results.append(result)
  return f'best {min(result["step_s"]):.3g} s, load {result["load"]:.1f}'


def main(_):
  if unknown := set(_PEERS.value) - set(table.PEERS):
    raise app.UsageError(
        f'--peers: {", ".join(sorted(unknown))}; there are'
        f' {", ".join(table.PEERS)}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  gpu = _DEVICE.value == 'gpu' or (
      _DEVICE.value == 'auto' and bool(glob.glob('/dev/nvidia[0-9]*')))
  outcomes = [table.Outcome(peer) for peer in dict.fromkeys(
      ['ours', *_PEERS.value])]
  for outcome in outcomes:
    if outcome.peer == 'unsloth':
      outcome.problem = 'not run: ' + (
          'there is no script for it yet' if gpu else 'no GPU')
  machine, trials = common.describe_machine(), []
  machine['device'] = (
      common.output('nvidia-smi', '--query-gpu=name', '--format=csv,noheader')
      if gpu else f'one core of {machine["cores"]} of {machine["cpu"]}')
  with tempfile.TemporaryDirectory(dir=out, prefix='work-') as work:
    spec = torch_spec = common.Spec(
        peer='', shape=_SHAPE.value, rows=_ROWS.value, length=_LENGTH.value,
        share=_SHARE.value, dtype=_DTYPE.value, steps=6, gpu=gpu, work=work)
    common.write_weights(spec)
    if any(table.PEERS[o.peer][2] for o in outcomes):
      torch_spec, trials = choose_torch_settings(spec)
    for i in range(_ROUNDS.value):
      for outcome in outcomes:
        if not outcome.problem:
          told = take_turn(outcome, spec, torch_spec)
          common.say(f'round {i + 1}, {outcome.peer}: {told}')
      if outcomes[0].problem:
        raise SystemExit(f'ours {outcomes[0].problem}; see ours.log')
      machine['load_after'] = os.getloadavg()
      shown = table.check_losses(outcomes, spec.dtype)
      text = table.markdown(shown, spec, machine)
      # After every round, so that an interrupted command leaves a table.
      (out / 'table.md').write_text(text)
      (out / 'results.json').write_text(json.dumps({
          'machine': machine, 'trials': trials,
          'gflop_of_a_step': common.flops(spec) / 1e9,
          'peers': [dataclasses.asdict(o) for o in shown]}, indent=1))
      table.draw(shown, out / 'loss_curves.png')
  print(text)
  return int(any(o.problem.startswith('no speed') for o in shown))


if __name__ == '__main__':
  app.run(main)
