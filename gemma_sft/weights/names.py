"""One table per Gemma generation: library <-> Hugging Face <-> GGUF.

A row names one array of the official library's parameter tree, the tensors
that hold it in the two file formats, and how their axes correspond. The
functions below apply the tables in either direction, one array at a time.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import math
import re

import numpy as np

from gemma_sft import errors

ARCHITECTURES = {'gemma': 1, 'gemma2': 2, 'gemma3': 3}
FORMS = ('hf', 'gguf')
EMBEDDING = 'embedder/input_embedding'
HF_EMBEDDING = 'model.embed_tokens.weight'
# Numbers of embedding rows that differ only by rows of no token: the library
# pads Gemma 1 and 2 to 256128 rows; the files of the multimodal Gemma 3 have 64
# rows for images.
_PADDINGS = ({256000, 256128}, {262144, 262208})

Shape = tuple[int, ...]
Read = Callable[[str], np.ndarray]  # From a name to the array.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
  """A model's arrays: all that its tensors in the file formats depend on.

  Attributes:
    generation: 1 to 4.
    shapes: Path in the library's tree, joined by '/' -> shape.
    transposed_gating: `gating_einsum` is (2, F, D) in the library, not
      (2, D, F).
    file_vocab: The number of embedding rows in the file if it differs from the
      library's: 256000 instead of 256128 in Gemma 1 and 2, 262208 instead of
      262144 in the larger Gemma 3.
  """

  generation: int
  shapes: Mapping[str, Shape]
  transposed_gating: bool
  file_vocab: int | None = None


def make_weight_layout(
    *,
    generation: int,
    layers: int,
    vocab: int,
    embed: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    transposed_gating: bool,
) -> WeightLayout:
  """Returns the layout of a Gemma 1, 2 or 3 with these dimensions."""
  layer = {'attn/attn_vec_einsum/w': (heads, head_dim, embed)}
  if heads == kv_heads:  # The library fuses all three.
    layer['attn/qkv_einsum/w'] = (3, heads, embed, head_dim)
  else:
    layer['attn/q_einsum/w'] = (heads, embed, head_dim)
    layer['attn/kv_einsum/w'] = (2, kv_heads, embed, head_dim)
  gating = (hidden, embed) if transposed_gating else (embed, hidden)
  layer |= {'mlp/gating_einsum': (2, *gating), 'mlp/linear': (hidden, embed),
            'pre_attention_norm/scale': (embed,),
            'pre_ffw_norm/scale': (embed,)}
  if generation > 1:
    layer['post_attention_norm/scale'] = (embed,)
    layer['post_ffw_norm/scale'] = (embed,)
  if generation > 2:
    layer['attn/_query_norm/scale'] = (head_dim,)
    layer['attn/_key_norm/scale'] = (head_dim,)
  shapes = {EMBEDDING: (vocab, embed), 'final_norm/scale': (embed,)}
  for i in range(layers):
    shapes |= {f'layer_{i}/{path}': shape for path, shape in layer.items()}
  return WeightLayout(
      generation=generation, shapes=shapes, transposed_gating=transposed_gating)


@dataclasses.dataclass(frozen=True)
class NameRow:
  """One array of the library's tree and the file tensors that hold it.

  Attributes:
    library: Path in the tree; '{layer}' stands for the number of a layer.
    hf: Names of the Hugging Face tensors, one per stacked part.
    gguf: The same for GGUF.
    axes: Those of the array and of each tensor, as 'SNDH -> S NH D': adjacent
      letters are merged, and each index of S is a tensor of its own. An array
      with V first has a row per token.
  """

  library: str
  hf: tuple[str, ...]
  gguf: tuple[str, ...]
  axes: str

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    """Returns the file tensors of a library array."""
    order, _, merged = self._order_and_sizes(array.shape)
    array = array.transpose(order).reshape(merged)
    return list(array) if self.axes[0] == 'S' else [array]

  def join(self, tensors: list[np.ndarray], shape: Shape) -> np.ndarray:
    """Returns the library array of this shape, the inverse of `split`."""
    order, sizes, _ = self._order_and_sizes(shape)
    array = np.stack(tensors) if self.axes[0] == 'S' else tensors[0]
    return array.reshape(sizes).transpose(np.argsort(order))

  def tensor_shapes(self, shape: Shape) -> list[Shape]:
    """Returns the shapes of the file tensors of a library array."""
    _, _, merged = self._order_and_sizes(shape)
    return merged[0] * [merged[1:]] if self.axes[0] == 'S' else [merged]

  def _order_and_sizes(self, shape):
    """Returns the permutation, the permuted and the merged sizes."""
    axes, groups = self.axes.split(' -> ')
    size = dict(zip(axes, shape, strict=True))
    permuted = groups.replace(' ', '')
    return (
        [axes.index(axis) for axis in permuted],
        [size[axis] for axis in permuted],
        tuple(math.prod(size[axis] for axis in group)
              for group in groups.split()))


def _row(library, hf, gguf, axes='D -> D') -> NameRow:
  return NameRow(library, (f'model.{hf}.weight',), (f'{gguf}.weight',), axes)


def _layer_row(library, hf, gguf, axes='D -> D') -> NameRow:
  """Returns a row of every layer; spaces separate the names of the parts."""
  return NameRow(
      'layer_{layer}/' + library,
      tuple(f'model.layers.{{layer}}.{name}.weight' for name in hf.split()),
      tuple(f'blk.{{layer}}.{name}.weight' for name in gguf.split()), axes)


_Q = 'self_attn.q_proj', 'attn_q'
_K = 'self_attn.k_proj', 'attn_k'
_KV = f'{_K[0]} self_attn.v_proj', 'attn_k attn_v'
_QKV = f'{_Q[0]} {_KV[0]}', 'attn_q attn_k attn_v'
_O = 'self_attn.o_proj', 'attn_output'
_GATING = 'mlp.gate_proj mlp.up_proj', 'ffn_gate ffn_up'
_TRANSPOSED_GATING, _UNTRANSPOSED_GATING = 'SFD -> S F D', 'SDF -> S F D'
# Hugging Face's lm_head.weight has no row: in Gemma it is the embedding.
_COMMON = (
    _row(EMBEDDING, 'embed_tokens', 'token_embd', 'VD -> V D'),
    _row('final_norm/scale', 'norm', 'output_norm'),
    _layer_row('attn/q_einsum/w', *_Q, 'NDH -> NH D'),
    _layer_row('attn/kv_einsum/w', *_KV, 'SNDH -> S NH D'),
    _layer_row('attn/qkv_einsum/w', *_QKV, 'SNDH -> S NH D'),
    _layer_row('attn/attn_vec_einsum/w', *_O, 'NHD -> D NH'),
    _layer_row('mlp/gating_einsum', *_GATING, _TRANSPOSED_GATING),
    _layer_row('mlp/linear', 'mlp.down_proj', 'ffn_down', 'FD -> D F'),
    _layer_row('pre_attention_norm/scale', 'input_layernorm', 'attn_norm'),
)
_GEMMA1 = _COMMON + (
    # From Gemma 2 on, Hugging Face uses this name for another norm.
    _layer_row('pre_ffw_norm/scale', 'post_attention_layernorm', 'ffn_norm'),
)
_GEMMA2 = _COMMON + (
    _layer_row('post_attention_norm/scale', 'post_attention_layernorm',
               'post_attention_norm'),
    _layer_row('pre_ffw_norm/scale', 'pre_feedforward_layernorm', 'ffn_norm'),
    _layer_row('post_ffw_norm/scale', 'post_feedforward_layernorm',
               'post_ffw_norm'),
)
_GEMMA3 = _GEMMA2 + (
    _layer_row('attn/_query_norm/scale', 'self_attn.q_norm', 'attn_q_norm'),
    _layer_row('attn/_key_norm/scale', 'self_attn.k_norm', 'attn_k_norm'),
)
_GEMMA4 = _GEMMA2 + (
    _layer_row('attn/query_norm/scale', 'self_attn.q_norm', 'attn_q_norm'),
    _layer_row('attn/key_norm/scale', 'self_attn.k_norm', 'attn_k_norm'),
    # Global layers that use their keys as values: the files have no v either.
    _layer_row('attn/k_einsum/w', *_K, 'NDH -> NH D'),
    NameRow('layer_{layer}/skip_scale', ('model.layers.{layer}.layer_scalar',),
            ('blk.{layer}.layer_output_scale.weight',), 'D -> D'),
    _layer_row('per_layer_input_gate/w', 'per_layer_input_gate', 'inp_gate',
               'DP -> P D'),
    _layer_row('per_layer_projection/w', 'per_layer_projection', 'proj',
               'PD -> D P'),
    _layer_row('post_per_layer_input_norm/scale', 'post_per_layer_input_norm',
               'post_norm'),
    _row('embedder/per_layer_embeddings', 'embed_tokens_per_layer',
         'per_layer_token_embd', 'VLP -> V LP'),
    _row('embedder/per_layer_model_projection/w', 'per_layer_model_projection',
         'per_layer_model_proj', 'DLP -> LP D'),
    _row('embedder/per_layer_projection_norm/scale',
         'per_layer_projection_norm', 'per_layer_proj_norm'),
)
_TABLES = {
    generation: {row.library: row for row in table}
    for generation, table in enumerate((_GEMMA1, _GEMMA2, _GEMMA3, _GEMMA4), 1)
}


def rows(layout: WeightLayout) -> list[NameRow]:
  """Returns the row of each array of the layout, with its layer number.

  Raises:
    UserError: The generation's table lacks an array of the layout.
  """
  return [_row_of(layout, path) for path in layout.shapes]


def _row_of(layout, path):
  number = re.match(r'layer_(\d+)/', path)
  layer = number[1] if number else ''
  row = _TABLES[layout.generation].get(
      re.sub(r'^layer_\d+/', 'layer_{layer}/', path))
  if row is None:
    raise errors.UserError(
        f'parameter {path} has no name outside the gemma library',
        f'a dense text model of Gemma {layout.generation}',
        'choose one; experts and vision towers are not supported')
  axes = row.axes
  if axes == _TRANSPOSED_GATING and not layout.transposed_gating:
    axes = _UNTRANSPOSED_GATING
  return NameRow(path, tuple(name.format(layer=layer) for name in row.hf),
                 tuple(name.format(layer=layer) for name in row.gguf), axes)


def n_layers(layout: WeightLayout) -> int:
  """Returns the number of blocks."""
  return len({path.partition('/')[0] for path in layout.shapes
              if path.startswith('layer_')})


def file_shapes(layout: WeightLayout, form: str) -> dict[str, Shape]:
  """Returns name -> shape of every tensor of the model in 'hf' or 'gguf'.

  Axes are in numpy's order; GGUF stores them reversed.
  """
  shapes = {}
  for row in rows(layout):
    parts = row.tensor_shapes(layout.shapes[row.library])
    if row.axes[0] == 'V' and layout.file_vocab:
      parts = [(layout.file_vocab, *parts[0][1:])]
    shapes.update(zip(getattr(row, form), parts, strict=True))
  return shapes


def check_shapes(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    where: str,
    *,
    embedding: str = '',
) -> None:
  """Raises one `UserError` that lists the tensors that do not fit.

  Args:
    found: Name -> shape of what a file or checkpoint holds.
    expected: The same of what the model needs.
    where: The file, for the message.
    embedding: The name of a tensor that may differ by padding rows.
  """
  expected = dict(expected)
  if embedding in expected and embedding in found:
    n_rows, *columns = expected[embedding]
    if {n_rows, found[embedding][0]} in _PADDINGS:
      expected[embedding] = (found[embedding][0], *columns)
  problems = [
      *(f'missing {name}' for name in expected if name not in found),
      *(f'surplus {name}' for name in found if name not in expected),
      *(f'{name} has shape {tuple(found[name])}, not {tuple(shape)}'
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)),
  ]
  if problems:
    shown = '; '.join(problems[:8])
    if len(problems) > 8:
      shown += f'; and {len(problems) - 8} more'
    raise errors.UserError(
        f'{where}: {shown}',
        f'the {len(expected)} tensors of the model, in its shapes',
        'choose the model that these weights belong to, or other weights')


def to_library(
    layout: WeightLayout, form: str, read: Read
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (library path, array), made from the tensors of a file.

  `read` is called once per tensor, just before the tensor is needed.
  """
  for path in layout.shapes:
    yield path, read_library_array(layout, form, read, path)


def read_library_array(
    layout: WeightLayout, form: str, read: Read, path: str
) -> np.ndarray:
  """Returns one array of the library, made from the tensors of a file."""
  row, shape = _row_of(layout, path), layout.shapes[path]
  tensors = [read(name) for name in getattr(row, form)]
  if _has_offset(layout, row, form):
    tensors = [tensor.astype(np.float32) - 1 for tensor in tensors]
  if row.axes[0] == 'V':
    tensors = [resize_rows(tensors[0], shape[0])]
  return np.ascontiguousarray(row.join(tensors, shape))


def from_library(
    layout: WeightLayout, form: str, read: Read
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (tensor name, array) of a file, made from the library's arrays.

  `read` is called once per array, just before the array is needed.
  """
  for row in rows(layout):
    tensors = row.split(np.asarray(read(row.library)))
    if row.axes[0] == 'V' and layout.file_vocab:
      tensors = [resize_rows(tensors[0], layout.file_vocab)]
    for name, tensor in zip(getattr(row, form), tensors, strict=True):
      if _has_offset(layout, row, form):
        tensor = tensor.astype(np.float32) + 1
      yield name, np.ascontiguousarray(tensor)


def resize_rows(array_VD: np.ndarray, n_rows: int) -> np.ndarray:
  """Removes rows at the end, or appends rows of zeros."""
  missing = max(0, n_rows - len(array_VD))
  if missing:
    return np.pad(array_VD, ((0, missing), (0, 0)))
  return array_VD[:n_rows]


def _has_offset(layout: WeightLayout, row: NameRow, form: str) -> bool:
  """Whether the tensor is 1 + w: the norms of Gemma 1 to 3 in llama.cpp.

  Gemma 4 multiplies by w in all three formats.
  """
  return (form == 'gguf' and layout.generation < 4
          and row.library.endswith('norm/scale'))
