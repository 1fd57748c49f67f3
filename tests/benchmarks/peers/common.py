"""The work of every peer: model, weights, adapters, batches; its process.

At once it imports only numpy and safetensors, which every environment has.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any
from typing import Iterator
from typing import Sequence

import numpy as np
from safetensors import numpy as safetensors_numpy

ROOT = pathlib.Path(__file__).resolve().parents[3]
RANK = 16
ALPHA = 16.0  # Factor 1: the official library's adapters have none.
OPTIMIZER = dict(
    learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
N_BATCHES = 2  # Few, so that the loss falls quickly.
WARM_UP = 1  # The first step compiles or fills allocators: shown apart.
# As config.model has it.
MODELS = {
    '270m': dict(name='gemma3_270m'), '1b': dict(name='gemma3_1b'),
    'small': dict(
        name='custom', generation=3, vocab_size=32_768, num_layers=4,
        embed_dim=256, hidden_dim=1024, num_heads=4, num_kv_heads=1,
        head_dim=64)}


@dataclasses.dataclass(frozen=True)
class Spec:
  """One run of one peer, as `peers.py` writes it to a file."""

  peer: str  # Its name in the table.
  shape: str
  rows: int
  length: int  # Tokens of a row; there is no padding.
  share: float  # Of trained positions, which are the last of each row.
  dtype: str  # Of the frozen base and of compute.
  steps: int  # Includes `WARM_UP`.
  gpu: bool  # Use a GPU, and measure by the wall clock.
  work: str  # Folder with the weights.
  attention: str = 'sdpa'  # PyTorch's: or 'eager'.
  autocast: bool = False  # PyTorch, bfloat16: the adapters' products too.
  compiled: bool = False  # By `torch.compile`.
  started: float = 0.0  # Unix time of the start of the process.

  @property
  def n_trained(self) -> int:
    """Trained positions of a row."""
    return round(self.share * self.length)

  def make_model(self) -> Any:
    """Returns the package's model, where JAX is installed."""
    from gemma_sft import model as model_lib

    return model_lib.make_model(**MODELS[self.shape])


def read_spec() -> Spec:
  """Reads the file named on the command line."""
  return Spec(**json.loads(pathlib.Path(sys.argv[1]).read_text()))


def write_weights(spec: Spec) -> None:
  """Writes random weights, adapters and batches for all peers, once."""
  from gemma_sft.weights import architecture
  from gemma_sft.weights import load
  from gemma_sft.weights import names

  folder, model = pathlib.Path(spec.work), spec.make_model()
  random, config = np.random.default_rng(0), model.config
  weights = {  # Norms too: Gemma multiplies by 1 + w.
      name: random.standard_normal(shape, np.float32) * np.float32(0.02)
      for name, shape in names.file_shapes(
          load.weight_layout(model), 'hf').items()}
  safetensors_numpy.save_file(
      weights, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(architecture.hf_config(
      config, 3, vocab_size=config.num_embed, dtype='float32', eos_ids=[1],
      bos_id=2, pad_id=0) | {'use_cache': False}))
  # PEFT's kaiming_uniform(a=sqrt(5)); the B are zeros.
  inputs = dict.fromkeys('qkv', config.embed_dim) | {
      'o': config.num_heads * config.head_dim}
  adapters = {
      f'{i}.{name}': random.uniform(-1, 1, (RANK, n_in)) / np.sqrt(n_in)
      for i in range(config.num_layers) for name, n_in in inputs.items()}
  # Id 0 is padding for the official library.
  ids = random.integers(
      1, config.num_embed, (N_BATCHES, spec.rows, spec.length), np.int32)
  np.savez(folder / 'work.npz', ids=ids, **adapters)


def load_adapters(spec: Spec) -> Iterator[tuple[int, str, np.ndarray]]:
  """Yields (layer, one of q k v o, A of shape (R, in))."""
  for key, array in np.load(pathlib.Path(spec.work, 'work.npz')).items():
    if key != 'ids':
      layer, name = key.split('.')
      yield int(layer), name, array.astype(np.float32)


def load_ids(spec: Spec) -> np.ndarray:
  """Returns the token ids (N_BATCHES, B, T)."""
  return np.load(pathlib.Path(spec.work, 'work.npz'))['ids']


def labels(spec: Spec, ids_BT: np.ndarray) -> np.ndarray:
  """Returns the ids with -100 where they are not trained, not shifted."""
  out_BT = np.full_like(ids_BT, -100)
  out_BT[:, -spec.n_trained:] = ids_BT[:, -spec.n_trained:]
  return out_BT


def flops(spec: Spec) -> float:
  """Returns the FLOPs of the products that a step needs at least.

  Per token the body's forward pass takes 2 N and its activation gradient 2 N,
  except for the first layer's q, k and v, whose input needs no gradient.
  Attention counts visible keys, and its backward pass 2.5 times its forward
  pass. The head takes 4 D V per trained position. Gradients of frozen weights,
  recomputation and adapters (below 1 %) do not count.
  """
  c = spec.make_model().config
  q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  body = 4 * c.num_layers * c.embed_dim * (2 * q + 2 * kv + 3 * c.hidden_dim)
  body -= 2 * c.embed_dim * (q + 2 * kv)
  seen = np.minimum(np.arange(spec.length) + 1, [
      [c.sliding_window_size if 'LOCAL' in kind.name else spec.length]
      for kind in c.attention_types]).mean(axis=1).sum()
  head = 4 * c.embed_dim * c.num_embed
  return spec.rows * (
      spec.length * (body + 3.5 * 4 * q * seen) + spec.n_trained * head)


def run_process(
    command: Sequence[str], variables: dict[str, str], *, gpu: bool = False,
    **options: Any) -> dict[str, Any]:
  """Runs a command and returns the JSON of its last line, and the `load`.

  Without a GPU it gets one thread on one core. `variables` join its
  environment.
  """
  variables = os.environ | variables | {
      'PYTHONPATH': f'{ROOT / "tests/benchmarks"}:{ROOT}'}
  if not gpu:
    variables |= dict(
        JAX_PLATFORMS='cpu', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1',
        MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1',
        XLA_FLAGS='--xla_cpu_multi_thread_eigen=false'
        ' intra_op_parallelism_threads=1')
  load = os.getloadavg()[0]
  done = subprocess.run(
      command, env=variables, stdout=subprocess.PIPE, text=True, check=True,
      preexec_fn=None if gpu else (
          lambda: os.sched_setaffinity(0, {core()})), **options)
  return json.loads(done.stdout.strip().splitlines()[-1]) | {'load': load}


def core() -> int:
  """Returns the core of every process, the last that this one may use."""
  return max(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
  """Returns what the figures depend on besides the settings."""
  cpu = re.search(r'model name\s*: (.*)', pathlib.Path(
      '/proc/cpuinfo').read_text())
  return {
      'cpu': cpu[1] if cpu else 'unknown', 'cores': os.cpu_count(),
      'load': os.getloadavg(), 'time': time.strftime('%FT%TZ', time.gmtime()),
      'commit': output('git', 'describe', '--always', '--dirty') or 'unknown'}


def output(*command: str) -> str:
  """Returns what a program prints; '' if there is none of this name."""
  try:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {'GIT_OPTIONAL_LOCKS': '0'}).stdout.strip()
  except OSError:
    return ''


def say(text: str) -> None:
  """Prints a line of progress."""
  print(text, file=sys.stderr, flush=True)
