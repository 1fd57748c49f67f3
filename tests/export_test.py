"""What is exported is what was trained, or it is not exported."""

import functools
import json
import os
import pathlib
import re
import shutil

import conftest
from exports import modelfile_parser
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from configs import tiny as tiny_config
from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import export
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.exports import arrays as arrays_lib
from gemma_sft.exports import formats
from gemma_sft.exports import llama_runtime
from gemma_sft.exports import templates
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.run import base
from gemma_sft.run import restore
from gemma_sft.weights import adapters as adapters_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import gguf_file
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import safetensors_file

needs_transformers = pytest.mark.skipif(
    not os.path.exists(conftest.RUNTIME_PYTHON),
    reason='no .venv-runtimes: bash launch/runtimes.sh makes it')

_FLAGS = dict(
    config=None, base=False, step=-1, hf_dtype='float32', shard_size=2.0,
    runtime_python=conftest.RUNTIME_PYTHON, llama_server=None,
    allow_unproven=False, overwrite=False, push=[], push_data='', private=False,
    dry_run=False)
_UNPROVEN = dict(
    allow_unproven=True, runtime_python='/nowhere', llama_server='/nowhere')


@pytest.fixture(autouse=True, scope='module')
def _once():
  """Uses one device and thread; makes the reference of a workdir once."""
  make, references = export._make_reference, {}

  def make_once(config, *key):
    if key not in references:
      references[key] = make(config, *key)
    return references[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('OMP_NUM_THREADS', '1')  # Of PyTorch.
    patch.setattr(export, '_make_reference', make_once)
    patch.setattr(sharding, 'make_mesh', functools.partial(
        sharding.make_mesh, devices=jax.devices()[:1]))
    patch.setattr(llama_runtime, 'Server', functools.partial(
        llama_runtime.Server, threads=1))
    patch.setitem(formats._RUNTIMES, 'transformers', (
        functools.cache(verify.find_python), verify.prove_hf))
    yield


def _make_config(tmp_path, generation):
  pairs = [(f'What is {i} and {i}?', f'It is {2 * i}.') for i in range(1, 9)]
  config = tiny_config.get_config(str(generation))
  config.task = 'chat'
  config.data.update(
      train=conftest.write_pairs(tmp_path / 'train.txt', pairs), test='',
      validation='', max_length=64)
  # No padding rows: what is exported can be loaded again.
  pieces = conftest.make_tokenizer(generation).vocab_size
  config.model.update(sliding_window=16, vocab_size=pieces)
  if generation == 4:  # Its sixth layer is the first global one.
    config.model.num_layers = 6
  config.model.weights = conftest.save_base(
      config, tmp_path / 'base', seed=1, change=_loud)
  # A rate at which four updates turn the model into another one.
  config.optimizer.update(learning_rate=0.05, schedule='constant')
  config.lora.update(targets='attn/|mlp/', rank=4, alpha=8.0, use_rslora=True)
  config.train.steps = 4
  config.eval.update(every=4, judged=0, prompts=())
  return config


def _loud(params):
  """Norms other than 1, so that leaving out the 1 is seen."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
      if leaf.ndim == 1 else leaf, params)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns a function that trains a tiny run once: (config, workdir)."""
  @functools.cache
  def train_once(generation, **changes):
    folder = tmp_path_factory.mktemp('run')
    config = _make_config(folder, generation)
    config.update_from_flattened_dict(changes)
    train.main(config, str(folder / 'w'), False)
    return config, str(folder / 'w')
  return train_once


@pytest.fixture(scope='module')
def run(trained):
  return trained(3)


@pytest.fixture(scope='module', params=[3, 1, 2, 4], ids=lambda g: f'gemma{g}')
def any_run(request, trained):
  return trained(request.param)


@pytest.fixture(scope='module', params=[
    pytest.param((2, ''), id='gemma2'), pytest.param((3, ''), id='gemma3'),
    # Minutes of compilation, for what the others have each for itself.
    pytest.param((4, 'nf4'), id='gemma4_nf4', marks=pytest.mark.drill)])
def dora_run(request, trained):
  generation, quantization = request.param
  return trained(generation, **{
      'lora.use_dora': True, 'model.quantization': quantization})


@pytest.fixture(scope='module')
def rounded_run(trained):
  return trained(3, **{'model.quantization': 'nf4'})


def _export(workdir, out, *formats, **changes):
  return export.main(**{
      **_FLAGS, 'workdir': workdir, 'out': str(out), 'formats': list(formats),
      **changes})


def _summary(out):
  return json.loads((out / 'export.json').read_text())


def _prove(capsys, workdir, out, *formats, **changes):
  """Exports with proof; returns what was printed and the summary."""
  _export(workdir, out, *formats, **changes)
  printed, summary = capsys.readouterr().out, _summary(out)
  assert printed.count('proven ') == len(formats)
  assert 'NOT' not in printed and 'UNPROVEN' not in printed
  assert [row['proven'] for row in summary['parity']] == [True] * len(formats)
  return printed, summary


def _flat(params):
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(
      params, sep='/').items()}


def _merged(workdir, config):
  """The tree that evaluation runs, path -> array."""
  return _flat(restore.load_weights(
      config, workdir, base=False, step=-1).params)


def _load(path, config):
  model = base.load_model(config.model)
  resolved = load.resolve(str(path), pathlib.Path(path).parent / 'cache')
  load.check_config(resolved, model)
  return _flat(load.load_params(
      resolved, model_lib.abstract_params(model), dtype=jnp.float32,
      layout=load.weight_layout(model)))


def test_gguf_is_proven_and_loads_as_what_was_trained(
    any_run, tmp_path, capsys):
  config, workdir = any_run
  out, generation = tmp_path / 'out', config.model.generation
  _, summary = _prove(capsys, workdir, out, 'gguf-f32', 'gguf-f16', 'lora')
  assert sorted(p.name for p in out.iterdir()) == [
      'README.md', 'export.json', 'gguf']
  assert all(row['equal'] for row in summary['templates'])
  # llama.cpp's GELU table: 4e-7 was the worst seen on models of this size.
  assert all(
      row['kl_max'] < 5e-6 and row['max_difference'] < 0.02
      for row in summary['parity'] if row['artifact'] != 'gguf/model-f16.gguf')
  modelfile = (out / 'gguf' / 'Modelfile').read_text()
  assert set(modelfile_parser.parse(modelfile)) >= {
      ('from', './model-f16.gguf'), ('parameter temperature', '0.2'),
      ('parameter repeat_penalty', '1.1'), ('parameter stop', '<eos>'),
      ('parameter stop', chat.TURN_TAGS[generation][1]),
      ('template', templates.ollama(generation))}
  if generation in (2, 4):
    # A GGUF does not say which of both layouts of gate and up a Gemma 2 of this
    # size has, and those of Gemma 4 are not read.
    return
  loaded = _load(out / 'gguf' / 'model-f32.gguf', config)
  for path, array in _merged(workdir, config).items():
    # For norms, 1 is added and taken off in float32.
    tolerance = dict(atol=1.2e-7) if 'norm' in path else dict(rtol=0)
    np.testing.assert_allclose(
        loaded[path], array, err_msg=path, **tolerance)


@needs_transformers
def test_hf_and_peft_are_proven(any_run, tmp_path, capsys):
  config, workdir = any_run
  out = tmp_path / 'out'
  _, summary = _prove(capsys, workdir, out, 'hf', 'peft', shard_size=1e-4)
  assert len(list((out / 'hf').glob('model-*.safetensors'))) > 1
  # Another order of the same f32 sums.
  assert all(row['kl_max'] < 1e-9 for row in summary['parity'])
  assert re.fullmatch(
      r'\d[\w.]+, peft \d[\w.]+', summary['parity'][1]['version'])
  loaded = _load(out / 'hf', config)
  for path, array in _merged(workdir, config).items():
    np.testing.assert_array_equal(loaded[path], array, err_msg=path)


@needs_transformers
def test_dora_is_proven(dora_run, tmp_path, capsys):
  out = tmp_path / 'out'
  _, summary = _prove(capsys, dora_run[1], out, 'hf', 'peft')
  # Another order of the same f32 sums.
  assert all(row['kl_max'] < 1e-9 for row in summary['parity'])
  adapter = json.loads((out / 'peft' / 'adapter_config.json').read_text())
  assert adapter['use_dora'] is True
  found = safetensors_numpy.load_file(
      out / 'peft' / 'adapter_model.safetensors')
  factors = [name for name in found if name.endswith('.lora_B.weight')]
  assert len(factors) == len(found) / 3
  for name in factors:
    magnitude = found[name.replace('B.weight', 'magnitude_vector')]
    assert magnitude.shape == found[name].shape[:1]


def test_dora_is_merged_into_a_gguf(dora_run, tmp_path, capsys):
  with pytest.raises(errors.UserError, match='magnitudes') as error:
    _export(dora_run[1], tmp_path / 'out', 'gguf-f32', 'lora')
  assert '--formats=peft,gguf-q8_0' in str(error.value)
  assert list(tmp_path.iterdir()) == []
  _prove(capsys, dora_run[1], tmp_path / 'out', 'gguf-f32')


def test_a_rounded_base_is_exported_as_it_was_trained_on(
    rounded_run, tmp_path, capsys):
  out = tmp_path / 'out'
  printed, summary = _prove(capsys, rounded_run[1], out, 'gguf-f32', 'lora')
  assert 'rounded to nf4' in printed
  assert summary['base']['rounded_to'] == 'nf4'
  assert 'rounded to nf4 for training' in (out / 'README.md').read_text()


def test_full_fine_tuning_is_exported(trained, tmp_path, capsys):
  config, workdir = trained(3, **{
      'lora.enabled': False, 'optimizer.learning_rate': 0.01})
  with pytest.raises(errors.UserError, match='there is no adapter'):
    _export(workdir, tmp_path / 'out', 'peft')
  _prove(capsys, workdir, tmp_path / 'out', 'gguf-f32')
  arrays = arrays_lib.open_arrays(
      restore.choose_weights(config, workdir, base=False, step=-1))
  for path, array in _merged(workdir, config).items():
    np.testing.assert_array_equal(arrays.read(path), array)
    if path.endswith('einsum/w'):
      assert not np.array_equal(arrays.read_base(path), array)


def test_the_command_takes_its_flags(run, tmp_path):
  status, out, err = conftest.run_module(
      'export', f'--workdir={run[1]}', f'--out={tmp_path / "out"}',
      '--formats=gguf-f32', '--dry_run', devices=1)
  assert status == 0, err
  assert 'gguf/model-f32.gguf: ' in out and not (tmp_path / 'out').exists()


def test_the_untouched_base_is_exported(run, tmp_path, capsys):
  _prove(capsys, run[1], tmp_path / 'out', 'gguf-f32', base=True)


def _without_plus_one(name, array, _):
  return array - 1 if name.endswith('norm.weight') else array


def _swapped(first, second):
  def plant(name, array, held):
    # The second of the pair comes after the first: it is written twice.
    if first in name:
      held[first] = array
    return held[first] if second in name else array
  return plant


def _transposed_heads(name, array, _):
  if 'attn_q.' not in name and 'q_proj' not in name:
    return array
  return array.reshape(4, -1, array.shape[1]).swapaxes(0, 1).reshape(
      array.shape)


def _replace(module, name, change):
  """Returns what puts `change(function)` in the place of a function."""
  return lambda monkeypatch: monkeypatch.setattr(
      module, name, change(getattr(module, name)))


def _plant(module, fault):
  """Returns what changes the tensors that `module.write_model` writes."""
  write, held = module.write_model, {}

  def planted(path, *args, tensors, **kwargs):
    write(path, *args, **kwargs, tensors=(
        (n, np.ascontiguousarray(fault(n, a, held))) for n, a in tensors))

  return _replace(module, 'write_model', lambda _: planted)


_gguf = functools.partial(_plant, gguf_writer)
_hf = functools.partial(_plant, safetensors_file)


def _untied(write):
  def changed(folder, *args, **kwargs):
    write(folder, *args, **kwargs)
    config = json.loads((folder / 'config.json').read_text())
    config['tie_word_embeddings'] = False
    (folder / 'config.json').write_text(json.dumps(config))
    file = folder / 'model.safetensors'
    tensors = safetensors_numpy.load_file(file)
    head = tensors['model.embed_tokens.weight'][::-1].copy()
    safetensors_file.write_file(file, tensors | {'lm_head.weight': head})
  return changed


def _assistant(make):
  return lambda generation: make(generation).replace(
      "'model'", "'assistant'").replace('model\\n', 'assistant\\n')


def _half_the_window(make):
  def changed(*args, **kwargs):
    kind, metadata = make(*args, **kwargs)
    return kind, metadata | {'gemma3.attention.sliding_window': 8}
  return changed


# Format, fault, message.
_FAULTS = {
    'norm': ('gguf-q8_0', _gguf(_without_plus_one),
             'first wrong tensor: output_norm.weight'),
    'key_value': ('gguf-q8_0', _gguf(_swapped('attn_k.', 'attn_v.')),
                  'first wrong tensor: blk.0.attn_v.weight'),
    'gate_up': ('gguf-q8_0', _gguf(_swapped('ffn_gate.', 'ffn_up.')),
                'first wrong tensor: blk.0.ffn_up.weight'),
    'heads': ('gguf-q8_0', _gguf(_transposed_heads),
              'first wrong tensor: blk.0.attn_q.weight'),
    'template': ('gguf-f32', _replace(templates, 'jinja', _assistant),
                 'other tokens for the conversat'),
    'metadata': ('gguf-f32', _replace(
        architecture, 'gguf_metadata', _half_the_window),
                 'every tensor is its source'),
    'adapter': ('lora', _replace(gguf_writer, 'write_adapter', lambda write: (
        lambda *a, **k: write(*a, **k | {'alpha': 1e-9}))),
                'is not the model that was'),
    'hf_key_value': ('hf', _hf(_swapped('k_proj', 'v_proj')),
                     'first wrong tensor: model.layers.0.self_attn.v_proj'),
    'hf_heads': ('hf', _hf(_transposed_heads),
                 'first wrong tensor: model.layers.0.self_attn.q_proj'),
    'hf_untied_head': ('hf', _replace(writer, 'write_hf', _untied), 'head')}


@pytest.mark.parametrize('fault', _FAULTS)
def test_a_wrong_file_is_not_exported(run, tmp_path, monkeypatch, fault):
  name, plant, message = _FAULTS[fault]
  if name == 'hf' and not os.path.exists(conftest.RUNTIME_PYTHON):
    pytest.skip('no transformers')
  plant(monkeypatch)
  with pytest.raises(errors.UserError, match=re.escape(message)):
    _export(run[1], tmp_path / 'out', name)
  assert not (tmp_path / 'out').exists()
  assert (tmp_path / 'out.partial' / formats.FORMATS[name].path).exists()


def test_a_base_that_is_not_rounded_is_not_exported(
    rounded_run, tmp_path, monkeypatch):
  monkeypatch.setattr(arrays_lib, '_as_quantized', lambda read, kind: read)
  with pytest.raises(errors.UserError) as error:
    _export(rounded_run[1], tmp_path / 'out', 'gguf-f32', 'lora')
  assert error.value.got.count('is not the model that was') == 2


def _swapped_magnitudes(make):
  return lambda *args: {
      name: make(*args)[name.replace('v_proj', 'k_proj')
                        if name.endswith('magnitude_vector') else name]
      for name in make(*args)}


@needs_transformers
@pytest.mark.parametrize('dora_run', [(3, '')], indirect=True)
def test_wrong_magnitudes_are_not_exported(dora_run, tmp_path, monkeypatch):
  _replace(adapters_lib, 'peft_tensors', _swapped_magnitudes)(monkeypatch)
  with pytest.raises(errors.UserError, match='peft is not the model') as error:
    _export(dora_run[1], tmp_path / 'out', 'peft')
  assert 'tensor' not in error.value.got  # Adapters are not compared by tensor.
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name, open_file', [
    ('hf', safetensors_file.open_folder), ('gguf-f32', gguf_file.open_gguf)])
def test_round_trip_is_equal_to_the_bit(run, tmp_path, name, open_file):
  config, workdir = run
  path = formats.FORMATS[name].path
  _export(workdir, tmp_path / 'first', name, **_UNPROVEN)
  again = config.copy_and_resolve_references()
  again.model.weights = str(tmp_path / 'first' / path)
  # The built-in tokenizer is in neither of the files.
  again.model.tokenizer = 'byte'
  _export(workdir, tmp_path / 'second', name, config=again, base=True,
          **_UNPROVEN)
  a, b = (open_file(tmp_path / f / path) for f in ('first', 'second'))
  assert set(a.shapes) == set(b.shapes) and len(a.shapes) > 20
  for tensor in a.shapes:
    np.testing.assert_array_equal(
        a.read(tensor), b.read(tensor), err_msg=tensor)


def test_unproven_and_earlier_exports(run, tmp_path, capsys):
  out = tmp_path / 'out'
  _export(run[1], out, 'gguf-f32', **_UNPROVEN)
  assert 'UNPROVEN gguf/model-f32.gguf' in capsys.readouterr().out
  readme = (out / 'README.md').read_text()
  assert 'gguf/model-f32.gguf' in readme[:readme.index('## Scores')]
  assert not _summary(out)['parity'][0]['proven']
  before = (out / 'export.json').stat().st_mtime_ns
  _export(run[1], out, 'gguf-f32', **_UNPROVEN)
  assert 'is this export already' in capsys.readouterr().out
  assert (out / 'export.json').stat().st_mtime_ns == before
  # Other formats, and an unproven export does not count as a proven one.
  for name, options in (('gguf-f16', _UNPROVEN), ('gguf-f32', {})):
    with pytest.raises(errors.UserError, match='--overwrite'):
      _export(run[1], out, name, **options)
  _export(run[1], out, 'gguf-f16', overwrite=True, **_UNPROVEN)
  assert [p.name for p in (out / 'gguf').glob('*.gguf')] == ['model-f16.gguf']
  capsys.readouterr()
  printed, _ = _prove(capsys, run[1], out, 'gguf-f32', overwrite=True)
  assert 'proven gguf/model-f32.gguf' in printed
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  # A folder that is no export.
  with pytest.raises(errors.UserError, match='exists'):
    _export(run[1], tmp_path, 'gguf-f32', overwrite=True)


@pytest.mark.parametrize('changes, message', [
    (dict(formats=['gguf-q9']), 'gguf-q8_0'),
    (dict(formats=['peft'], base=True), 'there is no adapter'),
    (dict(shard_size=0.0), 'gigabytes'),
    (dict(push=['me']), 'ORGANISATION/NAME'),
    (dict(step=3), 'no checkpoint of step 3'),
    (dict(llama_server='/nowhere'), r'(?s)not a program.*gemma_sft\[export\]'),
    (dict(formats=['hf'], runtime_python='/nowhere'),
     '(?s)transformers and peft.*launch/runtimes.sh')])
def test_mistakes_are_found_before_writing(run, tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message):
    export.main(**{**_FLAGS, 'workdir': run[1], 'out': str(tmp_path / 'o'),
                   'formats': ['gguf-f32'], **changes})
  assert list(tmp_path.iterdir()) == []


def test_no_checkpoints_and_another_base(run, tmp_path):
  with pytest.raises(errors.UserError, match='no checkpoints'):
    _export(str(tmp_path / 'w'), tmp_path / 'o', 'gguf-f32', config=run[0])
  config = run[0].copy_and_resolve_references()
  config.model.weights = conftest.save_base(config, tmp_path / 'b', seed=2)
  with pytest.raises(errors.UserError, match='base weights'):
    _export(run[1], tmp_path / 'o', 'gguf-f32', config=config)


def test_a_dry_run_and_a_full_disk_write_nothing(
    run, tmp_path, monkeypatch, capsys):
  _export(run[1], tmp_path / 'out', 'hf', 'gguf-q8_0', dry_run=True)
  assert 'gguf/model-q8_0.gguf: ' in capsys.readouterr().out
  usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(errors.UserError, match='50.0 MB free'):
    _export(run[1], tmp_path / 'out', 'gguf-f32')
  assert list(tmp_path.iterdir()) == []


def test_help_names_every_format():
  status, out, _ = conftest.run_module('export', '--help')
  assert status == 0
  for name in formats.FORMATS:
    assert re.search(rf'\b{name}[,.]', out)


def test_a_push_without_a_network_leaves_the_files(run, tmp_path, monkeypatch):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setenv('HF_TOKEN', 'hf_' + 20 * 'x')
  # Port 1: nobody listens there.
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
  out = tmp_path / 'out'
  for _ in range(2):  # Also of an export that is there already.
    with pytest.raises(errors.UserError, match='the files stay in') as error:
      _export(run[1], out, 'gguf-f32', push=['me/model'], **_UNPROVEN)
    assert 'hf_x' not in str(error.value)
    assert (out / 'gguf' / 'model-f32.gguf').exists()
