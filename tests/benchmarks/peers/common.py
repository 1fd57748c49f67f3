"""The work of every peer: shape, weights, adapters, batches; its process.

Imports only numpy and safetensors, which every peer's environment has.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any
from typing import Iterator
from typing import Sequence

import numpy as np
from safetensors import numpy as safetensors_numpy

from gemma_sft.weights import names

ROOT = pathlib.Path(__file__).resolve().parents[3]
RANK = 16
ALPHA = 16.0  # Factor 1: the official library's adapters have none.
OPTIMIZER = dict(
    learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
N_BATCHES = 2  # Few, so that the loss falls quickly.
WARM_UP = 1  # The first step compiles or fills allocators: shown apart.


@dataclasses.dataclass(frozen=True)
class Shape:
  """A text-only Gemma 3 with five local layers per global one."""

  vocab: int
  layers: int
  width: int
  hidden: int
  heads: int
  kv_heads: int
  head_dim: int
  window: int = 512

  def layer_types(self) -> list[str]:
    """Returns transformers' names of the layers' attention."""
    return ['full_attention' if i % 6 == 5 else 'sliding_attention'
            for i in range(self.layers)]

  def projections(self) -> dict[str, tuple[int, int]]:
    """Returns {name: (out, in)} of a layer's attention."""
    q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
    return {'q': (q, self.width), 'k': (kv, self.width),
            'v': (kv, self.width), 'o': (self.width, q)}

  def body(self) -> int:
    """Returns the weights of all projections and MLPs."""
    attention = sum(n * m for n, m in self.projections().values())
    return self.layers * (attention + 3 * self.width * self.hidden)


SHAPES = {
    'small': Shape(32768, 4, 256, 1024, 4, 1, 64),
    '270m': Shape(262144, 18, 640, 2048, 4, 1, 256),
}


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
  # PyTorch peers.
  attention: str = 'sdpa'  # Or 'eager'.
  autocast: bool = False  # In bfloat16: the adapters' products too.
  compiled: bool = False  # By `torch.compile`.
  # Ours: config.model.layers and config.model.attention.
  layers: str = 'auto'
  kernel: str = 'auto'
  started: float = 0.0  # Unix time of the start of the process.

  @property
  def n_trained(self) -> int:
    """Trained positions of a row."""
    return round(self.share * self.length)

  @property
  def dimensions(self) -> Shape:
    """The model's."""
    return SHAPES[self.shape]


def read_spec() -> Spec:
  """Reads the file named on the command line."""
  return Spec(**json.loads(pathlib.Path(sys.argv[1]).read_text()))


def write_weights(spec: Spec) -> None:
  """Writes random weights, adapters and batches for all peers, once."""
  folder = pathlib.Path(spec.work)
  random = np.random.default_rng(0)
  shape = spec.dimensions
  weights = {  # Norms too: Gemma multiplies by 1 + w.
      name: random.standard_normal(dimensions, np.float32) * np.float32(0.02)
      for name, dimensions in names.file_shapes(
          weight_layout(shape), 'hf').items()}
  safetensors_numpy.save_file(
      weights, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(transformers_config(shape)))

  # PEFT's kaiming_uniform(a=sqrt(5)); the B are zeros.
  adapters = {
      f'{i}.{name}': random.uniform(-1, 1, (RANK, n_in)) / np.sqrt(n_in)
      for i in range(shape.layers)
      for name, (_, n_in) in shape.projections().items()}
  # Id 0 is padding for the official library.
  ids = random.integers(
      1, shape.vocab, (N_BATCHES, spec.rows, spec.length), np.int32)
  np.savez(folder / 'work.npz', ids=ids, **adapters)


def weight_layout(shape: Shape) -> names.WeightLayout:
  """Returns the names and shapes of the weights."""
  return names.make_weight_layout(
      generation=3, layers=shape.layers, vocab=shape.vocab, embed=shape.width,
      hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads,
      head_dim=shape.head_dim, transposed_gating=True)


def transformers_config(shape: Shape) -> dict[str, Any]:
  """Returns what transformers reads as config.json."""
  def rope(theta):
    return {'rope_type': 'default', 'rope_theta': theta}

  return dict(
      model_type='gemma3_text', architectures=['Gemma3ForCausalLM'],
      vocab_size=shape.vocab, hidden_size=shape.width,
      intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
      num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
      head_dim=shape.head_dim, query_pre_attn_scalar=shape.head_dim,
      sliding_window=shape.window, layer_types=shape.layer_types(),
      rope_parameters={'full_attention': rope(1e6),
                       'sliding_attention': rope(1e4)},
      hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
      attention_dropout=0.0, use_cache=False, tie_word_embeddings=True,
      pad_token_id=0, eos_token_id=1, bos_token_id=2)


def load_weights(spec: Spec) -> dict[str, np.ndarray]:
  """Returns {transformers' name: f32 array}."""
  return safetensors_numpy.load_file(
      pathlib.Path(spec.work, 'model.safetensors'))


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
  shape = spec.dimensions
  first = sum(n * m for name, (n, m) in shape.projections().items()
              if name != 'o')
  body = 4 * shape.body() - 2 * first
  seen = np.minimum(np.arange(spec.length) + 1, [
      [shape.window if kind == 'sliding_attention' else spec.length]
      for kind in shape.layer_types()]).mean(axis=1).sum()
  attention = 3.5 * 4 * shape.heads * shape.head_dim * seen
  head = 4 * shape.width * shape.vocab
  return spec.rows * (
      spec.length * (body + attention) + spec.n_trained * head)


def run_process(
    command: Sequence[str], variables: dict[str, str], *, gpu: bool = False,
    core: int = -1, **options: Any
) -> dict[str, Any]:
  """Runs a command and returns the JSON of its last line.

  Without a GPU it gets one thread on one core (see `pinned_core`). `variables`
  join its environment, and the `load` of the machine before it the result.

  Raises:
    subprocess.CalledProcessError: if it fails.
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
          lambda: os.sched_setaffinity(0, {pinned_core(core)})), **options)
  return json.loads(done.stdout.strip().splitlines()[-1]) | {'load': load}


def pinned_core(core: int) -> int:
  """Returns the number of a core; -1 is the last one."""
  return core if core >= 0 else max(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
  """Returns what the figures depend on besides the settings."""
  cpu = next((line.partition(':')[2].strip() for line in
              pathlib.Path('/proc/cpuinfo').read_text().splitlines()
              if line.startswith('model name')), platform.machine())
  changed = output('git', 'status', '--porcelain', 'gemma_sft')
  return {
      'cpu': cpu, 'cores': os.cpu_count(), 'load': os.getloadavg(),
      'commit': (output('git', 'rev-parse', '--short', 'HEAD') or 'unknown')
                + (' with changes' if changed else ''),
      'time': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds')}


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
