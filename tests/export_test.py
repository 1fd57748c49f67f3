"""What is exported is what was trained, or it is not exported."""

import json
import os
import pathlib
import shutil

import conftest
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from configs import tiny as tiny_config
from gemma_sft import errors
from gemma_sft import export
from gemma_sft import model as model_lib
from gemma_sft import train
from gemma_sft.exports import arrays as arrays_lib
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.run import restore
from gemma_sft.weights import adapters as adapters_lib
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import safetensors_file

_PYTHON = conftest.RUNTIME_PYTHON
needs_transformers = pytest.mark.skipif(
    not os.path.exists(_PYTHON),
    reason='no .venv-runtimes: bash launch/runtimes.sh makes it')

_FLAGS = dict(
    config=None, base=False, step=-1, hf_dtype='float32', shard_size=2.0,
    runtime_python=_PYTHON, llama_server=None, allow_unproven=False,
    overwrite=False, push=[],
    push_data='', private=False, dry_run=False)


def _make_config(tmp_path, generation=3):
  pairs = [(f'What is {i} and {i}?', f'It is {2 * i}.') for i in range(1, 11)]
  config = tiny_config.get_config(str(generation))
  config.task = 'chat'
  config.data.update(
      train=conftest.write_pairs(tmp_path / 'train.txt', pairs[:8]), test='',
      validation='', max_length=64)
  # No padding rows: what is exported can be loaded again.
  pieces = conftest.make_tokenizer(generation).vocab_size
  config.model.update(sliding_window=16, vocab_size=pieces)
  if generation == 4:  # Its sixth layer is the first global one.
    config.model.num_layers = 6
  config.model.update(
      weights=conftest.save_base(
          config, tmp_path / 'base', seed=1, change=_loud))
  # A rate at which four updates turn the model into another one.
  config.optimizer.update(learning_rate=0.05, schedule='constant')
  config.lora.update(
      targets='attn/|mlp/', rank=4, alpha=8.0, use_rslora=True)
  config.train.steps = 4
  config.eval.update(every=4, judged=0, prompts=())
  return config


def _loud(params):
  """Norms other than 1, so that leaving out the 1 is seen."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: leaf + jnp.asarray(
          rng.normal(0, 0.1, leaf.shape), jnp.float32)
      if leaf.ndim == 1 else leaf, params)


@pytest.fixture(scope='module', params=[3])
def run(request, tmp_path_factory):
  """(config, workdir) of a finished tiny run with adapters."""
  folder = tmp_path_factory.mktemp('run')
  config = _make_config(folder, request.param)
  train.main(config, str(folder / 'w'), False)
  return config, str(folder / 'w')


@pytest.fixture(scope='module', params=[1, 2, 4])
def other_run(request, tmp_path_factory):
  """The same of Gemma 1, 2 and 4."""
  folder = tmp_path_factory.mktemp('run')
  config = _make_config(folder, request.param)
  train.main(config, str(folder / 'w'), False)
  return config, str(folder / 'w')


@pytest.fixture(scope='module', params=[
    pytest.param((2, ''), id='gemma2'), pytest.param((3, ''), id='gemma3'),
    # Minutes of compilation, for what the others have each for itself.
    pytest.param((4, 'nf4'), id='gemma4_nf4', marks=pytest.mark.drill)])
def dora_run(request, tmp_path_factory):
  """The workdir of the same with DoRA."""
  folder = tmp_path_factory.mktemp('run')
  generation, quantization = request.param
  config = _make_config(folder, generation)
  config.lora.use_dora = True
  config.model.quantization = quantization
  train.main(config, str(folder / 'w'), False)
  return str(folder / 'w')


@pytest.fixture(scope='module')
def rounded_run(tmp_path_factory):
  """The workdir of the same on a base in nf4."""
  folder = tmp_path_factory.mktemp('run')
  config = _make_config(folder)
  config.model.quantization = 'nf4'
  train.main(config, str(folder / 'w'), False)
  return str(folder / 'w')


def _export(workdir, out, *formats, **changes):
  return export.main(**{
      **_FLAGS, 'workdir': workdir, 'out': str(out), 'formats': list(formats),
      **changes})


def _merged(workdir, config):
  """The tree that evaluation runs, path -> array."""
  served = restore.load_weights(config, workdir, base=False, step=-1)
  return {path: np.asarray(leaf)
          for path, leaf in traverse_util.flatten_dict(
              served.params, sep='/').items()}


def _load(path, config):
  model = served_model(config)
  resolved = load.resolve(str(path), pathlib.Path(path).parent / 'cache')
  load.check_config(resolved, model)
  params = load.load_params(
      resolved, model_lib.abstract_params(model), dtype=jnp.float32,
      layout=load.weight_layout(model))
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(
      params, sep='/').items()}


def served_model(config):
  from gemma_sft.run import base

  return base.load_model(config.model)


# The whole way ---------------------------------------------------------------


def _check_gguf_export(run, out, capsys):
  config, workdir = run
  _export(workdir, out, 'gguf-f32', 'gguf-f16', 'lora')
  printed = capsys.readouterr().out
  assert printed.count('proven ') == 3 and 'UNPROVEN' not in printed
  assert sorted(p.name for p in out.iterdir()) == [
      'README.md', 'export.json', 'gguf']
  told = json.loads((out / 'export.json').read_text())
  assert [row['proven'] for row in told['parity']] == [True] * 3
  assert all(row['equal'] for row in told['templates'])
  # llama.cpp's GELU table: 4e-7 was the worst seen on models of this size.
  assert all(row['kl_max'] < 5e-6 for row in told['parity']
             if row['artifact'] != 'gguf/model-f16.gguf')


def test_gguf_is_proven_and_loads_as_what_was_trained(run, tmp_path, capsys):
  config, workdir = run
  out = tmp_path / 'out'
  _check_gguf_export(run, out, capsys)
  modelfile = (out / 'gguf' / 'Modelfile').read_text()
  for line in ('FROM ./model-f16.gguf', 'PARAMETER temperature 0.2',
               'PARAMETER repeat_penalty 1.1', 'PARAMETER stop <end_of_turn>',
               'PARAMETER stop <eos>'):
    assert line in modelfile.replace('"', '')
  trained = _merged(workdir, config)
  loaded = _load(out / 'gguf' / 'model-f32.gguf', config)
  for path, array in trained.items():
    if 'norm' in path:  # 1 is added and taken off in float32.
      np.testing.assert_allclose(loaded[path], array, atol=1.2e-7)
    else:
      np.testing.assert_array_equal(loaded[path], array, err_msg=path)


def test_other_generations(other_run, tmp_path, capsys):
  _check_gguf_export(other_run, tmp_path / 'out', capsys)


@needs_transformers
def test_hf_and_peft_are_proven(run, tmp_path, capsys):
  config, workdir = run
  out = tmp_path / 'out'
  _export(workdir, out, 'hf', 'peft', shard_size=1e-4)
  assert 'NOT' not in capsys.readouterr().out
  assert len(list((out / 'hf').glob('model-*.safetensors'))) > 1
  told = json.loads((out / 'export.json').read_text())
  # Another order of the same f32 sums.
  assert all(row['proven'] and row['kl_max'] < 1e-9 for row in told['parity'])
  loaded = _load(out / 'hf', config)
  for path, array in _merged(workdir, config).items():
    np.testing.assert_array_equal(loaded[path], array, err_msg=path)


@needs_transformers
def test_other_generations_in_transformers(other_run, tmp_path, capsys):
  _export(other_run[1], tmp_path / 'out', 'hf', 'peft')
  assert capsys.readouterr().out.count('proven ') == 2


@needs_transformers
def test_dora_is_proven(dora_run, tmp_path, capsys):
  out = tmp_path / 'out'
  _export(dora_run, out, 'hf', 'peft')
  printed = capsys.readouterr().out
  assert printed.count('proven ') == 2 and 'NOT' not in printed
  told = json.loads((out / 'export.json').read_text())
  # Another order of the same f32 sums.
  assert all(row['kl_max'] < 1e-9 for row in told['parity'])
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
    _export(dora_run, tmp_path / 'out', 'gguf-f32', 'lora')
  assert '--formats=peft,gguf-q8_0' in str(error.value)
  assert list(tmp_path.iterdir()) == []
  _export(dora_run, tmp_path / 'out', 'gguf-f32')
  assert 'proven gguf/model-f32.gguf' in capsys.readouterr().out


def test_a_rounded_base_is_exported_as_it_was_trained_on(
    rounded_run, tmp_path, capsys):
  out = tmp_path / 'out'
  _export(rounded_run, out, 'gguf-f32', 'lora')
  assert 'rounded to nf4' in capsys.readouterr().out
  told = json.loads((out / 'export.json').read_text())
  assert told['base']['rounded_to'] == 'nf4'
  assert [row['proven'] for row in told['parity']] == [True, True]
  assert 'rounded to nf4 for training' in (out / 'README.md').read_text()


@pytest.mark.parametrize('form', ['gguf-f32', 'lora'])
def test_a_base_that_is_not_rounded_does_not_leave_the_house(
    rounded_run, tmp_path, monkeypatch, form):
  monkeypatch.setattr(arrays_lib, '_as_quantized', lambda read, kind: read)
  with pytest.raises(errors.UserError, match='is not the model that was'):
    _export(rounded_run, tmp_path / 'out', form)


def test_full_fine_tuning_is_exported(tmp_path, capsys):
  config = _make_config(tmp_path)
  config.lora.enabled = False
  config.optimizer.learning_rate = 0.01
  workdir = str(tmp_path / 'w')
  train.main(config, workdir, False)
  with pytest.raises(errors.UserError, match='there is no adapter'):
    _export(workdir, tmp_path / 'out', 'peft')
  _export(workdir, tmp_path / 'out', 'gguf-f32')
  assert 'proven gguf/model-f32.gguf' in capsys.readouterr().out
  arrays = arrays_lib.open_arrays(
      restore.choose_weights(config, workdir, base=False, step=-1))
  for path, array in _merged(workdir, config).items():
    np.testing.assert_array_equal(arrays.read(path), array)
    if path.endswith('einsum/w'):
      assert not np.array_equal(arrays.read_base(path), array)


def test_the_untouched_base_is_exported(run, tmp_path, capsys):
  _export(run[1], tmp_path / 'out', 'gguf-f32', base=True)
  assert 'proven' in capsys.readouterr().out


# Planted faults --------------------------------------------------------------


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


def _plant(monkeypatch, module, fault):
  write, held = module.write_model, {}

  def planted(*args, **kwargs):
    stream = kwargs.get('tensors', args[1] if len(args) > 1 else None)
    changed = ((n, np.ascontiguousarray(fault(n, a, held))) for n, a in stream)
    if 'tensors' in kwargs:
      return write(*args, **{**kwargs, 'tensors': changed})
    return write(args[0], changed, *args[2:], **kwargs)

  monkeypatch.setattr(module, 'write_model', planted)


@pytest.mark.parametrize('fault, named', [
    (_without_plus_one, r'output_norm\.weight'),
    (_swapped('attn_k.', 'attn_v.'), r'blk\.0\.attn_v\.weight'),
    (_swapped('ffn_gate.', 'ffn_up.'), r'blk\.0\.ffn_up\.weight'),
    (_transposed_heads, r'blk\.0\.attn_q\.weight'),
], ids=['norm', 'key_value', 'gate_up', 'heads'])
def test_a_wrong_gguf_does_not_leave_the_house(
    run, tmp_path, monkeypatch, fault, named):
  _plant(monkeypatch, gguf_writer, fault)
  with pytest.raises(errors.UserError, match=f'first wrong tensor: {named}'):
    _export(run[1], tmp_path / 'out', 'gguf-q8_0')
  assert not (tmp_path / 'out').exists()
  assert (tmp_path / 'out.partial' / 'gguf' / 'model-q8_0.gguf').exists()


@needs_transformers
@pytest.mark.parametrize('fault, named', [
    (_swapped('k_proj', 'v_proj'), r'model\.layers\.0\.self_attn\.v_proj'),
    (_transposed_heads, r'model\.layers\.0\.self_attn\.q_proj'),
], ids=['key_value', 'heads'])
def test_a_wrong_hf_folder_does_not_leave_the_house(
    run, tmp_path, monkeypatch, fault, named):
  _plant(monkeypatch, safetensors_file, fault)
  with pytest.raises(errors.UserError, match=f'first wrong tensor: {named}'):
    _export(run[1], tmp_path / 'out', 'hf')
  assert not (tmp_path / 'out').exists()


@needs_transformers
@pytest.mark.parametrize('dora_run', [(3, '')], indirect=True)
def test_wrong_magnitudes_do_not_leave_the_house(
    dora_run, tmp_path, monkeypatch):
  make = adapters_lib.peft_tensors

  def swapped(*args):
    tensors = make(*args)
    return tensors | {
        name: tensors[name.replace('v_proj', 'k_proj')]
        for name in tensors if name.endswith('v_proj.lora_magnitude_vector')}

  monkeypatch.setattr(adapters_lib, 'peft_tensors', swapped)
  with pytest.raises(errors.UserError, match='peft is not the model'):
    _export(dora_run, tmp_path / 'out', 'peft')
  assert not (tmp_path / 'out').exists()


@needs_transformers
def test_an_untied_head_does_not_leave_the_house(run, tmp_path, monkeypatch):
  write = writer.write_hf

  def untied(folder, *args, **kwargs):
    write(folder, *args, **kwargs)
    config = json.loads((folder / 'config.json').read_text())
    config['tie_word_embeddings'] = False
    (folder / 'config.json').write_text(json.dumps(config))
    opened = safetensors_file.open_folder(folder)
    head = opened.read('model.embed_tokens.weight')[::-1].copy()
    safetensors_file.write_file(
        folder / 'head.safetensors', {'lm_head.weight': head})
    index = {n: 'model.safetensors' for n in opened.shapes}
    index['lm_head.weight'] = 'head.safetensors'
    (folder / safetensors_file.INDEX).write_text(json.dumps(
        {'metadata': {'total_size': 0}, 'weight_map': index}))
    os.rename(folder / 'model.safetensors', folder / 'x.safetensors')
    os.rename(folder / 'x.safetensors', folder / 'model.safetensors')

  monkeypatch.setattr(writer, 'write_hf', untied)
  with pytest.raises(errors.UserError, match='head'):
    _export(run[1], tmp_path / 'out', 'hf')
  assert not (tmp_path / 'out').exists()


def test_another_template_does_not_leave_the_house(run, tmp_path, monkeypatch):
  made = writer.templates.jinja

  def changed(generation):
    return made(generation).replace("'model'", "'assistant'").replace(
        'model\\n', 'assistant\\n')

  monkeypatch.setattr(writer.templates, 'jinja', changed)
  with pytest.raises(errors.UserError, match='other tokens for the conversat'):
    _export(run[1], tmp_path / 'out', 'gguf-f32')


def test_other_metadata_do_not_leave_the_house(run, tmp_path, monkeypatch):
  made = writer.architecture.gguf_metadata

  def changed(*args, **kwargs):
    kind, metadata = made(*args, **kwargs)
    key = f'{kind}.attention.sliding_window'
    return kind, metadata | {key: metadata[key] // 2}

  monkeypatch.setattr(writer.architecture, 'gguf_metadata', changed)
  with pytest.raises(errors.UserError, match='every tensor is its source'):
    _export(run[1], tmp_path / 'out', 'gguf-f32')


def test_a_lora_gguf_that_does_nothing_does_not_leave_the_house(
    run, tmp_path, monkeypatch):
  write = gguf_writer.write_adapter
  monkeypatch.setattr(
      gguf_writer, 'write_adapter',
      lambda *a, **k: write(*a, **k | {'alpha': 1e-9}))
  with pytest.raises(errors.UserError, match='is not the model that was'):
    _export(run[1], tmp_path / 'out', 'lora')


# Round trips -----------------------------------------------------------------


@pytest.mark.parametrize('form', ['hf', 'gguf-f32'])
def test_round_trip_is_equal_to_the_bit(run, tmp_path, form, monkeypatch):
  config, workdir = run
  monkeypatch.setattr(export, '_prove', _no_proof)
  monkeypatch.setattr(export, '_find_runtimes', _no_runtimes)
  first = tmp_path / 'first'
  _export(workdir, first, form)
  path = first / ('hf' if form == 'hf' else 'gguf/model-f32.gguf')
  again = config.copy_and_resolve_references()
  again.model.weights = str(path)
  # The built-in tokenizer lies with neither of them.
  again.model.tokenizer = 'byte'
  second = tmp_path / 'second'
  _export(workdir, second, form, config=again, base=True)
  if form == 'hf':
    a, b = (safetensors_file.open_folder(f / 'hf') for f in (first, second))
  else:
    from gemma_sft.weights import gguf_file

    a, b = (gguf_file.open_gguf(f / 'gguf' / 'model-f32.gguf')
            for f in (first, second))
  assert set(a.shapes) == set(b.shapes) and len(a.shapes) > 20
  for name in a.shapes:
    np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def _no_runtimes(*_):
  return export.Runtimes(None, None, {})


def _no_proof(job, *_):
  from gemma_sft.exports import divergence

  return verify.Result('none', divergence.Comparison(
      kind=job.kind, max_logit_difference=0.0, kl_mean=0.0, kl_max=0.0,
      n_positions=1, greedy_equal=1, greedy_near_ties=0, greedy_total=1,
      limit=1.0, passed=True), {})


# Mistakes --------------------------------------------------------------------


def test_missing_runtime_is_told_before_anything_is_written(run, tmp_path):
  with pytest.raises(errors.UserError, match='no program') as error:
    _export(run[1], tmp_path / 'out', 'gguf-f32', llama_server='/nowhere')
  assert 'gemma_sft[export]' in str(error.value)
  with pytest.raises(errors.UserError, match='transformers and peft') as error:
    _export(run[1], tmp_path / 'out', 'hf', runtime_python='/nowhere')
  assert 'launch/runtimes.sh' in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_unproven_is_written_on_the_card(run, tmp_path, capsys):
  out = tmp_path / 'out'
  _export(run[1], out, 'gguf-f32', llama_server='/nowhere',
          allow_unproven=True)
  assert 'UNPROVEN gguf/model-f32.gguf' in capsys.readouterr().out
  card = (out / 'README.md').read_text()
  assert 'gguf/model-f32.gguf' in card[:card.index('## Scores')]
  told = json.loads((out / 'export.json').read_text())
  assert not told['parity'][0]['proven']


def test_an_unproven_export_does_not_stand_for_a_proven_one(
    run, tmp_path, capsys):
  out = tmp_path / 'out'
  _export(run[1], out, 'gguf-f32', llama_server='/nowhere',
          allow_unproven=True)
  with pytest.raises(errors.UserError, match='--overwrite'):
    _export(run[1], out, 'gguf-f32')
  _export(run[1], out, 'gguf-f32', overwrite=True)
  assert 'proven gguf/model-f32.gguf' in capsys.readouterr().out
  told = json.loads((out / 'export.json').read_text())
  assert told['parity'][0]['proven']


def test_dry_run_writes_nothing(run, tmp_path, capsys):
  _export(run[1], tmp_path / 'out', 'hf', 'gguf-q8_0', dry_run=True)
  assert 'gguf/model-q8_0.gguf: ' in capsys.readouterr().out
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('changes, message', [
    (dict(formats=['gguf-q9']), 'gguf-q8_0'),
    (dict(formats=['peft'], base=True), 'there is no adapter'),
    (dict(shard_size=0.0), 'gigabytes'),
    (dict(push=['me']), 'ORGANISATION/NAME'),
    (dict(step=3), 'no checkpoint of step 3'),
])
def test_mistakes(run, tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message):
    export.main(**{**_FLAGS, 'workdir': run[1], 'out': str(tmp_path / 'o'),
                   'formats': ['gguf-f32'], **changes})
  assert list(tmp_path.iterdir()) == []


def test_out_must_be_new_or_an_export(run, tmp_path, capsys):
  with pytest.raises(errors.UserError, match='exists'):
    _export(run[1], tmp_path, 'gguf-f32', overwrite=True)
  out, lax = tmp_path / 'out', dict(
      llama_server='/nowhere', allow_unproven=True)
  _export(run[1], out, 'gguf-f32', **lax)
  before = (out / 'export.json').stat().st_mtime_ns
  _export(run[1], out, 'gguf-f32', **lax)
  assert 'is this export already' in capsys.readouterr().out
  assert (out / 'export.json').stat().st_mtime_ns == before
  with pytest.raises(errors.UserError, match='--overwrite'):
    _export(run[1], out, 'gguf-f16', **lax)
  _export(run[1], out, 'gguf-f16', overwrite=True, **lax)
  assert [p.name for p in (out / 'gguf').glob('*.gguf')] == ['model-f16.gguf']
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_no_checkpoints(run, tmp_path):
  with pytest.raises(errors.UserError, match='no checkpoints'):
    _export(str(tmp_path / 'w'), tmp_path / 'o', 'gguf-f32', config=run[0])


def test_adapter_of_another_base(run, tmp_path):
  config = run[0].copy_and_resolve_references()
  config.model.weights = conftest.save_base(config, tmp_path / 'b', seed=2)
  with pytest.raises(errors.UserError, match='base weights'):
    _export(run[1], tmp_path / 'o', 'gguf-f32', config=config)


def test_full_disk_is_told_before_the_first_byte(run, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(errors.UserError, match='50.0 MB free'):
    _export(run[1], tmp_path / 'out', 'gguf-f32')
  assert list(tmp_path.iterdir()) == []


def test_help_names_every_format():
  status, out, _ = conftest.run_module('export', '--help')
  assert status == 0
  for name in gguf_writer.QUANTIZATIONS:
    assert f'gguf-{name}' in out


def test_a_push_without_a_network_leaves_the_files(run, tmp_path, monkeypatch):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setenv('HF_TOKEN', 'hf_' + 20 * 'x')
  # Port 1: nobody listens there.
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
  out, lax = tmp_path / 'out', dict(
      llama_server='/nowhere', allow_unproven=True)
  for _ in range(2):  # Also of an export that is there already.
    with pytest.raises(errors.UserError, match='the files stay in') as error:
      _export(run[1], out, 'gguf-f32', push=['me/model'], **lax)
    assert 'hf_x' not in str(error.value)
    assert (out / 'gguf' / 'model-f32.gguf').exists()
