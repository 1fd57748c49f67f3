"""Cross-entropy of the trained tokens, without the logits of the others.

Gemma's vocabulary has 262,144 rows: the logits of one row of 2,048 tokens are
2 GB in f32. In fine-tuning many positions are prompt or padding, so the hidden
states of the trained positions are gathered first, and the head runs over those
alone.

With a frozen head even their logits are never all there: one pass over blocks
of the vocabulary keeps a running log-sum-exp (Milakov and Gimelshein 2018,
arXiv 1805.02867) and, beside it, the gradient of the hidden states, which needs
nothing but the softmax:

    d nll / d x = sum_v p_v E_v - E_target

so that the backward pass has only to scale it (as Liger's fused loss does,
arXiv 2410.10989). That is 4 D V FLOPs a token, where making the logits a second
time takes 6.
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
    frozen_head: bool = False,
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
      chunks the backward pass makes each chunk's logits again. Not with a
      frozen head.
    softcap: Gemma 2 and 4 bound logits as cap * tanh(logits / cap).
    frozen_head: The embedding gets no gradient (LoRA, evaluation).
  """
  D = x_BTD.shape[-1]
  x_GND = x_BTD.reshape(groups, -1, D)
  targets_GN = targets_BT.reshape(groups, -1)
  mask_GN = loss_mask_BT.reshape(groups, -1)
  n_G = mask_GN.sum(axis=1)

  chunk_size = max_trained if frozen_head else min(chunk_size, max_trained)
  n_chunks = -(-max_trained // chunk_size)
  P = n_chunks * chunk_size
  index_GP = jax.vmap(
      lambda mask: jnp.nonzero(mask, size=P, fill_value=0)[0])(mask_GN)
  weights_GP = (jnp.arange(P)[None] < n_G[:, None]).astype(jnp.float32)
  # Unused slots take position 0, whose value must not matter even if it is NaN.
  x_GPD = jnp.where(
      weights_GP[:, :, None] > 0,
      jnp.take_along_axis(x_GND, index_GP[:, :, None], axis=1), 0)
  targets_GP = jnp.take_along_axis(targets_GN, index_GP, axis=1)

  chunk_nll = functools.partial(_chunk_nll, softcap=softcap)
  if frozen_head:
    nll = _frozen_head_nll(
        x_GPD, embedding_VD, targets_GP, weights_GP, softcap)
  elif n_chunks == 1:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _frozen_head_nll(x_GPD, embedding_VD, targets_GP, weights_GP, softcap):
  nll, _ = _stream_vocabulary(
      x_GPD, embedding_VD, targets_GP, weights_GP, softcap, with_grad=False)
  return nll


def _frozen_head_fwd(x_GPD, embedding_VD, targets_GP, weights_GP, softcap):
  return _stream_vocabulary(
      x_GPD, embedding_VD, targets_GP, weights_GP, softcap, with_grad=True)


def _frozen_head_bwd(softcap, dx_GPD, cotangent):
  del softcap
  dx_GPD = (cotangent * dx_GPD.astype(jnp.float32)).astype(dx_GPD.dtype)
  return dx_GPD, None, None, None


_frozen_head_nll.defvjp(_frozen_head_fwd, _frozen_head_bwd)

_BLOCK = 8192  # Rows of the vocabulary at a time; 1,024 tokens' logits: 32 MB.


def _stream_vocabulary(
    x_GPD, embedding_VD, targets_GP, weights_GP, softcap, *, with_grad):
  """Returns (nll sum, d nll / d x or None) in one pass over the vocabulary."""
  V, D = embedding_VD.shape
  blocks_bVD = embedding_VD.reshape(_n_blocks(V), -1, D)

  def capped(logits):
    """Returns the logits and the derivative of the cap."""
    if softcap is None:
      return logits, jnp.ones_like(logits)
    logits = softcap * jnp.tanh(logits / softcap)
    return logits, 1 - jnp.square(logits / softcap)

  def add_block(carry, block_VD):
    max_GP, sum_GP, dx_GPD = carry
    logits_GPV, slope_GPV = capped(jnp.einsum(
        'GPD,VD->GPV', x_GPD, block_VD, preferred_element_type=jnp.float32))
    new_max_GP = jnp.maximum(max_GP, logits_GPV.max(axis=2))
    rescale_GP = jnp.exp(max_GP - new_max_GP)
    exp_GPV = jnp.exp(logits_GPV - new_max_GP[:, :, None])
    if with_grad:
      dx_GPD = dx_GPD * rescale_GP[:, :, None] + jnp.einsum(
          'GPV,VD->GPD', (exp_GPV * slope_GPV).astype(block_VD.dtype),
          block_VD, preferred_element_type=jnp.float32)
    return (new_max_GP, sum_GP * rescale_GP + exp_GPV.sum(axis=2),
            dx_GPD), None

  G, P, _ = x_GPD.shape
  start = (jnp.full((G, P), jnp.finfo(jnp.float32).min), jnp.zeros((G, P)),
           jnp.zeros((G, P, D)) if with_grad else None)
  (max_GP, sum_GP, dx_GPD), _ = jax.lax.scan(add_block, start, blocks_bVD)
  target_GPD = embedding_VD[targets_GP]
  target_GP, slope_GP = capped(jnp.einsum(
      'GPD,GPD->GP', x_GPD, target_GPD, preferred_element_type=jnp.float32))
  nll_GP = max_GP + jnp.log(sum_GP) - target_GP
  if with_grad:
    dx_GPD = dx_GPD / sum_GP[:, :, None] - (
        slope_GP[:, :, None] * target_GPD.astype(jnp.float32))
    dx_GPD = (dx_GPD * weights_GP[:, :, None]).astype(x_GPD.dtype)
  return jnp.sum(nll_GP * weights_GP), dx_GPD


def _n_blocks(V: int) -> int:
  """Returns the least divisor of V that makes blocks of at most `_BLOCK`.

  Or 1 where V has no divisor near (Gemma's are 32 blocks of 8,192 or 8,004).
  """
  least = -(-V // _BLOCK)
  return next((n for n in range(least, 4 * least + 1) if V % n == 0), 1)
