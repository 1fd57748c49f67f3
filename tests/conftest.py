"""Eight CPU devices, strict shapes and a small config, for every test."""

import functools
import os
import pathlib
import signal
import subprocess
import sys

# These have to be set before any test module imports JAX.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8')

import jaxtyping

# Checks the shape annotations of these modules while they are traced.
_HOOK = jaxtyping.install_import_hook(
    ['gemma_sft.loss', 'gemma_sft.model', 'gemma_sft.nn.head'],
    'beartype.beartype')

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from sentencepiece import sentencepiece_model_pb2

from configs import tiny as tiny_config
from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import model as model_lib
from gemma_sft.monitor import metrics
from gemma_sft.run import base
from gemma_sft.run import devices
from gemma_sft.weights import load
from gemma_sft.weights import tokenizer_file

# No bfloat16 of this CPU's own: exact numbers are compared.
devices._CPU_INFO = os.devnull

# Broadcasting (1, T) to (B, T) by accident would give a wrong sum silently.
jax.config.update('jax_numpy_rank_promotion', 'raise')


def _allow_rank_promotion(cls):
  """Allows rank promotion in Gemma 4 blocks, which scale by a (1,) array."""
  strict = cls.__call__

  @functools.wraps(strict)
  def call(*args, **kwargs):
    with jax.numpy_rank_promotion('allow'):
      return strict(*args, **kwargs)

  cls.__call__ = call


model_lib.import_gemma()
from gemma.gm.nn.gemma4 import _modules as modules4

_allow_rank_promotion(modules4.Block)


# Two layers, one local and one global, with grouped queries. The window is
# shorter than the rows of the tests.
DIMENSIONS = dict(
    vocab_size=512, num_layers=2, embed_dim=32, hidden_dim=48, num_heads=4,
    num_kv_heads=2, head_dim=16, sliding_window=8, local_layers_per_global=1)


@pytest.fixture(params=(1, 2, 3, 4), ids=lambda g: f'gemma{g}')
def model(request) -> model_lib.Model:
  """Returns a tiny model, of each generation in turn."""
  return model_lib.make_model(
      'custom', generation=request.param, **DIMENSIONS)


def make_params(model: model_lib.Model, seed: int = 0):
  """Returns random f32 weights, large enough that softcaps and norms matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32),
      model_lib.abstract_params(model))


def make_tokenizer(generation: int) -> chat.Tokenizer:
  """Returns the built-in byte tokenizer with the turn tags of a generation."""
  if generation != 4:
    return chat.Tokenizer(
        tokenizer_file.byte_tokenizer(generation), generation)
  proto = sentencepiece_model_pb2.ModelProto.FromString(
      tokenizer_file.byte_tokenizer(3))
  # The ids of the turn tags are those of Gemma 4; the other two are arbitrary.
  for token, piece in ((7, '<|image>'), (8, '<audio|>'), (105, '<|turn>'),
                       (106, '<turn|>')):
    proto.pieces[token].piece = piece
  return chat.Tokenizer(proto.SerializeToString(), 4)


@pytest.fixture
def tokenizer() -> chat.Tokenizer:
  """Returns the built-in byte tokenizer with the turn tags of Gemma 3."""
  return chat.Tokenizer(tokenizer_file.byte_tokenizer(3), 3)


@pytest.fixture
def config(tmp_path):
  """Returns `configs/tiny.py` on six records, unlocked for changes."""
  config = tiny_config.get_config()
  config.task = 'chat'
  config.data.update(
      train=write_pairs(tmp_path / 'train.txt', _pairs(1, 5)), test='',
      validation=write_pairs(tmp_path / 'validation.txt', _pairs(5, 7)),
      max_length=64)
  return config


# Whole runs -------------------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parent.parent
# launch/runtimes.sh makes this environment with torch, transformers and peft.
RUNTIME_PYTHON = os.environ.get('GEMMA_SFT_RUNTIME_PYTHON') or str(
    ROOT / '.venv-runtimes' / 'bin' / 'python')


def _pairs(start, stop):
  return [(f'What is {i} and {i}?', f'It is {2 * i}.')
          for i in range(start, stop)]


def write_pairs(path: pathlib.Path, pairs) -> str:
  """Writes prompts and answers as # INPUT / # OUTPUT; returns the path."""
  path.write_text(''.join(
      f'# INPUT\n{p}\n\n# OUTPUT\n{c}\n\n' for p, c in pairs), 'utf-8')
  return str(path)


@pytest.fixture
def run_config(config, tmp_path):
  """Returns `config` for whole runs: 3 epochs of 2 batches, 2 examples a row.

  It generates nothing, because generation would take most of the time.
  """
  config.data.update(
      train=write_pairs(tmp_path / 'train.txt', _pairs(1, 25)),
      validation=write_pairs(tmp_path / 'validation.txt', _pairs(25, 27)),
      max_length=80)
  config.eval.update(every=3, judged=0, prompts=(), metric='loss', mode='min')
  config.model.dtype = 'float32'  # In processes of their own too.
  return config


@pytest.fixture(autouse=True)
def _signal_handlers():
  """Restores the signal handlers that `train.train` replaces."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(n) for n in numbers]
  yield
  for number, handler in zip(numbers, before):
    signal.signal(number, handler)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """Drops the compiled programs of a test module.

  Each holds memory maps, and Linux allows a process 65,530 of them. Without
  this a worker has crashed when it ran out of maps, in an unrelated test.
  """
  yield
  jax.clear_caches()


def flags(config) -> list[str]:
  """Returns the flags that turn `configs/tiny.py` into this config."""
  tiny = dict(config_lib.leaves(tiny_config.get_config()))
  changed = {k: v for k, v in config_lib.leaves(config) if tiny[k] != v}
  return ['--config=configs/tiny.py', *(
      f'--config.{k}={tuple(v) if isinstance(v, list) else v}'
      for k, v in changed.items())]


def start(module: str, *arguments: str, devices: int = 8, **options):
  """Starts `python -m gemma_sft.<module>` as a user would."""
  environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      **options.pop('env', {})}
  return subprocess.Popen(
      [sys.executable, '-m', f'gemma_sft.{module}', *arguments], cwd=ROOT,
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True, **options)


def finish(process, stdin: str | None = None) -> tuple[int, str, str]:
  """Waits for a process; returns (exit status, stdout, stderr)."""
  out, err = process.communicate(stdin, timeout=240)
  return process.returncode, out, err


def run_module(module: str, *arguments: str, **options):
  """Runs an entry point; returns (exit status, stdout, stderr)."""
  return finish(start(module, *arguments, **options))


def train_rows(workdir) -> list[dict]:
  """Returns the lines of metrics.jsonl that training steps wrote."""
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return [row for row in rows if 'loss' in row]


def losses(workdir) -> dict[int, float]:
  """Returns {step: training loss}."""
  return {row['step']: row['loss'] for row in train_rows(workdir)}


def saved_state(workdir, step: int) -> dict[str, np.ndarray]:
  """Returns {path: array} of a checkpoint, read with Orbax only."""
  path = pathlib.Path(workdir).resolve() / 'checkpoints' / str(step) / 'state'
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(path)
  return {jax.tree_util.keystr(p): np.asarray(leaf)
          for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_base(config, path: pathlib.Path, *, seed: int, change=None) -> str:
  """Writes random base weights of a config's model as a checkpoint.

  `change` maps the tree of arrays to the one that is written.
  """
  model = base.load_model(config.model)
  params = load.load_params(
      load.resolve('random', ''), model_lib.abstract_params(model),
      dtype=jnp.float32, seed=seed)
  if change is not None:
    params = change(params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.resolve(), params)
  return str(path)
