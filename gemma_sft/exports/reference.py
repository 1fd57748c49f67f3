"""Outputs of the JAX model, with which every exported file is compared."""

import dataclasses
import functools
from typing import Any
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import chat
from gemma_sft import model as model_lib
from gemma_sft.exports import divergence
from gemma_sft.generation import generate

# Positions compared at the end of each prompt. One forward pass gives them all,
# and a fault in a mask or in RoPE shows in late positions.
POSITIONS = 4
GREEDY_TOKENS = 24
# Prompts are padded to multiples of this, to compile fewer programs.
_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Reference:
  """Logits and greedy answers on fixed prompts, and rendered conversations."""

  prompts: list[list[int]]  # Token ids.
  # For each prompt, f32 (n, V) at its last n <= POSITIONS positions.
  logits: list[np.ndarray]
  greedy: list[list[int]]  # Answers without the token that ends them.
  # For each answer, f32 (n + 1, V) after 0 to n of its tokens: if a runtime's
  # answer differs, these show whether the model was near a tie.
  along_greedy: list[np.ndarray]
  # (name, messages with the roles of Hugging Face, token ids).
  conversations: list[tuple[str, list[dict[str, str]], list[int]]]


def make_reference(
    model: model_lib.Model, params: Any, tokenizer: chat.Tokenizer,
    examples: Sequence[chat.Example]) -> Reference:
  """Runs the model on the fixed prompts and on parts of its own data.

  The weights are float32, with the adapters merged in. Each example becomes a
  prompt that ends in the middle of the trained tokens.
  """
  window = model.config.sliding_window_size
  prompts = divergence.prompts(tokenizer, window) + [
      _beginning(example) for example in examples]
  with jax.default_matmul_precision('highest'):
    greedy = generate.generate(
        model, params, prompts, generate.Sampling(max_new_tokens=GREEDY_TOKENS),
        stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
        batch_size=len(prompts))
    greedy = [list(map(int, tokens)) for tokens in greedy]
    logits = [_next_logits(model, params, ids, tokens, tokenizer.vocab_size)
              for ids, tokens in zip(prompts, greedy)]
  # The one position that both have is the last of the prompt.
  ends = [min(len(ids), POSITIONS) for ids in prompts]
  return Reference(
      prompts, [rows_nV[:end] for rows_nV, end in zip(logits, ends)], greedy,
      [rows_nV[end - 1:] for rows_nV, end in zip(logits, ends)],
      [(name, messages, _render(messages, tokenizer))
       for name, messages in divergence.template_conversations()])


def _beginning(example: chat.Example) -> list[int]:
  trained = np.flatnonzero(example.loss_mask)
  return example.tokens[:trained[len(trained) // 2]].tolist()


def _render(messages, tokenizer: chat.Tokenizer) -> list[int]:
  """Returns the tokens that training makes of a conversation."""
  turns = [
      chat.Message({'assistant': 'model'}.get(m['role'], m['role']),
                   m['content']) for m in messages]
  if turns[-1].role == 'user':
    return chat.render_prompt(turns, tokenizer)
  return chat.render(turns, tokenizer).tokens.tolist()


def _next_logits(model, params, ids, answer, vocab_size) -> np.ndarray:
  """Returns f32 logits (n, V) from POSITIONS before a prompt's end onwards."""
  n, first = len(ids) + len(answer), max(len(ids) - POSITIONS, 0)
  T = -(-(len(ids) + GREEDY_TOKENS) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  tokens_1T = np.zeros((1, T), np.int32)
  tokens_1T[0, :n] = [*ids, *answer]
  return np.asarray(_logits(
      model, params, tokens_1T, n, first, vocab_size))[:n - first]


@functools.partial(jax.jit, static_argnames=('model', 'vocab_size'))
def _logits(model, params, tokens_1T, length, first, vocab_size):
  positions_1T = jnp.arange(tokens_1T.shape[1])[None]
  x_1TD = model_lib.hidden_states(
      model, params, tokens_1T, positions_1T,
      (positions_1T < length).astype(jnp.int32))
  x_nD = jax.lax.dynamic_slice_in_dim(
      x_1TD[0], first, POSITIONS + GREEDY_TOKENS)
  return model_lib.logits(model, params, x_nD)[:, :vocab_size]
