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
    'shape', '270m', sorted(common.SHAPES), 'The model.')
_ROWS = flags.DEFINE_integer('rows', 2, 'Rows of a batch.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 256, 'Tokens of a row.', lower_bound=8)
_SHARE = flags.DEFINE_float(
    'share', 0.25, 'Share of the tokens that are trained.', 0.01, 0.99)
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', sorted(table.TOLERANCES), 'Of the base and of compute.')
_STEPS = flags.DEFINE_integer(
    'steps', 6, 'Optimizer steps per process; the first is not timed.',
    lower_bound=6)
_ROUNDS = flags.DEFINE_integer(
    'rounds', 3, 'Processes per peer, in turn.', lower_bound=1)
_PEERS = flags.DEFINE_list(
    'peers', [p for p in table.PEERS if p != 'ours'], 'Peers to compare with.')
_OUT = flags.DEFINE_string('out', None, 'Folder for results.', required=True)
_CORE = flags.DEFINE_integer(
    'core', -1, 'The core that every process is pinned to; -1: the last one.')
_DEVICE = flags.DEFINE_enum(
    'device', 'auto', ['auto', 'cpu', 'gpu'], 'auto: a GPU where there is one.')
_TORCH_PYTHON = flags.DEFINE_string(
    'torch_python', '', 'Interpreter that has torch, transformers, peft and'
    ' trl; default: .venv-runtimes beside the package, or else this one.')
_LAYERS = flags.DEFINE_string('layers', 'auto', 'Ours: config.model.layers.')
_KERNEL = flags.DEFINE_string(
    'kernel', 'auto', 'Ours: config.model.attention.')
_TRIALS = flags.DEFINE_bool(
    'trials', True, "Try the PyTorch peers' settings first, take the fastest.")


def start(spec: common.Spec, module: str, torch: bool) -> dict:
  """Runs one peer in its own process and returns what it printed."""
  spec = dataclasses.replace(spec, started=time.time())
  work = pathlib.Path(spec.work)
  (work / 'spec.json').write_text(json.dumps(dataclasses.asdict(spec)))
  try:
    return common.run_process(
        [_torch_python() if torch else sys.executable, '-W', 'ignore', '-m',
         f'peers.{module}', str(work / 'spec.json')],
        {'GEMMA_SFT_CACHE': str(work / 'cache'),
         # The package sets its own folder; the other JAX peers use this one.
         'JAX_COMPILATION_CACHE_DIR': str(work / 'cache-peers'),
         'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'},
        gpu=spec.gpu, core=_CORE.value, stderr=subprocess.PIPE)
  except subprocess.CalledProcessError as error:
    pathlib.Path(_OUT.value, f'{spec.peer}.log').write_text(error.stderr)
    lines = error.stderr.strip().splitlines() or [f'exit {error.returncode}']
    raise RuntimeError(f'not run: {lines[-1][:120]}') from error


def _torch_python() -> str:
  beside = common.ROOT / '.venv-runtimes/bin/python'
  return _TORCH_PYTHON.value or (
      str(beside) if beside.exists() else sys.executable)


def choose_torch_settings(spec: common.Spec) -> tuple[common.Spec, list[dict]]:
  """Returns the spec with the fastest settings of the completion loop.

  Tried: both attention implementations, `torch.compile` with the faster one
  and, in bfloat16, autocast.
  """
  best, trials = float('inf'), []
  for change in (
      {}, {'attention': 'eager'},
      *([{'autocast': True}] if spec.dtype == 'bfloat16' else []),
      {'compiled': True}):
    candidate = dataclasses.replace(spec, **change)
    settings = ' '.join(
        [candidate.attention] + ['autocast'] * candidate.autocast
        + ['torch.compile'] * candidate.compiled)
    try:
      seconds = min(start(
          dataclasses.replace(candidate, peer='peft_completion', steps=4),
          'peft_loop', True)['step_s'])
      trials.append({'settings': settings, 'best_s': seconds})
    except RuntimeError as error:
      seconds = float('inf')
      trials.append({'settings': settings, 'problem': str(error)})
    common.say(f'  trial {settings}: {seconds:.3g} s')
    # A gain below 3 % does not justify the less plain settings.
    if seconds < 0.97 * best:
      spec, best = candidate, seconds
  return spec, trials


def describe_machine(spec: common.Spec) -> dict:
  """Returns what the figures depend on besides the settings."""
  machine = common.describe_machine()
  if spec.gpu:
    return machine | {'core': None, 'device': common.output(
        'nvidia-smi', '--query-gpu=name', '--format=csv,noheader')}
  return machine | {
      'core': common.pinned_core(_CORE.value),
      'device': f'one core of {machine["cores"]} of {machine["cpu"]}'}


def main(argv):
  if unknown := set(_PEERS.value) - set(table.PEERS):
    raise app.UsageError(
        f'--peers: {", ".join(sorted(unknown))}; there are'
        f' {", ".join(table.PEERS)}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  gpu = _DEVICE.value == 'gpu' or (
      _DEVICE.value == 'auto' and bool(glob.glob('/dev/nvidia[0-9]*')))
  with tempfile.TemporaryDirectory(dir=out, prefix='work-') as work:
    spec = common.Spec(
        peer='', shape=_SHAPE.value, rows=_ROWS.value, length=_LENGTH.value,
        share=_SHARE.value, dtype=_DTYPE.value, steps=_STEPS.value, gpu=gpu,
        work=work, layers=_LAYERS.value, kernel=_KERNEL.value)
    for outcomes, machine, trials in measure(spec):
      # After every round, so that an interrupted command leaves a table.
      text, agreed = write_report(out, spec, outcomes, machine, trials)
  print(text)
  return 0 if agreed else 1


def write_report(out, spec, outcomes, machine, trials) -> tuple[str, bool]:
  """Writes the three files; returns the table, and whether losses agree."""
  machine['load_after'] = os.getloadavg()
  outcomes = table.check_losses(outcomes, spec.dtype)
  text = table.markdown(outcomes, spec, machine)
  (out / 'table.md').write_text(text)
  (out / 'results.json').write_text(json.dumps({
      'machine': machine, 'trials': trials,
      'gflop_of_a_step': common.flops(spec) / 1e9,
      'peers': [dataclasses.asdict(o) for o in outcomes]}, indent=1))
  table.draw(outcomes, out / 'loss_curves.png')
  return text, not any(o.problem.startswith('no speed') for o in outcomes)


def measure(spec: common.Spec):
  """Yields (outcomes, ours first; machine; trials) after every round."""
  machine = describe_machine(spec)
  common.say('random weights')
  common.write_weights(spec)
  outcomes = [table.Outcome(peer) for peer in (
      'ours', *(p for p in _PEERS.value if p != 'ours'))]
  for outcome in outcomes:
    if outcome.peer == 'unsloth':
      outcome.problem = 'not run: ' + (
          'there is no script for it yet' if spec.gpu else 'no GPU')
  torch_spec, trials = spec, []
  if _TRIALS.value and any(
      table.PEERS[o.peer][2] and not o.problem for o in outcomes):
    torch_spec, trials = choose_torch_settings(spec)
  for i in range(_ROUNDS.value):
    for outcome in outcomes:
      peer = outcome.peer
      if outcome.problem:
        continue
      _, module, torch, _ = table.PEERS[peer]
      chosen = dataclasses.replace(torch_spec if torch else spec, peer=peer)
      if peer == 'trl':
        # It chooses autocast itself, and its fused head needs a plain model.
        chosen = dataclasses.replace(chosen, compiled=False, autocast=False)
      try:
        result = start(chosen, module, torch)
      except RuntimeError as error:
        outcome.problem = str(error)
        common.say(f'round {i + 1}, {peer}: {error}')
        continue
      outcome.results.append(result)
      common.say(f'round {i + 1}, {peer}: best {min(result["step_s"]):.3g} s,'
                 f' load {result["load"]:.1f}')
    if outcomes[0].problem:
      raise SystemExit(f'ours {outcomes[0].problem}; see ours.log')
    yield outcomes, machine, trials


if __name__ == '__main__':
  app.run(main)
