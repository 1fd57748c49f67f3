"""One table per Gemma generation: library <-> Hugging Face <-> GGUF.

A row names one array of the official library's parameter tree, the tensors
that hold it in the two file formats, and the transform between them. The
functions below apply the tables in either direction, one array at a time.

Tests compare the logits of every generation with transformers and llama.cpp;
for Gemma 4 these are the dense text models.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import re

import numpy as np

from gemma_sft import errors

ARCHITECTURES = {'gemma': 1, 'gemma2': 2, 'gemma3': 3}
FORMS = ('hf', 'gguf')
EMBEDDING = 'embedder/input_embedding'
# Numbers of embedding rows that differ only by rows of no token: the library
# pads Gemma 1 and 2 to 256128 rows; the files of the multimodal Gemma 3 have 64
# rows for images.
_PADDINGS = ({256000, 256128}, {262144, 262208})

Shape = tuple[int, ...]


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
      262144 in the larger Gemma 3. None: the same number.
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
  attn = {
      'attn/attn_vec_einsum/w': (heads, head_dim, embed),
  }
  if heads == kv_heads:  # The library fuses all three.
    attn['attn/qkv_einsum/w'] = (3, heads, embed, head_dim)
  else:
    attn['attn/q_einsum/w'] = (heads, embed, head_dim)
    attn['attn/kv_einsum/w'] = (2, kv_heads, embed, head_dim)
  norms = {
      'pre_attention_norm/scale': (embed,),
      'pre_ffw_norm/scale': (embed,),
  }
  if generation > 1:
    norms['post_attention_norm/scale'] = (embed,)
    norms['post_ffw_norm/scale'] = (embed,)
  if generation > 2:
    norms['attn/_query_norm/scale'] = (head_dim,)
    norms['attn/_key_norm/scale'] = (head_dim,)
  gating = (hidden, embed) if transposed_gating else (embed, hidden)
  mlp = {'mlp/gating_einsum': (2, *gating), 'mlp/linear': (hidden, embed)}
  shapes = {EMBEDDING: (vocab, embed), 'final_norm/scale': (embed,)}
  for layer in range(layers):
    for path, shape in (attn | mlp | norms).items():
      shapes[f'layer_{layer}/{path}'] = shape
  return WeightLayout(
      generation=generation, shapes=shapes, transposed_gating=transposed_gating
  )


@dataclasses.dataclass(frozen=True)
class Transform:
  """An invertible transform: one library array <-> n file tensors.

  Attributes:
    to_file: Library array -> file tensors.
    to_library: File tensors and library shape -> library array.
    shapes: Library shape -> shapes of the file tensors.
  """

  to_file: Callable[[np.ndarray], Sequence[np.ndarray]]
  to_library: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
  shapes: Callable[[Shape], Sequence[Shape]]


def _merge_heads(array_NDH: np.ndarray) -> np.ndarray:
  n, d, h = array_NDH.shape
  return array_NDH.transpose(0, 2, 1).reshape(n * h, d)


def _split_heads(array: np.ndarray, shape_NDH: Shape) -> np.ndarray:
  n, d, h = shape_NDH
  return array.reshape(n, h, d).transpose(0, 2, 1)


_IDENTITY = Transform(
    lambda a: [a], lambda parts, shape: parts[0], lambda shape: [shape]
)
TRANSFORMS = {
    'identity': _IDENTITY,
    # A norm of Gemma 1 to 3, stored as 1 + w in GGUF (see `_offset`).
    'norm': _IDENTITY,
    # (V, D); the number of padding rows may differ (see `resize_rows`).
    'vocabulary': _IDENTITY,
    # (N, D, H) <-> (N * H, D).
    'heads': Transform(
        lambda a: [_merge_heads(a)],
        lambda parts, shape: _split_heads(parts[0], shape),
        lambda shape: [(shape[0] * shape[2], shape[1])],
    ),
    # (2, K, D, H) or (3, N, D, H) <-> k, v or q, k, v of (K * H, D) each.
    'stacked_heads': Transform(
        lambda a: [_merge_heads(part) for part in a],
        lambda parts, shape: np.stack(
            [_split_heads(part, shape[1:]) for part in parts]
        ),
        lambda shape: shape[0] * [(shape[1] * shape[3], shape[2])],
    ),
    # (N, H, D) <-> (D, N * H).
    'heads_to_model': Transform(
        lambda a: [a.reshape(-1, a.shape[-1]).T],
        lambda parts, shape: parts[0].T.reshape(shape),
        lambda shape: [(shape[2], shape[0] * shape[1])],
    ),
    # (2, F, D) <-> gate and up, (F, D) each.
    'stacked': Transform(
        lambda a: list(a),
        lambda parts, shape: np.stack(parts),
        lambda shape: shape[0] * [shape[1:]],
    ),
    # (2, D, F) <-> gate and up, (F, D) each.
    'stacked_transpose': Transform(
        lambda a: [part.T for part in a],
        lambda parts, shape: np.stack([part.T for part in parts]),
        lambda shape: shape[0] * [(shape[2], shape[1])],
    ),
    # (F, D) <-> (D, F).
    'transpose': Transform(
        lambda a: [a.T],
        lambda parts, shape: parts[0].T,
        lambda shape: [shape[::-1]],
    ),
    # (V, L, P) <-> (V, L * P).
    'merge_columns': Transform(
        lambda a: [a.reshape(len(a), -1)],
        lambda parts, shape: parts[0].reshape(shape),
        lambda shape: [(shape[0], shape[1] * shape[2])],
    ),
    # (D, L, P) <-> (L * P, D).
    'merge_columns_transpose': Transform(
        lambda a: [a.reshape(len(a), -1).T],
        lambda parts, shape: parts[0].T.reshape(shape),
        lambda shape: [(shape[1] * shape[2], shape[0])],
    ),
}

# Arrays with a row per token: the embedding and Gemma 4's per-layer embeddings.
_BY_TOKEN = ('vocabulary', 'merge_columns')


@dataclasses.dataclass(frozen=True)
class NameRow:
  """One array of the library's tree and the file tensors that hold it.

  Attributes:
    library: Path in the tree; '{layer}' stands for the number of a layer.
    hf: Names of the Hugging Face tensors, one per stacked part.
    gguf: The same for GGUF.
    transform: A key of `TRANSFORMS`.
  """

  library: str
  hf: tuple[str, ...]
  gguf: tuple[str, ...]
  transform: str


def _global_row(library: str, hf: str, gguf: str, transform: str) -> NameRow:
  return NameRow(
      library, (f'model.{hf}.weight',), (f'{gguf}.weight',), transform)


def _layer_row(library: str, hf: str, gguf: str, transform: str) -> NameRow:
  """Returns a row of every layer; spaces separate the names of the parts."""
  return NameRow(
      'layer_{layer}/' + library,
      tuple(f'model.layers.{{layer}}.{name}.weight' for name in hf.split()),
      tuple(f'blk.{{layer}}.{name}.weight' for name in gguf.split()),
      transform,
  )


_QUERY = 'self_attn.q_proj', 'attn_q'
_KEY = 'self_attn.k_proj', 'attn_k'
_KEY_VALUE = 'self_attn.k_proj self_attn.v_proj', 'attn_k attn_v'
_QUERY_KEY_VALUE = (
    f'{_QUERY[0]} {_KEY_VALUE[0]}', f'{_QUERY[1]} {_KEY_VALUE[1]}'
)
_GATING = 'mlp.gate_proj mlp.up_proj', 'ffn_gate ffn_up'
# Hugging Face's lm_head.weight has no row: in Gemma it is the embedding.
_COMMON = (
    _global_row(EMBEDDING, 'embed_tokens', 'token_embd', 'vocabulary'),
    _global_row('final_norm/scale', 'norm', 'output_norm', 'norm'),
    _layer_row('attn/q_einsum/w', *_QUERY, 'heads'),
    _layer_row('attn/kv_einsum/w', *_KEY_VALUE, 'stacked_heads'),
    _layer_row('attn/qkv_einsum/w', *_QUERY_KEY_VALUE, 'stacked_heads'),
    _layer_row(
        'attn/attn_vec_einsum/w',
        'self_attn.o_proj', 'attn_output', 'heads_to_model',
    ),
    _layer_row('mlp/gating_einsum', *_GATING, 'stacked'),
    _layer_row('mlp/linear', 'mlp.down_proj', 'ffn_down', 'transpose'),
    _layer_row(
        'pre_attention_norm/scale', 'input_layernorm', 'attn_norm', 'norm'
    ),
)
_GEMMA1 = _COMMON + (
    # From Gemma 2 on, Hugging Face uses this name for another norm.
    _layer_row(
        'pre_ffw_norm/scale', 'post_attention_layernorm', 'ffn_norm', 'norm'
    ),
)
_GEMMA2 = _COMMON + (
    _layer_row(
        'post_attention_norm/scale',
        'post_attention_layernorm', 'post_attention_norm', 'norm',
    ),
    _layer_row(
        'pre_ffw_norm/scale', 'pre_feedforward_layernorm', 'ffn_norm', 'norm'
    ),
    _layer_row(
        'post_ffw_norm/scale',
        'post_feedforward_layernorm', 'post_ffw_norm', 'norm',
    ),
)
_GEMMA3 = _GEMMA2 + (
    _layer_row(
        'attn/_query_norm/scale', 'self_attn.q_norm', 'attn_q_norm', 'norm'
    ),
    _layer_row(
        'attn/_key_norm/scale', 'self_attn.k_norm', 'attn_k_norm', 'norm'
    ),
)
# The norms of Gemma 4 multiply by w, not by 1 + w, in all three formats.
_GEMMA4 = tuple(
    dataclasses.replace(row, transform='identity')
    if row.transform == 'norm' else row
    for row in _GEMMA2
) + (
    _layer_row(
        'attn/query_norm/scale', 'self_attn.q_norm', 'attn_q_norm', 'identity'
    ),
    _layer_row(
        'attn/key_norm/scale', 'self_attn.k_norm', 'attn_k_norm', 'identity'
    ),
    # Global layers that use their keys as values: the files have no v either.
    _layer_row('attn/k_einsum/w', *_KEY, 'heads'),
    NameRow(
        'layer_{layer}/skip_scale',
        ('model.layers.{layer}.layer_scalar',),
        ('blk.{layer}.layer_output_scale.weight',),
        'identity',
    ),
    _layer_row(
        'per_layer_input_gate/w',
        'per_layer_input_gate', 'inp_gate', 'transpose',
    ),
    _layer_row(
        'per_layer_projection/w', 'per_layer_projection', 'proj', 'transpose'
    ),
    _layer_row(
        'post_per_layer_input_norm/scale',
        'post_per_layer_input_norm', 'post_norm', 'identity',
    ),
    _global_row(
        'embedder/per_layer_embeddings',
        'embed_tokens_per_layer', 'per_layer_token_embd', 'merge_columns',
    ),
    _global_row(
        'embedder/per_layer_model_projection/w',
        'per_layer_model_projection', 'per_layer_model_proj',
        'merge_columns_transpose',
    ),
    _global_row(
        'embedder/per_layer_projection_norm/scale',
        'per_layer_projection_norm', 'per_layer_proj_norm', 'identity',
    ),
)
TABLES = {1: _GEMMA1, 2: _GEMMA2, 3: _GEMMA3, 4: _GEMMA4}


def rows(layout: WeightLayout) -> list[NameRow]:
  """Returns the row of each array of the layout, with its layer number.

  Raises:
    UserError: The generation's table lacks an array of the layout.
  """
  table = {row.library: row for row in TABLES[layout.generation]}
  filled = []
  for path in layout.shapes:
    number = re.match(r'layer_(\d+)/', path)
    layer = number[1] if number else ''
    row = table.get(re.sub(r'^layer_\d+/', 'layer_{layer}/', path))
    if row is None:
      raise errors.UserError(
          f'parameter {path} has no name outside the gemma library',
          f'a dense text model of Gemma {layout.generation}',
          'choose one; experts and vision towers are not supported',
      )
    transform = row.transform
    if path.endswith('/gating_einsum') and not layout.transposed_gating:
      transform = 'stacked_transpose'
    filled.append(
        NameRow(
            path,
            tuple(name.format(layer=layer) for name in row.hf),
            tuple(name.format(layer=layer) for name in row.gguf),
            transform,
        )
    )
  return filled


def n_layers(layout: WeightLayout) -> int:
  """Returns the number of blocks."""
  return len({
      path.partition('/')[0] for path in layout.shapes
      if path.startswith('layer_')
  })


def file_shapes(layout: WeightLayout, form: str) -> dict[str, Shape]:
  """Returns name -> shape of every tensor of the model in 'hf' or 'gguf'.

  Axes are in numpy's order; GGUF stores them reversed.
  """
  shapes = {}
  for row in rows(layout):
    parts = TRANSFORMS[row.transform].shapes(layout.shapes[row.library])
    if row.transform in _BY_TOKEN and layout.file_vocab:
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
      *(
          f'{name} has shape {tuple(found[name])}, not {tuple(shape)}'
          for name, shape in expected.items()
          if name in found and tuple(found[name]) != tuple(shape)
      ),
  ]
  if problems:
    shown = '; '.join(problems[:8])
    if len(problems) > 8:
      shown += f'; and {len(problems) - 8} more'
    raise errors.UserError(
        f'{where}: {shown}',
        f'the {len(expected)} tensors of the model, in its shapes',
        'choose the model that these weights belong to, or other weights',
    )


def to_library(
    layout: WeightLayout, form: str, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (library path, array), made from the tensors of a file.

  Args:
    layout: The model.
    form: 'hf' or 'gguf'.
    read: Returns the tensor of a name. It is called once per tensor, just
      before the tensor is needed.
  """
  for row in rows(layout):
    yield row.library, _to_library(layout, row, form, read)


def read_library_array(
    layout: WeightLayout,
    form: str,
    read: Callable[[str], np.ndarray],
    path: str,
) -> np.ndarray:
  """Returns one array of the library, made from the tensors of a file."""
  return _to_library(layout, _row(layout, path), form, read)


def tensor_of(layout: WeightLayout, path: str, form: str) -> str:
  """Returns the name of the first file tensor of a library array."""
  return getattr(_row(layout, path), form)[0]


def _row(layout, path):
  return rows(dataclasses.replace(
      layout, shapes={path: layout.shapes[path]}))[0]


def _to_library(layout, row, form, read):
  shape = layout.shapes[row.library]
  parts = [_offset(read(name), row, form, -1) for name in getattr(row, form)]
  array = TRANSFORMS[row.transform].to_library(parts, shape)
  if row.transform in _BY_TOKEN:
    array = resize_rows(array, shape[0])
  return np.ascontiguousarray(array)


def from_library(
    layout: WeightLayout, form: str, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (tensor name, array) of a file, made from the library's arrays.

  Args:
    layout: The model.
    form: 'hf' or 'gguf'.
    read: Returns the array of a library path. It is called once per array,
      just before the array is needed.
  """
  for row in rows(layout):
    array = np.asarray(read(row.library))
    if row.transform in _BY_TOKEN and layout.file_vocab:
      array = resize_rows(array, layout.file_vocab)
    parts = TRANSFORMS[row.transform].to_file(array)
    for name, part in zip(getattr(row, form), parts, strict=True):
      yield name, np.ascontiguousarray(_offset(part, row, form, 1))


def resize_rows(array_VD: np.ndarray, n_rows: int) -> np.ndarray:
  """Removes rows at the end, or appends rows of zeros."""
  missing = max(0, n_rows - len(array_VD))
  if missing:
    return np.pad(array_VD, ((0, missing), (0, 0)))
  return array_VD[:n_rows]


def _offset(
    array: np.ndarray, row: NameRow, form: str, sign: int
) -> np.ndarray:
  """Adds or subtracts the 1 that llama.cpp stores as part of the norms."""
  if form != 'gguf' or row.transform != 'norm':
    return array
  return array.astype(np.float32) + np.float32(sign)
