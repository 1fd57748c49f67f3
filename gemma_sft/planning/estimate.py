"""Memory, FLOPs, time and disk of a training step, by arithmetic.

The sizes of base, adapters, optimizer and batch are exact: they are the shapes
of a real run, per shard. What the forward pass saves for the backward pass is
read off the trace. The rest, what one block and its gradient need while they
are computed, is a model with the constants below; a test holds it within 15 %
of five steps that were compiled for TPUs (tests/planning/estimate_test.py).
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import progress
from gemma_sft.monitor import metrics
from gemma_sft.nn import attention
from gemma_sft.nn import head
from gemma_sft.planning import compile_step
from gemma_sft.planning import hardware
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# Error of the estimate: a step that is nearer to the limit counts as uncertain.
MARGIN = 0.15
# Arrays that live while the gradient of one block is computed: of the MLP's
# width gate, up, their product and the cotangent of each, and of the model's.
_OF_MLP_WIDTH, _OF_MODEL_WIDTH = 6, 4


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a step runs, by kind."""

  base: float  # The frozen weights.
  adapters: float  # What is trained: all weights, without LoRA.
  optimizer: float  # Its moments.
  batch: float  # Tokens, targets, masks.
  activations: float  # What the forward pass saves for the backward pass.
  logits: float  # Of one chunk of the loss.
  rest: float  # Gradients, and what the compiler needs besides.
  limit: float  # What the device leaves to programs; 0 if unknown.
  fits: bool  # By the compiler, or by the limit.
  compiler: str  # That found the peak; '' if the peak is the estimate.
  added: float  # What the step needs above resident memory.

  @property
  def resident(self) -> float:
    """What is in memory between steps too."""
    return self.base + self.adapters + self.optimizer + self.batch

  @property
  def peak(self) -> float:
    return self.resident + self.activations + self.logits + self.rest


def memory(
    program: compile_step.Program, limit: float,
    traced: compile_step.Traced | None = None,
    compiled: compile_step.Compiled | None = None) -> Memory:
  """Returns a step's memory; estimates what was not traced or compiled.

  A limit that the compiler names replaces `limit`.
  """
  resident = dict(
      base=compile_step.local_bytes(program.base),
      adapters=compile_step.local_bytes(program.state.trainable),
      optimizer=compile_step.local_bytes(program.state.opt_state),
      batch=compile_step.local_bytes(program.batch))
  activations = traced.residuals / program.settings.groups if traced else 0
  activations = activations or residual_bytes(program)
  logits = _logits_bytes(program)
  if compiled is None:
    rest = _working_bytes(program)
    added = activations + logits + rest
    return Memory(
        **resident, activations=activations, logits=logits, rest=rest,
        limit=limit, fits=not limit or sum(resident.values()) + added <= limit,
        compiler='', added=added)
  temporary = max(0.0, compiled.peak - sum(resident.values()))
  # The compiler may save less than the trace shows, or reuse its memory.
  activations = min(activations, temporary)
  logits = min(logits, temporary - activations)
  limit = compiled.available or limit
  return Memory(
      **resident, activations=activations, logits=logits,
      rest=temporary - activations - logits, limit=limit,
      fits=compiled.fits and (not limit or compiled.peak <= limit),
      compiler=compiled.compiler, added=compiled.added or temporary)


def _item_size(program):
  """Returns the bytes of an activation."""
  dtype = jnp.dtype(program.settings.compute_dtype)
  # Products of float16 give float32.
  return 4 if dtype == jnp.float16 else dtype.itemsize


def residual_bytes(program: compile_step.Program) -> float:
  """Returns an estimate of what the forward pass saves, on one device."""
  config, remat = program.model.config, program.settings.execution.remat
  D, F = config.embed_dim, config.hidden_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  per_token = D  # A block's input.
  if remat != 'block':
    # q, k, v, attention's output, its projection, gate, up, down.
    per_token += 2 * N * H + 2 * K * H + 2 * D + 2 * F
  if remat == 'none':
    # Norms, rotations, activations, products: 1.5 times as much again.
    per_token *= 2.5
  return (per_token * config.num_layers * program.rows * program.length
          * _item_size(program))


def _logits_bytes(program):
  n_chunks = -(-program.max_trained // program.settings.loss_chunk)
  tokens = -(-program.max_trained // n_chunks)
  V = program.model.config.num_embed
  if program.settings.lora_enabled:
    V = min(V, head.VOCABULARY_BLOCK)
  return 4.0 * tokens * V


def _working_bytes(program):
  """Estimates the gradients, and one block forward and backward."""
  config, settings = program.model.config, program.settings
  tokens, item_size = program.rows * program.length, _item_size(program)
  block = tokens * item_size * (
      _OF_MLP_WIDTH * config.hidden_dim + _OF_MODEL_WIDTH * config.embed_dim)
  N, T = config.num_heads, program.length
  per_head = {
      'einsum': T * T, 'chunked': min(T, attention.QUERY_CHUNK) * T,
  }.get(settings.execution.attention, 0)
  scores = 3 * 4.0 * program.rows * N * per_head
  trained = compile_step.local_bytes(program.state.trainable)
  # The sum over microbatches and the gradient of one.
  total = block + scores + 2 * trained
  if not settings.lora_enabled:
    # The stacked copy in the compute dtype, and its stacked gradient.
    total += 2 * trained * item_size / 4 + program.n_embedding * 4
  layers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
      program.weights) if 'layer' in str(path[0])]
  per_layer = sum(leaf.size for leaf in layers) / config.num_layers
  sharded = settings.mesh.shape['fsdp'] * settings.mesh.shape['tensor'] > 1
  if sharded or program.config.model.quantization:
    # A layer's full weights, while the next layer's are gathered.
    total += 2 * per_layer * item_size
  if settings.mesh.devices.flat[0].platform == 'tpu':
    # Before the loop, about half of the packed codes of all layers are copied
    # into another tiling: with one layer's weights 1.3 GB for Gemma 3 4B in
    # nf4 and 3.5 GB for 12B, as libtpu 0.0.50.1 compiles them. int8 is not.
    total += sum(compile_step.local_bytes(leaf) for leaf in jax.tree.leaves(
        program.base) if leaf.dtype == jnp.uint8) / 2
  return total


# FLOPs and time --------------------------------------------------------------


def needed_flops(
    program: compile_step.Program, *, n_tokens: float, n_trained: float
) -> float:
  """Returns the FLOPs that a step of so many tokens needs, over all devices.

  `metrics.step_flops` plus the attention: 4 N H per token and visible key
  forward, twice that backward. Each row counts as one example, so packed rows
  need less. Recomputation does not count.
  """
  n_weights = model_lib.count_params(program.weights)
  tables = program.weights['embedder'].get('per_layer_embeddings')
  n_tables = tables.size if tables is not None else 0
  config, T = program.model.config, program.length
  visible_keys = 0.0
  for kind in config.attention_types:
    window = config.sliding_window_size
    if kind.name == 'LOCAL_SLIDING' and window and window < T:
      visible_keys += window - window * (window - 1) / (2 * T)
    else:
      visible_keys += (T + 1) / 2
  return metrics.step_flops(
      body_params=n_weights - program.n_embedding - n_tables,
      embedding_params=program.n_embedding, n_tokens=n_tokens,
      n_trained=n_trained, frozen_base=program.settings.lora_enabled,
  ) + 12 * config.num_heads * config.head_dim * visible_keys * n_tokens


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

  def times(self, n: float) -> 'Seconds':
    return Seconds(n * self.quick, n * self.slow, self.assumption)

  def show(self) -> str:
    """Returns '3 m 20 s to 2 h 05 m'."""
    return f'{progress.duration(self.quick)} to {progress.duration(self.slow)}'


def step_seconds(
    program: compile_step.Program, target: hardware.Slice, flops: float
) -> Seconds:
  """Returns the range of a step's time; its FLOPs are over all devices."""
  flops /= program.mesh.size
  if target.chip is None:
    slow, quick = CPU_SHARES
    rate = product_rate(program.settings.compute_dtype)
    return Seconds(
        flops / (quick * rate), flops / (slow * rate),
        f'{slow:.0%} to {quick:.0%} of the {rate / 1e9:,.0f} GFLOP/s that plain'
        ' products reach here now; measured runs: 53 % on a CPU')
  slow, quick = ACCELERATOR_SHARES
  chip = target.chip
  # Each microbatch reads the weights forward and backward.
  n_bytes = sum(leaf.size * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(program.weights))
  A = program.config.train.gradient_accumulation_steps
  reading = 2 * A * n_bytes / chip.bandwidth
  return Seconds(
      max(flops / (quick * chip.peak_flops), reading),
      max(flops / (slow * chip.peak_flops), reading),
      f'{slow:.0%} to {quick:.0%} of the {chip.peak_flops / 1e12:.3g} TFLOP/s'
      f' of a {chip.name}; calculated, never timed there')


@functools.lru_cache(maxsize=4)
def product_rate(dtype: Any, size: int = 1024) -> float:
  """Returns the FLOP/s of a plain product on the first local device.

  Measured once, so that the runs of one plan or sweep are comparable.
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

def checkpoint_bytes(program: compile_step.Program) -> int:
  """Returns the size of one checkpoint."""
  return sum(leaf.size * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(program.state))


def export_bytes(program: compile_step.Program) -> dict[str, int]:
  """Returns {format: size of what `export` writes} of the usual formats."""
  layout = load.weight_layout(program.model)
  sizes = {'hf': sum(safetensors_file.n_bytes(shape, 'bfloat16') for shape in
                     names.file_shapes(layout, 'hf').values())}
  if program.settings.lora_enabled:
    sizes['peft'] = 4 * model_lib.count_params(program.state.trainable)
  for kind in ('f16', 'q8_0', 'q4_k_m'):
    # Not every model has such a file; `export` says why.
    with contextlib.suppress(errors.UserError):
      sizes[f'gguf-{kind}'] = gguf_writer.n_bytes(
          names.file_shapes(layout, 'gguf'), kind, names.n_layers(layout))
  return sizes
