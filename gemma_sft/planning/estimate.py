"""Memory, FLOPs, time and disk of a training step, by arithmetic.

Base, adapters, optimizer and batch are exact: the shapes that a run has, in
their shards. What the forward pass keeps is read off the trace. The rest, what
one block and its gradient need while they are computed, is a model with the
constants below, held within 15 % of five steps compiled for TPUs (README,
"Memory, found by compiling") by tests/planning/estimate_test.py.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.monitor import metrics
from gemma_sft.nn import attention
from gemma_sft.nn import head
from gemma_sft.planning import compile_step
from gemma_sft.planning import hardware
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# By which the estimate may be off: a step that is nearer to the limit is said
# to be uncertain.
MARGIN = 0.15
# Arrays of the MLP's and of the model's width that live while one block's
# gradient is made: gate, up, their product and the cotangents of each.
_OF_MLP, _OF_WIDTH = 6, 4


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a step runs, by kind.

  Attributes:
    base: The frozen weights.
    adapters: Or all weights where all are trained.
    optimizer: Its moments.
    batch: Tokens, targets, masks.
    activations: What the forward pass keeps for the backward pass.
    logits: Of one chunk of the loss.
    rest: Gradients, and what the compiler needs besides.
    limit: What the device has for programs; 0 if that is not known.
    fits: Whether the compiler took it, or the sum is below the limit.
    compiler: Of the peak; '' where it is the estimate.
    added: What the step needs above what lies there before it.
  """

  base: float
  adapters: float
  optimizer: float
  batch: float
  activations: float
  logits: float
  rest: float
  limit: float
  fits: bool
  compiler: str
  added: float

  @property
  def held(self) -> float:
    """Lies there between the steps too."""
    return self.base + self.adapters + self.optimizer + self.batch

  @property
  def peak(self) -> float:
    return self.held + self.activations + self.logits + self.rest


def memory(
    program: compile_step.Program,
    limit: float,
    traced: compile_step.Traced | None = None,
    compiled: compile_step.Compiled | None = None,
) -> Memory:
  """Returns a step's memory.

  Args:
    program: From `compile_step.make_program`.
    limit: Bytes of a device; 0 if not known. The compiler's own comes first.
    traced: From `compile_step.cached`; None estimates what is kept, too.
    compiled: From `compile_step.cached`; None estimates the rest.
  """
  state, groups = program.state, program.settings.groups
  known = dict(
      base=compile_step.local_bytes(program.base),
      adapters=compile_step.local_bytes(state.trainable),
      optimizer=compile_step.local_bytes(state.opt_state),
      batch=compile_step.local_bytes(program.batch))
  kept = traced.kept / groups if traced else 0
  kept = kept or kept_bytes(program)
  logits = _logits(program)
  if compiled is None:
    rest = _working(program)
    peak = sum(known.values()) + kept + logits + rest
    return Memory(
        **known, activations=kept, logits=logits, rest=rest, limit=limit,
        fits=not limit or peak <= limit, compiler='',
        added=kept + logits + rest)
  above = max(0.0, compiled.peak - sum(known.values()))
  # The compiler may find that less has to be kept, or share its place.
  kept = min(kept, above)
  logits = min(logits, above - kept)
  limit = compiled.available or limit
  return Memory(
      **known, activations=kept, logits=logits, rest=above - kept - logits,
      limit=limit,
      fits=compiled.fits and (not limit or compiled.peak <= limit),
      compiler=compiled.compiler, added=compiled.added or above)


def _width(program):
  dtype = jnp.dtype(program.settings.compute_dtype)
  # What float16 products give is float32.
  return 4 if dtype == jnp.float16 else dtype.itemsize


def kept_bytes(program: compile_step.Program) -> float:
  """Returns the estimate of what the forward pass keeps, on one device."""
  config, remat = program.model.config, program.settings.execution.remat
  D, F = config.embed_dim, config.hidden_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  per_token = D  # A block's input.
  if remat != 'block':
    # q, k, v, attention's output, its projection, gate, up, down.
    per_token += 2 * N * H + 2 * K * H + 2 * D + 2 * F
  if remat == 'none':
    # Norms, rotations, activations, products: as much again and a half.
    per_token *= 2.5
  return (per_token * config.num_layers * program.rows * program.length
          * _width(program))


def _logits(program):
  chunks = -(-program.max_trained // program.settings.loss_chunk)
  rows = -(-program.max_trained // chunks)
  V = program.model.config.num_embed
  if program.settings.lora_enabled:
    V = min(V, head.VOCABULARY_BLOCK)
  return 4.0 * rows * V


def _working(program):
  """Gradients, and one block forward and backward."""
  config, settings = program.model.config, program.settings
  tokens, width = program.rows * program.length, _width(program)
  block = tokens * width * (
      _OF_MLP * config.hidden_dim + _OF_WIDTH * config.embed_dim)
  N, T = config.num_heads, program.length
  keys = {'einsum': T * T, 'chunked': min(T, attention.QUERY_CHUNK) * T}.get(
      settings.execution.attention, 0)
  scores = 3 * 4.0 * program.rows * N * keys
  trained = compile_step.local_bytes(program.state.trainable)
  # The sum over microbatches and the gradient of one.
  total = block + scores + 2 * trained
  if not settings.lora_enabled:
    # The copy to compute with, stacked, and its gradient, stacked.
    total += 2 * trained * width / 4 + program.n_embedding * 4
  layers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
      program.weights) if 'layer' in str(path[0])]
  n = sum(leaf.size for leaf in layers) / config.num_layers
  sharded = settings.mesh.shape['fsdp'] * settings.mesh.shape['tensor'] > 1
  if sharded or program.config.model.quantization:
    # A layer's weights in full, and the next one's on their way.
    total += 2 * n * width
  if settings.mesh.devices.flat[0].platform == 'tpu':
    # About half of the packed codes, of all layers at once, get another tiling
    # before the loop: 1.3 GB with a layer's weights for Gemma 3 4B in nf4, 3.5
    # GB for 12B, as libtpu 0.0.50.1 compiles them. int8 stays as it lies.
    total += sum(compile_step.local_bytes(leaf) for leaf in jax.tree.leaves(
        program.base) if leaf.dtype == jnp.uint8) / 2
  return total


# FLOPs and time --------------------------------------------------------------


def needed_flops(
    program: compile_step.Program, *, n_tokens: float, n_trained: float
) -> float:
  """Returns the FLOPs that a step of so many tokens needs, over all devices.

  `metrics.step_flops` and the attention: 4 N H a token and key that it sees
  forward, twice that backward; rows are taken for one example each, so that
  packed ones need less. Nothing that is computed a second time counts.
  """
  weights_ = program.weights
  embedding = program.n_embedding
  tables = weights_['embedder'].get('per_layer_embeddings')
  body = (model_lib.count_params(weights_) - embedding
          - (tables.size if tables is not None else 0))
  config, T = program.model.config, program.length
  keys = 0.0
  for kind in config.attention_types:
    window = config.sliding_window_size
    if kind.name == 'LOCAL_SLIDING' and window and window < T:
      keys += window - window * (window - 1) / (2 * T)
    else:
      keys += (T + 1) / 2
  return metrics.step_flops(
      body_params=body, embedding_params=embedding, n_tokens=n_tokens,
      n_trained=n_trained, frozen_base=program.settings.lora_enabled,
  ) + 12 * config.num_heads * config.head_dim * keys * n_tokens


# Shares of a chip's peak in products: slow and quick. MaxText's pretraining of
# Gemma 3 12B reaches 33 to 38 % on v6e (AI-Hypercomputer/tpu-recipes, PR 100);
# fine-tuning of a 31B with Tunix on v5p 5 % in useful tokens (arXiv
# 2605.25645), four times that if its rows were padded. This project has not
# been timed on a TPU.
ACCELERATOR_SHARES = (0.1, 0.5)
# Of the rate of plain products, measured here: the 270M reached 0.53
# (tests/benchmarks/README.md).
CPU_SHARES = (0.25, 0.8)


@dataclasses.dataclass(frozen=True)
class Seconds:
  """A range of seconds, and what it assumes."""

  quick: float
  slow: float
  assumption: str


def step_seconds(
    program: compile_step.Program, place: hardware.Slice, flops: float
) -> Seconds:
  """Returns the range of a step's time.

  Args:
    program: From `compile_step.make_program`.
    place: Of its devices.
    flops: Counted, of all devices.
  """
  share = flops / program.mesh.size
  if place.chip is None:
    slow, quick = CPU_SHARES
    rate = product_rate(program.settings.compute_dtype)
    return Seconds(
        share / (quick * rate), share / (slow * rate),
        f'{slow:.0%} to {quick:.0%} of the {rate / 1e9:,.0f} GFLOP/s that plain'
        ' products reach here now; measured runs: 53 % on a CPU')
  slow, quick = ACCELERATOR_SHARES
  chip = place.chip
  # Weights are read forward and backward, for each microbatch.
  A = program.config.train.gradient_accumulation_steps
  base = sum(leaf.size * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(program.weights))
  traffic = 2 * A * base / chip.bandwidth
  return Seconds(
      max(share / (quick * chip.peak_flops), traffic),
      max(share / (slow * chip.peak_flops), traffic),
      f'{slow:.0%} to {quick:.0%} of the {chip.peak_flops / 1e12:.3g} TFLOP/s'
      f' of a {chip.name}; compiled or counted, never timed there')


@functools.lru_cache(maxsize=4)
def product_rate(dtype: Any, size: int = 1024) -> float:
  """Returns the FLOP/s of a plain product on the first local device.

  Measured once, so that the runs of one plan or sweep compare.
  """
  x = jnp.ones((size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


# Disk ------------------------------------------------------------------------

FORMATS = ('hf', 'peft', 'gguf-f16', 'gguf-q8_0', 'gguf-q4_k_m')


def checkpoint_bytes(program: compile_step.Program) -> int:
  """Returns the size of one checkpoint."""
  return sum(leaf.size * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(program.state))


def export_bytes(program: compile_step.Program) -> dict[str, int]:
  """Returns the size of what `export` writes, by format."""
  layout = load.make_layout(program.model)
  n_layers = names.n_layers(layout)
  sizes = {}
  for name in FORMATS:
    if name == 'hf':
      shapes = names.file_shapes(layout, 'hf')
      sizes[name] = sum(
          safetensors_file.n_bytes(s, 'bfloat16') for s in shapes.values())
    elif name == 'peft':
      if program.settings.lora_enabled:
        sizes[name] = 4 * model_lib.count_params(program.state.trainable)
    else:
      try:
        sizes[name] = gguf_writer.n_bytes(
            names.file_shapes(layout, 'gguf'), name.removeprefix('gguf-'),
            n_layers)
      except errors.UserError:
        pass  # Not for this model: `export` says why.
  return sizes
