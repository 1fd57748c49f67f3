"""Checking, saving and comparing configs."""

import importlib
import json

import ml_collections
import pytest

from configs import default
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.nn import attention


@pytest.fixture
def valid():
  config = default.get_config()
  config.data.train = 'train.txt'
  return config


def test_leaves_are_dotted_and_in_order(valid):
  keys = [key for key, _ in config_lib.leaves(valid)]
  assert keys == sorted(set(keys), key=lambda key: key.split('.'))
  assert dict(config_lib.leaves({'a': {'b': (1, 2)}, 'c': 'x'})) == {
      'a.b': [1, 2], 'c': 'x'}


def test_a_config_comes_back_from_json(valid):
  valid.lora.rank = 3
  valid.data.buckets = (16, 32)
  valid.eval.prompts = ('What?',)
  text = config_lib.to_json(valid)
  assert json.loads(text)['lora.rank'] == 3
  back = config_lib.from_json(text, default.get_config())
  assert back.to_dict() == valid.to_dict()
  assert back.data.buckets == (16, 32)  # A tuple again.
  assert back.is_locked and isinstance(valid, ml_collections.ConfigDict)
  with pytest.raises(AttributeError, match='rnk'):
    valid.lora.rnk = 3


def test_a_saved_config_may_lack_newer_keys_and_have_keys_of_curation(valid):
  saved = json.loads(config_lib.to_json(valid))
  # Before curation had its own config, a run saved its settings too.
  older = saved | {'curate.source': 'raw.csv', 'curate.text': ['text']}
  template = default.get_config()
  back = config_lib.from_json(json.dumps(older), template)
  assert config_lib.differences(older, back) == []
  del saved['sampling.top_p']
  back = config_lib.from_json(json.dumps(saved), template)
  assert back.sampling.top_p == template.sampling.top_p
  assert template.data.train == ''  # The template is not written to.
  assert config_lib.differences({'lora.a': 1}, {'lora.b': 2}) == [
      'lora.a: 1 -> None', 'lora.b: None -> 2']


@pytest.mark.parametrize('key, value', (
    ('lora.rank', 8), ('seed', 1), ('data.train', 'other'), ('train.steps', 5),
    ('optimizer.learning_rate', 1.0), ('data.buckets', (8, 512)),
    ('data.repeat', 2), ('train.gradient_accumulation_steps', 2),
    ('model.dtype', 'float32'), ('init_from', 'w'),
    ('model.name', 'gemma3_1b'), ('train.loss_chunk', 8)))
def test_what_a_resume_may_not_change(valid, key, value):
  saved = dict(config_lib.leaves(valid))  # The form in a checkpoint.
  changed = valid.copy_and_resolve_references()
  changed.update_from_flattened_dict({key: value})
  assert config_lib.differences(saved, valid) == []
  as_list = list(value) if isinstance(value, tuple) else value
  assert config_lib.differences(saved, changed) == [
      f'{key}: {saved[key]!r} -> {as_list!r}']


@pytest.mark.parametrize('key, value', (
    ('deadline_minutes', 5.0), ('eval.every', 7), ('checkpoint.keep', 9),
    ('mesh.fsdp', 2), ('sampling.top_k', 5), ('train.log_every', 1),
    ('train.remat', 'block'), ('model.weights', '/moved'), ('data.test', 'x')))
def test_what_a_resume_may_change(valid, key, value):
  saved = dict(config_lib.leaves(valid))
  valid.update_from_flattened_dict({key: value})
  assert config_lib.differences(saved, valid) == []


@pytest.mark.parametrize('name, arg', (
    ('blop', '270m'), *(('tiny', generation) for generation in '1234')))
def test_every_config_is_a_valid_delta(name, arg):
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  config_lib.validate(config)
  assert config.is_locked
  assert {key for key, _ in config_lib.leaves(config)} == {
      key for key, _ in config_lib.leaves(default.get_config())}


def test_missing_weights_and_data_are_reported():
  config = importlib.import_module('configs.blop').get_config('gemma1_2b')
  with pytest.raises(errors.UserError, match="config.model.weights is ''"):
    config_lib.validate(config)
  config.model.weights = 'somewhere'
  config_lib.validate(config)
  with pytest.raises(errors.UserError, match="config.data.train is ''"):
    config_lib.validate(default.get_config())


_WRONG = {
    'data.max_length': [7], 'data.batch_size': [0], 'data.repeat': [0],
    'data.max_cut_share': [1.1, -0.1], 'data.columns': ['prompt'],
    'data.buckets': [(128, 512)],  # With packing.
    'seed': [2**70], 'optimizer.b1': [1.0], 'optimizer.b2': [1.5],
    'lora.rank': [0], 'lora.alpha': [0.0], 'lora.dropout': [1.0, -0.1],
    'lora.targets': ['('], 'lora.loraplus_lr_ratio': [0.0],
    'train.epochs': [0], 'train.steps': [-1], 'train.loss_chunk': [0],
    'train.gradient_accumulation_steps': [0], 'train.log_every': [0],
    'train.remat': ['blocks'], 'model.quantization': ['int3'],
    'model.attention': ['flash'], 'model.layers': ['unrolled'],
    'model.dtype': ['float8'],
    'optimizer.learning_rate': [0.0, float('nan'), float('inf')],
    'optimizer.schedule': ['cosin'], 'optimizer.warmup_ratio': [1.5],
    'optimizer.final_share': [-0.5], 'optimizer.max_grad_norm': [-1.0],
    'optimizer.weight_decay': [-1.0], 'eval.mode': ['least'],
    'eval.every': [-1], 'eval.judged': [-2],
    'eval.patience': [-1, 2],  # 2 needs validation data.
    'eval.max_new_tokens': [0], 'eval.batch_size': [0],
    'checkpoint.every': [-1], 'checkpoint.keep': [0],
    'sampling.temperature': [-0.1], 'sampling.repetition_penalty': [0.0],
    'sampling.top_k': [-1], 'sampling.top_p': [0.0, 1.1],
    'sampling.max_new_tokens': [0], 'deadline_minutes': [-1.0],
    'mesh.data': [0], 'mesh.fsdp': [-2], 'mesh.tensor': [0],
    'track.wandb': ['a b', 'a/b/c']}


@pytest.mark.parametrize('changes', [
    *({key: value} for key, values in _WRONG.items() for value in values),
    {'eval.metric': 'judge/exact', 'eval.judged': 0},
    {'model.name': 'custom', 'model.head_dim': 15},
    {'data.packing': False, 'data.buckets': ('a',)}], ids=str)
def test_a_value_out_of_range_is_named(valid, changes):
  valid.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError) as caught:
    config_lib.validate(valid)
  assert caught.value.got.startswith(f'config.{list(changes)[-1]} ')
  assert caught.value.fix


@pytest.mark.parametrize('key, value, near, others', (
    ('model.quantization', 'nf5', 'nf4', 'int8 or int4 or nf4'),
    ('model.attention', 'spalsh', 'splash', ' or '.join(attention.KERNELS))))
def test_a_wrong_choice_names_the_nearest(valid, key, value, near, others):
  valid.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=f"mean '{near}'") as caught:
    config_lib.validate(valid)
  assert others in caught.value.expected


@pytest.mark.parametrize('key', ('a1' * 20, 'wandb_v1_abc'))
def test_an_api_key_given_as_project_is_not_shown(valid, key):
  valid.track.wandb = key
  with pytest.raises(errors.UserError, match='looks like an API key') as caught:
    config_lib.validate(valid)
  assert key not in str(caught.value)


def test_the_defaults_and_values_at_their_limits_are_valid(valid):
  config_lib.validate(valid)
  valid.update_from_flattened_dict({
      'data.max_cut_share': 1.0, 'lora.dropout': 0.0, 'eval.judged': -1,
      'sampling.top_p': 1.0, 'sampling.temperature': 0.0, 'mesh.fsdp': -1,
      'optimizer.warmup_ratio': 1.0, 'track.wandb': 'entity/my-project_1.2'})
  config_lib.validate(valid)
  # Unused values are not checked.
  valid.lora.update(enabled=False, rank=0)
  config_lib.validate(valid)


def test_parse_columns():
  assert config_lib.parse_columns('') == {}
  assert config_lib.parse_columns(' prompt = question , completion=a=b,') == {
      'prompt': 'question', 'completion': 'a=b'}
  for text in ('prompt', 'prompt=', '=question', 'a=b,c'):
    with pytest.raises(errors.UserError, match='config.data.columns has'):
      config_lib.parse_columns(text)
