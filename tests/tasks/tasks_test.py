"""What every domain has to offer, whichever it is."""

import importlib
import pathlib

import pytest

from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import tasks
from gemma_sft.inputs import audit
from gemma_sft.inputs import records as records_lib
from gemma_sft.inputs import splits

_ROOT = pathlib.Path(tasks.__file__).parents[2]
_DOMAINS = ('blop', 'lyrics', 'poetry', 'slang', 'sql')
# Named in the configs' docstrings.
_VARIANTS = {
    'blop': ('270m', 'gemma1_2b'),
    'chat': (),
    'lyrics': ('hindi', 'bengali', 'gemma2_2b'),
    'poetry': ('270m', 'seed', 'seed_model'),
    'slang': ('270m', 'attempt1', 'attempt2', 'attempt3'),
    'sql': ('270m', 'int8', 'nf4', 'gemma1_2b'),
    'tiny': ('1', '2', '3', '4'),
}


def _config(name, *args):
  return importlib.import_module(f'configs.{name}').get_config(*args)


def _split(name, split):
  return splits.read_split(_config(name).data, split)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(_ROOT)  # Configs name data/ from there.


def test_each_domain_is_a_task_a_config_and_a_folder():
  assert set(tasks.names()) == {*_DOMAINS, 'chat'}
  configs = {p.stem for p in (_ROOT / 'configs').glob('*.py')}
  assert configs - {'__init__', 'default'} == set(_VARIANTS)
  for name in _DOMAINS:
    assert _config(name).task == name
    assert (_ROOT / 'data' / name / 'README.md').exists()
    assert len(list((_ROOT / 'data' / name).glob('*_dataset_builder.py'))) == 1


@pytest.mark.parametrize('name, variant', [
    (name, v) for name, variants in _VARIANTS.items() for v in variants])
def test_variants(name, variant):
  config = _config(name, variant)
  if not config.model.weights:  # Those are the user's to bring.
    config.model.weights = 'DIR'
  config_lib.validate(config)
  for split in ('train', 'validation', 'test'):
    assert (_ROOT / config.data[split]).is_file()
  if variant not in ('hindi', 'bengali') and name != 'tiny':
    with pytest.raises(ValueError, match='use :'):
      _config(name, variant + 'x')


@pytest.mark.parametrize('name', [*_DOMAINS, 'chat'])
def test_a_prompt_is_worded_from_its_first_field(name):
  task = tasks.load(name)
  first = {
      'blop': 'What is Blop?', 'chat': 'Hello?', 'lyrics': 'एक\nदो',
      'poetry': '春曉', 'slang': 'The bus is late again.',
      'sql': 'How many bakers are there?'}[name]
  fields = {task.FIELDS[0]: first}
  if name == 'sql':
    fields['schema'] = 'CREATE TABLE baker (name TEXT)'
  conversation = task.to_messages(records_lib.Record(fields, 'form'))
  *prompt, answer = conversation
  assert (answer.role, answer.content) == ('model', '')
  assert prompt[-1].role == 'user'
  assert first.partition('\n')[0] in prompt[-1].content


@pytest.mark.parametrize('name', _DOMAINS)
def test_a_form_filled_in_from_a_record_words_the_same_prompt(name):
  task = tasks.load(name)
  for record in _split(name, 'test')[:20]:
    form = task.to_form(record)
    assert set(form) <= set(task.FIELDS) and form[task.FIELDS[0]]
    filled = records_lib.Record(form, 'form')
    assert task.to_messages(filled)[:-1] == task.to_messages(record)[:-1]


@pytest.mark.parametrize('name', _DOMAINS)
def test_own_answers_are_good_and_empty_ones_are_not(name):
  task = tasks.load(name)
  if name == 'blop' and task.compiler_problem():
    pytest.skip(task.compiler_problem())
  test, training = _split(name, 'test'), _split(name, 'train')
  gold = [task.to_messages(r)[-1].content for r in test]
  scores = {}
  for label, answers in (('gold', gold), ('empty', [''] * len(test)),
                         ('prose', ['I am sorry, I cannot.'] * len(test))):
    judged = task.judge(test, answers, training)
    assert len(judged.rows) == len(test) and judged.metrics['n'] > 0
    assert all(0 <= v <= 1 for k, v in judged.metrics.items() if k != 'n')
    assert not judged.note
    scores[label] = judged.metrics[task.HEADLINE]
  assert scores['gold'] > 0.9
  assert scores['empty'] < 0.1 and scores['prose'] < 0.1
  named = set(judged.metrics)
  if hasattr(task, 'judge_prompts'):
    named |= task.judge_prompts(['What is Blop?'], ['A fish.']).metrics.keys()
  assert task.LOWER_IS_BETTER <= named
  assert not task.check_answers(training)


@pytest.mark.parametrize('name', _DOMAINS)
def test_splits_share_no_prompt(name):
  task = tasks.load(name)
  prompts = {}
  for split in ('train', 'validation', 'test'):
    for record in _split(name, split):
      messages = task.to_messages(record)
      assert all(isinstance(m, chat.Message) for m in messages)
      text = audit.normalise('\n'.join(m.content for m in messages[:-1]))
      assert prompts.setdefault(text, split) == split, record.where
