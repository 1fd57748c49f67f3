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
  """Logits and greedy answers on fixed prompts, and rendered conversations.

  Attributes:
    prompts: Token ids.
    logits: For each prompt, f32 (n, V) at its last n <= POSITIONS positions.
    greedy: For each prompt, the tokens of the answer, without the one that
      ends it.
    along_greedy: For each prompt, f32 (n + 1, V) along those n tokens. Where a
      runtime's answer differs, these show whether the model was near a tie.
    conversations: (name, messages with the roles of Hugging Face, token ids).
  """

  prompts: list[list[int]]
  logits: list[np.ndarray]
  greedy: list[list[int]]
  along_greedy: list[np.ndarray]
  conversations: list[tuple[str, list[dict[str, str]], list[int]]]

  def logits_along_greedy(self, prompt: int, n: int) -> np.ndarray:
    """Returns logits (V,) after a prompt and n tokens of its greedy answer."""
    return self.along_greedy[prompt][n]


def make_reference(
    model: model_lib.Model,
    params: Any,
    tokenizer: chat.Tokenizer,
    examples: Sequence[chat.Example] = (),
) -> Reference:
  """Runs the model on the fixed prompts and on parts of its own data.

  Args:
    model: From `make_model`.
    params: Weights with the adapters merged in, float32.
    tokenizer: The model's tokenizer.
    examples: Of the domain that the model was tuned on. Each becomes a prompt:
      it is cut in the middle of the trained tokens.
  """
  window = model.config.sliding_window_size
  prompts = divergence.prompts(tokenizer, window) + [
      _beginning(example) for example in examples]
  with jax.default_matmul_precision('highest'):
    logits = [
        _next_logits(model, params, ids, tokenizer.vocab_size)
        for ids in prompts]
    greedy = generate.generate(
        model, params, prompts,
        generate.Sampling(max_new_tokens=GREEDY_TOKENS),
        stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
        batch_size=len(prompts))
    greedy = [list(map(int, tokens)) for tokens in greedy]
    along_greedy = [
        _next_logits(model, params, [*ids, *tokens], tokenizer.vocab_size,
                    positions=len(tokens) + 1)
        for ids, tokens in zip(prompts, greedy)]
  return Reference(
      prompts, logits, greedy, along_greedy,
      [(name, messages, _render(messages, tokenizer))
       for name, messages in divergence.template_conversations()])


def _beginning(example: chat.Example) -> list[int]:
  trained = np.flatnonzero(example.loss_mask)
  return example.tokens[:trained[len(trained) // 2]].tolist()


def _render(
    messages: Sequence[dict[str, str]], tokenizer: chat.Tokenizer
) -> list[int]:
  """Returns the tokens that training makes of a conversation."""
  turns = [
      chat.Message({'assistant': 'model'}.get(m['role'], m['role']),
                   m['content'])
      for m in messages]
  if turns[-1].role == 'user':
    return chat.render_prompt(turns, tokenizer)
  return chat.render(turns, tokenizer).tokens.tolist()


def _next_logits(
    model: model_lib.Model,
    params: Any,
    ids: Sequence[int],
    vocab_size: int,
    positions: int = POSITIONS,
) -> np.ndarray:
  """Returns f32 logits (n, V) at the last n positions of a prompt."""
  T = -(-len(ids) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  tokens_1T = np.zeros((1, T), np.int32)
  tokens_1T[0, :len(ids)] = ids
  return np.asarray(_logits(
      model, params, tokens_1T, len(ids), min(positions, len(ids)),
      vocab_size))


@functools.partial(jax.jit, static_argnames=('model', 'n', 'vocab_size'))
def _logits(model, params, tokens_1T, length, n, vocab_size):
  positions_1T = jnp.arange(tokens_1T.shape[1])[None]
  x_1TD = model_lib.hidden_states(
      model, params, tokens_1T, positions_1T,
      (positions_1T < length).astype(jnp.int32))
  last_nD = jax.lax.dynamic_slice_in_dim(x_1TD[0], length - n, n)
  return model_lib.logits(model, params, last_nD)[:, :vocab_size]
