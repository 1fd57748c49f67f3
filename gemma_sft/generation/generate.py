"""Batched generation with a key-value cache.

Prompts are padded on the left to a multiple of a bucket, so that all rows write
to the same slot of the cache; positions count from each row's first token. The
weights have the adapters merged in.
"""

import dataclasses
import functools
from typing import Any
from typing import Callable
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import model as model_lib

# Tokens decoded at a time, between checks for stop texts and for streaming.
_CHUNK = 16
_PROMPT_BUCKET = 64
# The cache has room for a multiple of so many new tokens, because each length
# needs a compilation.
_NEW_BUCKET = 128
# Once at most 1/4 of a batch's rows are unfinished, they continue in a batch of
# their own. Each size needs a compilation, so 1/2 would not pay.
_SHRINK = 4
# Most prompt tokens of a batch. Keys and values of 65,536 tokens are 2.4 GB for
# the 270M model in float32; 96 prompts of 2,500 tokens at once took 15 GB.
_MAX_PROMPT_TOKENS = 65_536


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen."""

  temperature: float = 0.0  # Divides the logits; 0 takes the likeliest token.
  top_k: int = 0  # Keeps the k likeliest tokens; 0 keeps all.
  top_p: float = 1.0  # Keeps the likeliest tokens that add up to p.
  # Divides positive logits of recent tokens and multiplies negative ones (CTRL,
  # arXiv 1909.05858).
  repetition_penalty: float = 1.0
  # How many tokens are recent, prompt included; 64 as in llama.cpp and Ollama.
  repetition_window: int = 64
  max_new_tokens: int = 256


def generate(
    model: model_lib.Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    vocab_size: int,
    batch_size: int = 16,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    is_done: Callable[[int, list[int]], bool] = lambda i, tokens: False,
    on_answer: Callable[[int, list[int]], None] = lambda i, tokens: None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[list[int]]:
  """Returns the new tokens of each prompt, without the stop token.

  They depend on the prompt and, when sampling, on the seed and the row's id,
  not on the other rows.

  Args:
    prompts: Token ids, BOS first.
    vocab_size: Of the tokenizer; the embedding may have more rows.
    batch_size: Rows at a time, at most; it is halved for long prompts and for
      the last few.
    row_ids: One for each prompt; their indices if None.
    is_done: Called every few tokens with (index of the prompt, its tokens so
      far); True ends the row.
    on_answer: Called with (index of the prompt, its tokens) after its batch.
    progress: Called every few tokens with the number of answers made, to which
      an unfinished one adds its share of the longest possible.
  """
  answers: list[list[int]] = [[] for _ in prompts]
  # Sorted by length, so that less is padded.
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batch_size = min(batch_size, len(prompts))
  finished = 0
  while finished < len(order):
    rows = batch_size
    while rows > 1 and (
        -(-rows // 2) >= len(order) - finished
        or rows * len(prompts[order[finished:finished + rows][-1]])
        > _MAX_PROMPT_TOKENS):
      rows = -(-rows // 2)  # Few sizes, as each is compiled.
    numbers = order[finished:finished + rows]
    finished += len(numbers)
    _generate_batch(
        model, params, [prompts[i] for i in numbers], numbers,
        numbers if row_ids is None else [row_ids[i] for i in numbers], answers,
        sampling, tuple(stop_ids), vocab_size, rows, seed, is_done,
        lambda missing, finished=finished: progress(finished - missing))
    for i in numbers:
      on_answer(i, answers[i])
  return answers


def _generate_batch(
    model, params, prompts, numbers, row_ids, answers, sampling, stop_ids,
    vocab_size, batch_size, seed, is_done, show_missing):
  longest = max(len(p) for p in prompts)
  T = -(-longest // _PROMPT_BUCKET) * _PROMPT_BUCKET
  n_chunks = -(-sampling.max_new_tokens // _CHUNK)
  n_new = -(-sampling.max_new_tokens // _NEW_BUCKET) * _NEW_BUCKET
  # The number of tokens is decided here, so it must not cause a compilation.
  choice = dataclasses.replace(sampling, max_new_tokens=0)
  tokens_BT = np.zeros((batch_size, T), np.int32)
  mask_BT = np.zeros((batch_size, T), bool)
  for r, prompt in enumerate(prompts):
    tokens_BT[r, T - len(prompt):] = prompt
    mask_BT[r, T - len(prompt):] = True
  # Rows that only fill the batch have one token: attention needs one.
  mask_BT[len(prompts):, -1] = True
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed),
      jnp.asarray([*row_ids, *([0] * (batch_size - len(row_ids)))], jnp.uint32))
  carry = _prefill(
      model, params, tokens_BT, mask_BT, n_new, keys_B, choice, vocab_size)
  open_rows = set(range(len(prompts)))
  for chunk in range(n_chunks):
    if not open_rows:
      break
    size = 1 << (len(open_rows) - 1).bit_length()  # A power of two.
    if size * _SHRINK <= len(keys_B):
      rows = sorted(open_rows)
      carry, keys_B = _take_rows(
          (carry, keys_B), np.resize(np.asarray(rows, np.int32), size))
      numbers = [numbers[r] for r in rows]
      open_rows = set(range(len(rows)))
    carry, new_BC = _decode_chunk(
        model, params, carry, keys_B, choice, vocab_size)
    new_BC = np.asarray(new_BC)
    for r in sorted(open_rows):
      answer = answers[numbers[r]]
      for token in new_BC[r]:
        if token in stop_ids or len(answer) == sampling.max_new_tokens:
          open_rows.discard(r)
          break
        answer.append(int(token))
      if is_done(numbers[r], answer):
        open_rows.discard(r)
    show_missing(len(open_rows) * (1 - (chunk + 1) / n_chunks))


@jax.jit
def _take_rows(tree, rows_B):
  """Returns these rows of all arrays (B, ...), and scalars unchanged."""
  return jax.tree.map(lambda x: x[rows_B] if x.ndim else x, tree)


@functools.partial(
    jax.jit, static_argnames=('model', 'n_new', 'sampling', 'vocab_size'))
def _prefill(
    model, params, tokens_BT, mask_BT, n_new, keys_B, sampling, vocab_size):
  """Runs the prompts; returns the carry of `_decode_chunk`."""
  B, T = tokens_BT.shape
  positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
  dtype = model_lib.embedding(params).dtype
  if dtype == jnp.float16:
    dtype = jnp.float32  # As the attention is then, see `float16`.
  cache = model.config.init_cache(
      batch_size=B, dtype=dtype, cache_length=T + n_new)
  filled_BS = jnp.concatenate([mask_BT, jnp.zeros((B, n_new), bool)], axis=1)
  causal_TS = jnp.arange(T)[:, None] >= jnp.arange(T + n_new)[None]
  logits_BV, cache = model_lib.decode(
      model, params, tokens_BT, positions_BT,
      filled_BS[:, None, :] & causal_TS[None], cache)
  W = sampling.repetition_window
  recent_BW = jnp.where(mask_BT, tokens_BT, -1)[:, -W:]
  recent_BW = jnp.pad(recent_BW, ((0, 0), (W - recent_BW.shape[1], 0)),
                      constant_values=-1)
  next_B = _choose(logits_BV[:, :vocab_size], recent_BW, keys_B, 0, sampling)
  return dict(
      cache=cache, filled=filled_BS, recent=recent_BW, token=next_B,
      position=positions_BT[:, -1] + 1, slot=jnp.int32(T), made=jnp.int32(1))


@functools.partial(
    jax.jit, static_argnames=('model', 'sampling', 'vocab_size'),
    donate_argnames=('carry',))
def _decode_chunk(model, params, carry, keys_B, sampling, vocab_size):
  """Decodes `_CHUNK` more tokens; returns (carry, tokens (B, _CHUNK)).

  The carry holds the next token to return. Rows that have stopped continue
  until the chunk ends; the caller drops their tokens.
  """
  def one(carry, _):
    filled_BS = carry['filled'].at[:, carry['slot']].set(True)
    recent_BW = jnp.concatenate(
        [carry['recent'][:, 1:], carry['token'][:, None]], axis=1)
    logits_BV, cache = model_lib.decode(
        model, params, carry['token'][:, None], carry['position'][:, None],
        filled_BS[:, None, :], carry['cache'])
    next_B = _choose(
        logits_BV[:, :vocab_size], recent_BW, keys_B, carry['made'], sampling)
    new = dict(
        cache=cache, filled=filled_BS, recent=recent_BW, token=next_B,
        position=carry['position'] + 1, slot=carry['slot'] + 1,
        made=carry['made'] + 1)
    return new, carry['token']

  carry, tokens_CB = jax.lax.scan(one, carry, None, length=_CHUNK)
  return carry, tokens_CB.T


def _choose(logits_BV, recent_BW, keys_B, made, sampling):
  """Returns the next token of each row."""
  if sampling.repetition_penalty != 1.0:
    B, V = logits_BV.shape
    seen_BV = jnp.zeros((B, V), bool).at[
        jnp.arange(B)[:, None], recent_BW].set(True, mode='drop',
                                               wrap_negative_indices=False)
    penalty = sampling.repetition_penalty
    logits_BV = jnp.where(
        seen_BV,
        jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty),
        logits_BV)
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k:
    kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=1)
    # Keep a token while those before it have not reached p.
    keep_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV < sampling.top_p
    least_B1 = jnp.min(
        jnp.where(keep_BV, sorted_BV, jnp.inf), axis=1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, made)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
