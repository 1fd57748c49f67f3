"""Memory of the head and the loss, compared with that of all logits at once.

    python tests/benchmarks/head_memory.py --model=gemma2_2b --rows=8

Compiles value and gradient of `head.masked_nll` and of the plain way for the
device at hand, with every position trained, in bfloat16, and prints the
temporaries and outputs that the compiler reports. Nothing is run.
"""

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

from gemma_sft import model as model_lib
from gemma_sft import pages
from gemma_sft.nn import head

_MODEL = flags.DEFINE_string('model', 'gemma2_2b', 'A preset.')
_ROWS = flags.DEFINE_integer('rows', 8, 'Rows.')


def _plain(x_BTD, embedding_VD, targets_BT, softcap):
  logits_BTV = jnp.einsum(
      'BTD,VD->BTV', x_BTD, embedding_VD, preferred_element_type=jnp.float32)
  if softcap is not None:
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
  picked_BT = jnp.take_along_axis(
      logits_BTV, targets_BT[..., None], axis=2)[..., 0]
  return jnp.sum(jax.nn.logsumexp(logits_BTV, axis=2) - picked_BT)


def main(_):
  config = model_lib.make_model(_MODEL.value).config
  B, T, D, V = _ROWS.value, 2048, config.embed_dim, config.num_embed
  softcap = config.final_logit_softcap
  arguments = [  # Activations, embedding, targets, mask.
      jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
          ((B, T, D), jnp.bfloat16), ((V, D), jnp.bfloat16),
          ((B, T), jnp.int32), ((B, T), jnp.bool))]

  def ours(x, e, t, m, frozen_head):
    return head.masked_nll(
        x, e, t, m, max_trained=B * T, chunk_size=1024, softcap=softcap,
        frozen_head=frozen_head)[0]

  cases = {
      'frozen head': (lambda *a: ours(*a, True), (0,)),
      'trained head': (lambda *a: ours(*a, False), (0, 1)),
      'all logits at once, frozen': (
          lambda x, e, t, m: _plain(x, e, t, softcap), (0,))}
  print(f'{_MODEL.value}, {B} x {T}, every position, bfloat16, for'
        f' {jax.devices()[0].device_kind}, jax {jax.__version__}')
  rows = []
  for name, (fn, argnums) in cases.items():
    memory = jax.jit(jax.value_and_grad(fn, argnums)).lower(
        *arguments).compile().memory_analysis()
    rows.append((name, f'{memory.temp_size_in_bytes / 1e9:.2f}',
                 f'{memory.output_size_in_bytes / 1e9:.2f}'))
  print(pages.table(('', 'temporaries GB', 'gradients GB'), rows))


if __name__ == '__main__':
  app.run(main)
