"""Cross-entropy of the trained tokens, without the logits of the others.

Gemma's vocabulary has 262,144 rows: the logits of one row of 2,048 tokens are
2 GB in f32. In fine-tuning most positions are prompt or padding, so the hidden
states of the trained positions are gathered first, and the head runs over
those alone, a chunk at a time.
"""

import functools

import jax
import jax.numpy as jnp

from gemma_sft import shapes


def masked_nll(
    x_BTD: shapes.HiddenBTD,
    embedding_VD: shapes.EmbeddingVD,
    targets_BT: shapes.TokensBT,
    loss_mask_BT: shapes.MaskBT,
    *,
    max_trained: int,
    groups: int = 1,
    chunk_size: int = 1024,
    softcap: float | None = None,
) -> tuple[shapes.Scalar, shapes.Scalar]:
  """Returns (sum of -log p(target), number of trained tokens), both f32.

  Sums, not a mean: they are added over microbatches and hosts and divided once
  (`train.train_step`).

  Args:
    x_BTD: Hidden states after the final norm.
    embedding_VD: The tied head.
    targets_BT: The next token at each position.
    loss_mask_BT: True where the target is trained.
    max_trained: Static bound on the trained positions of a group; with more
      than that the sum is NaN, so that none is ever left out unseen.
    groups: Number of device shards of B. Positions are gathered within a
      group, so that nothing crosses devices.
    chunk_size: Trained positions whose logits exist at a time; with several
      chunks the backward pass makes each chunk's logits again.
    softcap: Gemma 2 and 4 bound logits as cap * tanh(logits / cap).
  """
  D = x_BTD.shape[-1]
  x_GND = x_BTD.reshape(groups, -1, D)
  targets_GN = targets_BT.reshape(groups, -1)
  mask_GN = loss_mask_BT.reshape(groups, -1)
  n_G = mask_GN.sum(axis=1)

  chunk_size = min(chunk_size, max_trained)
  n_chunks = -(-max_trained // chunk_size)
  P = n_chunks * chunk_size
  index_GP = jax.vmap(
      lambda mask: jnp.nonzero(mask, size=P, fill_value=0)[0])(mask_GN)
  weights_GP = (jnp.arange(P)[None] < n_G[:, None]).astype(jnp.float32)
  x_GPD = jnp.take_along_axis(x_GND, index_GP[:, :, None], axis=1)
  targets_GP = jnp.take_along_axis(targets_GN, index_GP, axis=1)

  chunk_nll = functools.partial(_chunk_nll, softcap=softcap)
  if n_chunks == 1:
    nll = chunk_nll(embedding_VD, x_GPD, targets_GP, weights_GP)
  else:
    # A static loop of slices would keep every chunk's logits for the backward
    # pass; a scan of a rematerialised body keeps one.
    def split(array):
      chunked = array.reshape(groups, n_chunks, chunk_size, *array.shape[2:])
      return jnp.moveaxis(chunked, 1, 0)

    def body(total, chunk):
      return total + jax.checkpoint(chunk_nll)(embedding_VD, *chunk), None

    nll, _ = jax.lax.scan(
        body, jnp.float32(0),
        (split(x_GPD), split(targets_GP), split(weights_GP)))
  nll = jnp.where((n_G <= max_trained).all(), nll, jnp.nan)
  return nll, n_G.sum().astype(jnp.float32)


def _chunk_nll(embedding_VD, x_GPD, targets_GP, weights_GP, *, softcap):
  logits_GPV = jnp.einsum(
      'GPD,VD->GPV', x_GPD, embedding_VD, preferred_element_type=jnp.float32)
  if softcap is not None:
    logits_GPV = softcap * jnp.tanh(logits_GPV / softcap)
  target_GP = jnp.take_along_axis(
      logits_GPV, targets_GP[:, :, None], axis=2)[:, :, 0]
  nll_GP = jax.nn.logsumexp(logits_GPV, axis=2) - target_GP
  return jnp.sum(nll_GP * weights_GP)
