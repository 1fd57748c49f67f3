"""Cross-entropy of the trained tokens, without the logits of the others.

Over Gemma's vocabulary of 262,144 the logits of 2,048 tokens take 2 GB in f32.
In fine-tuning many positions are prompt or padding, so the hidden states of the
trained ones are gathered first, and the head runs over them, a chunk at a time.

With a frozen head not even a chunk's logits exist at once: one pass over blocks
of the vocabulary keeps a running log-sum-exp (Milakov and Gimelshein 2018,
arXiv 1805.02867) together with the gradient of the hidden states, which needs
only the softmax:

    d nll / d x = sum_v p_v E_v - E_target

The backward pass then just scales it (as Liger's fused loss does, arXiv
2410.10989). That takes 4 D V FLOPs a token; computing the logits twice would
take 6. The gradient of a trained head is computed in the same pass, from the
logits of one chunk, and summed in f32 over the chunks.

Where the mesh splits the embedding, both are split over the vocabulary: each
shard has its own maximum, sum and gradient, combined once at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_sft import shapes
from gemma_sft.nn import float16


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
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[shapes.Scalar, shapes.Scalar]:
  """Returns (sum of -log p(target), number of trained tokens), both f32.

  `loss_mask_BT` is True where the target, the next token, is trained.

  Args:
    max_trained: Static bound on the trained positions of a group. With more of
      them the sum is NaN, so that none is dropped silently.
    groups: Number of device shards of B. Positions are gathered within a
      group, so that nothing crosses devices.
    chunk_size: Most trained positions of a group at a time. Their logits are
      (chunk_size, V) in f32 with a trained head, (chunk_size, 8192) with a
      frozen one.
    softcap: Gemma 2 and 4 bound logits as cap * tanh(logits / cap).
    frozen_head: The embedding gets no gradient (LoRA, evaluation).
    mesh: Its axis 'tensor' may split the embedding.
  """
  arrays, n_G, C = _gather(
      x_BTD, targets_BT, loss_mask_BT, max_trained, groups, chunk_size)
  head = (functools.partial(_frozen_head, mesh=mesh) if frozen_head
          else _trained_head)
  nll = _nll(head, softcap, C, embedding_VD, *arrays)
  nll = jnp.where((n_G <= max_trained).all(), nll, jnp.nan)
  return nll, n_G.sum().astype(jnp.float32)


def masked_hits(
    x_BTD: shapes.HiddenBTD,
    embedding_VD: shapes.EmbeddingVD,
    targets_BT: shapes.TokensBT,
    loss_mask_BT: shapes.MaskBT,
    *,
    max_trained: int,
    groups: int = 1,
    chunk_size: int = 128,
) -> shapes.Scalar:
  """Returns the number of trained targets that are the likeliest token, f32.

  The arguments are those of `masked_nll`. (chunk_size, V) f32 logits exist at a
  time. A cap on the logits does not change their order, so there is none.
  Not differentiable.
  """
  arrays, n_G, C = _gather(
      x_BTD, targets_BT, loss_mask_BT, max_trained, groups, chunk_size)

  def hits(chunk):
    x_GCD, targets_GC, weights_GC = chunk
    logits_GCV = _einsum_f32(
        'GCD,VD->GCV', _products(embedding_VD).operand(x_GCD), embedding_VD)
    return jnp.sum((logits_GCV.argmax(axis=2) == targets_GC) * weights_GC)

  total = jax.lax.map(hits, [shapes.split(a, C) for a in arrays]).sum()
  return jnp.where((n_G <= max_trained).all(), total, jnp.nan)


def _gather(x_BTD, targets_BT, loss_mask_BT, max_trained, groups, chunk_size):
  """Returns ((x_GPD, targets_GP, weights_GP), n_G, chunk size) of the trained.

  Weights are 1.0 where a slot of P holds one of the group's n_G positions.
  """
  D = x_BTD.shape[-1]
  x_GND = x_BTD.reshape(groups, -1, D)
  targets_GN = targets_BT.reshape(groups, -1)
  mask_GN = loss_mask_BT.reshape(groups, -1)
  n_G = mask_GN.sum(axis=1)

  # Chunks of one size: less padding than full ones and a rest.
  n_chunks = -(-max_trained // chunk_size)
  C = -(-max_trained // n_chunks)
  slots = n_chunks * C
  index_GP = jax.vmap(
      lambda mask: jnp.nonzero(mask, size=slots, fill_value=0)[0])(mask_GN)
  weights_GP = (jnp.arange(slots)[None] < n_G[:, None]).astype(jnp.float32)
  # Unused slots take position 0, whose value must not matter even if it is NaN.
  x_GPD = jnp.where(
      weights_GP[:, :, None] > 0,
      jnp.take_along_axis(x_GND, index_GP[:, :, None], axis=1), 0)
  targets_GP = jnp.take_along_axis(targets_GN, index_GP, axis=1)
  return (x_GPD, targets_GP, weights_GP), n_G, C


_einsum_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _capped(logits, softcap):
  """Returns the logits and the derivative of the cap."""
  if softcap is None:
    return logits, jnp.ones_like(logits)
  logits = softcap * jnp.tanh(logits / softcap)
  return logits, 1 - jnp.square(logits / softcap)


class Products:
  """The products of a head in bfloat16 or float32.

  `float16.HeadProducts` are those of a head in float16.
  """

  gradient_dtype = None  # That of the head.

  def operand(self, x: jax.Array) -> jax.Array:
    """Returns hidden states as they are multiplied with the head."""
    return x

  def multiply(
      self, equation: str, probs: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the f32 einsum of numbers in [-1, 1], rounded as `other` is."""
    return _einsum_f32(equation, probs.astype(other.dtype), other)

  def gradients(
      self, dlogits_GCV: jax.Array, x_GCD: jax.Array, embedding_VD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of hidden states and, in f32, of the head."""
    dlogits_GCV = dlogits_GCV.astype(embedding_VD.dtype)
    return (jnp.einsum('GCV,VD->GCD', dlogits_GCV, embedding_VD),
            self.multiply('GCV,GCD->VD', dlogits_GCV, x_GCD))


def _products(embedding_VD):
  if embedding_VD.dtype == jnp.float16:
    return float16.HeadProducts()
  return Products()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _nll(head, softcap, C, embedding_VD, *arrays):
  """Returns the nll sum of chunks of C slots; see `_gather` for the arrays."""
  return head(softcap, C, embedding_VD, *arrays, with_grad=False)[0]


def _nll_fwd(head, softcap, C, embedding_VD, *arrays):
  return head(softcap, C, embedding_VD, *arrays, with_grad=True)


def _nll_bwd(head, softcap, C, gradients, cotangent):
  del head, softcap, C
  dx_GPD, dembedding_VD, like = gradients

  def scaled(gradient):
    return (cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype)

  if dembedding_VD is not None:
    dembedding_VD = scaled(dembedding_VD).astype(like.dtype)
  return dembedding_VD, scaled(dx_GPD), None, None


_nll.defvjp(_nll_fwd, _nll_bwd)


# A frozen head ----------------------------------------------------------------


def _frozen_head(
    softcap, C, embedding_VD, x_GPD, targets_GP, weights_GP, with_grad, mesh):
  """Returns (nll sum, (d nll / d x, None, None)), chunk after chunk."""
  def stream(chunk):
    return _stream_vocabulary(
        *chunk, embedding_VD=embedding_VD, softcap=softcap, mesh=mesh,
        with_grad=with_grad)

  arrays = x_GPD, targets_GP, weights_GP
  if x_GPD.shape[1] == C:
    nll, dx_GPD = stream(arrays)
  else:
    nll_n, dx_nGCD = jax.lax.map(stream, [shapes.split(a, C) for a in arrays])
    nll, dx_GPD = nll_n.sum(), shapes.join(dx_nGCD) if with_grad else None
  return nll, (dx_GPD, None, None)


# Rows of the vocabulary at a time; the logits of 1,024 tokens are 32 MB.
VOCABULARY_BLOCK = 8192


def _stream_vocabulary(
    x_GCD, targets_GC, weights_GC, *, embedding_VD, softcap, mesh, with_grad):
  """Returns (nll sum, d nll / d x or None) in one pass over the vocabulary."""
  V, D = embedding_VD.shape
  products = _products(embedding_VD)
  operand_GCD = products.operand(x_GCD)
  # Z shards of the vocabulary, side by side in every block.
  Z = 1 if mesh is None else mesh.shape['tensor']
  Z = Z if V % Z == 0 else 1
  n_blocks = _n_blocks(V // Z)
  blocks_nZVD = jnp.swapaxes(embedding_VD.reshape(Z, n_blocks, -1, D), 0, 1)

  def sharded(array_ZG):
    if mesh is None or mesh.size == 1:
      return array_ZG
    return jax.lax.with_sharding_constraint(array_ZG, NamedSharding(
        mesh, P('tensor' if Z > 1 else None, ('data', 'fsdp'))))

  def add_block(carry, block_ZVD):
    max_ZGC, sum_ZGC, dx_ZGCD = carry
    logits_ZGCV, slope_ZGCV = _capped(
        _einsum_f32('GCD,ZVD->ZGCV', operand_GCD, block_ZVD), softcap)
    new_max_ZGC = jnp.maximum(max_ZGC, logits_ZGCV.max(axis=3))
    rescale_ZGC = jnp.exp(max_ZGC - new_max_ZGC)
    exp_ZGCV = jnp.exp(logits_ZGCV - new_max_ZGC[..., None])
    if with_grad:
      dx_ZGCD = dx_ZGCD * rescale_ZGC[..., None] + products.multiply(
          'ZGCV,ZVD->ZGCD', exp_ZGCV * slope_ZGCV, block_ZVD)
    return (new_max_ZGC, sum_ZGC * rescale_ZGC + exp_ZGCV.sum(axis=3),
            dx_ZGCD), None

  G, C, _ = x_GCD.shape
  start = jax.tree.map(sharded, (
      jnp.full((Z, G, C), jnp.finfo(jnp.float32).min), jnp.zeros((Z, G, C)),
      jnp.zeros((Z, G, C, D)) if with_grad else None))
  (max_ZGC, sum_ZGC, dx_ZGCD), _ = jax.lax.scan(add_block, start, blocks_nZVD)
  max_GC = max_ZGC.max(axis=0)
  share_ZGC = jnp.exp(max_ZGC - max_GC[None])
  sum_GC = (sum_ZGC * share_ZGC).sum(axis=0)
  target_GCD = embedding_VD[targets_GC]
  target_GC, slope_GC = _capped(
      _einsum_f32('GCD,GCD->GC', operand_GCD, target_GCD), softcap)
  nll_GC = max_GC + jnp.log(sum_GC) - target_GC
  dx_GCD = None
  if with_grad:
    dx_GCD = (dx_ZGCD * share_ZGC[..., None]).sum(axis=0)
    dx_GCD = dx_GCD / sum_GC[:, :, None] - (
        slope_GC[:, :, None] * target_GCD.astype(jnp.float32))
    dx_GCD = (dx_GCD * weights_GC[:, :, None]).astype(x_GCD.dtype)
  return jnp.sum(nll_GC * weights_GC), dx_GCD


def _n_blocks(V: int) -> int:
  """Returns the least divisor of V with blocks of at most `VOCABULARY_BLOCK`.

  1 where V has no such divisor near (Gemma's give 32 blocks of up to 8,192).
  """
  least = -(-V // VOCABULARY_BLOCK)
  return next((n for n in range(least, 4 * least + 1) if V % n == 0), 1)


# A trained head ---------------------------------------------------------------


def _trained_head(
    softcap, C, embedding_VD, x_GPD, targets_GP, weights_GP, with_grad):
  """Returns (nll sum, (d nll / d x, d nll / d embedding, its like) or None)."""
  V = embedding_VD.shape[0]
  products = _products(embedding_VD)

  def add_chunk(carry, chunk):
    nll, dembedding_VD = carry
    x_GCD, targets_GC, weights_GC = chunk
    operand_GCD = products.operand(x_GCD)
    logits_GCV, slope_GCV = _capped(
        _einsum_f32('GCD,VD->GCV', operand_GCD, embedding_VD), softcap)
    lse_GC = jax.nn.logsumexp(logits_GCV, axis=2)
    target_GC = jnp.take_along_axis(
        logits_GCV, targets_GC[:, :, None], axis=2)[:, :, 0]
    nll = nll + jnp.sum((lse_GC - target_GC) * weights_GC)
    if not with_grad:
      return (nll, None), None
    is_target_GCV = jnp.arange(V)[None, None] == targets_GC[:, :, None]
    dlogits_GCV = (jnp.exp(logits_GCV - lse_GC[:, :, None]) - is_target_GCV) * (
        slope_GCV * weights_GC[:, :, None])
    dx_GCD, more_VD = products.gradients(dlogits_GCV, operand_GCD, embedding_VD)
    return (nll, dembedding_VD + more_VD), dx_GCD

  start = (jnp.float32(0), jnp.zeros(embedding_VD.shape) if with_grad else None)
  (nll, dembedding_VD), dx_nGCD = jax.lax.scan(add_chunk, start, [
      shapes.split(a, C) for a in (x_GPD, targets_GP, weights_GP)])
  if not with_grad:
    return nll, None
  dembedding_VD = dembedding_VD.astype(
      products.gradient_dtype or embedding_VD.dtype)
  return nll, (shapes.join(dx_nGCD), dembedding_VD,
               jnp.zeros(0, embedding_VD.dtype))
