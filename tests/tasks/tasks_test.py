"""The protocol that every task folder keeps, and its config and data set."""

import importlib
import inspect
import pathlib

import pytest

from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import audit
from gemma_sft.inputs import records as records_lib
from gemma_sft.inputs import splits

_ROOT = pathlib.Path(tasks.__file__).parents[2]
# {task: what a person may enter in its form}.
_FORMS = {'blop': {'prompt': 'What is Blop?'}, 'chat': {'prompt': 'Hello?'},
          'lyrics': {'opening': 'एक\nदो'}, 'poetry': {'title': '春曉'},
          'slang': {'context': 'The bus is late again.'},
          'sql': {'question': 'How many bakers are there?',
                  'schema': 'CREATE TABLE baker (name TEXT)'}}
_DOMAINS = sorted(_FORMS.keys() - {'chat'})
# The variants that the docstrings of configs name.
_VARIANTS = {
    'blop': ('270m', 'gemma1_2b'), 'lyrics': ('hindi', 'bengali', 'gemma2_2b'),
    'poetry': ('270m', 'seed', 'seed_model'),
    'slang': ('270m', 'attempt1', 'attempt2', 'attempt3'),
    'sql': ('270m', 'int8', 'nf4', 'gemma1_2b'), 'tiny': ('1', '2', '3', '4')}
# Metrics over all answers together. All others are means over the rows, or the
# report could not give them an interval.
_CORPUS_METRICS = {
    'n', 'bleu', 'chrf', 'bleu4', 'distinct1', 'distinct2', 'acronym_gap'}
# {function of a task: (its parameters, whether each task has it)}.
_PROTOCOL = {'to_messages': ('record', True), 'to_form': ('record', True),
             'judge': ('records completions training', True),
             'check_answers': ('records', True),
             'referenced_files': ('records', False),
             'judge_prompts': ('prompts completions', False)}


def _config(name, *args):
  return importlib.import_module(f'configs.{name}').get_config(*args)


def _split(name, split):
  return splits.read_split(_config(name).data, split)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(_ROOT)  # Configs give paths in data/ relative to it.


@pytest.mark.parametrize('name', tasks.names())
def test_every_task_keeps_the_protocol(name):
  task = tasks.load(name)
  package = importlib.import_module(f'gemma_sft.tasks.{name}')
  assert len(package.__doc__.splitlines()) == 1 and task.__doc__
  assert isinstance(task.HEADLINE, str)
  assert isinstance(task.LOWER_IS_BETTER, frozenset)
  assert task.FIELDS and all(isinstance(field, str) for field in task.FIELDS)
  for function, (parameters, needed) in _PROTOCOL.items():
    if needed or hasattr(task, function):
      found = inspect.signature(getattr(task, function)).parameters
      assert ' '.join(found) == parameters, function
  judged = task.judge([], [])
  assert isinstance(judged, tasks.Judged)
  assert judged.rows == [] and judged.metrics.get('n', 0) == 0
  assert task.check_answers([]) == []
  # A prompt needs only the first field of the form (SQL: and a schema).
  form = _FORMS[name]
  first = form[task.FIELDS[0]]
  *prompt, answer = task.to_messages(records_lib.Record(form, 'form'))
  assert (answer.role, answer.content) == ('model', '')
  assert prompt[-1].role == 'user'
  assert first.partition('\n')[0] in prompt[-1].content


@pytest.mark.parametrize('texts, of_words, of_pairs', [
    (['abab'], 2 / 4, 2 / 3), (['ab', 'ab'], 2 / 4, 1 / 2),  # No pair across.
    (['a'], 1, 0)])
def test_distinct(texts, of_words, of_pairs):
  assert tasks.distinct(texts) == {'distinct1': of_words, 'distinct2': of_pairs}


def test_each_domain_is_a_task_a_config_and_a_folder():
  assert tasks.names() == sorted(_FORMS)
  configs = {p.stem for p in (_ROOT / 'configs').glob('*.py')}
  assert configs == {'__init__', 'default', 'curation', 'tiny', *tasks.names()}
  for name in _DOMAINS:
    assert _config(name).task == name
    assert (_ROOT / 'data' / name / 'README.md').exists()
    assert len(list((_ROOT / 'data' / name).glob('*_dataset_builder.py'))) == 1
  with pytest.raises(
      errors.UserError, match="'slnag'(.*\n)*.*Did you mean 'slang'?"):
    tasks.load('slnag')


@pytest.mark.parametrize('name, variant', [
    (name, v) for name, variants in _VARIANTS.items() for v in variants])
def test_variants(name, variant):
  config = _config(name, variant)
  if not config.model.weights:  # The user provides these weights.
    config.model.weights = 'DIR'
  config_lib.validate(config)
  for split in ('train', 'validation', 'test'):
    assert (_ROOT / config.data[split]).is_file()
  if variant not in ('hindi', 'bengali') and name != 'tiny':
    with pytest.raises(ValueError, match='use :'):
      _config(name, variant + 'x')


@pytest.mark.parametrize('name', _DOMAINS)
def test_own_answers_are_good_and_empty_ones_are_not(name):
  task = tasks.load(name)
  if name == 'blop' and task.compiler_problem():
    pytest.skip(task.compiler_problem())
  test, training = _split(name, 'test'), _split(name, 'train')
  gold = [task.to_messages(r)[-1].content for r in test]
  scores = {}
  for label, answers in (('gold', gold), ('swapped', gold[1:] + gold[:1]),
                         ('empty', [''] * len(test)),
                         ('prose', ['I am sorry, I cannot.'] * len(test))):
    judged = task.judge(test, answers, training)
    assert len(judged.rows) == len(test) and judged.metrics['n'] > 0
    assert all(0 <= v <= 1 for k, v in judged.metrics.items() if k != 'n')
    assert not judged.note
    for metric in judged.metrics.keys() - _CORPUS_METRICS:
      values = [row[metric] for row in judged.rows if metric in row]
      mean = min(1, sum(values) / max(1, len(values)))
      assert judged.metrics[metric] == pytest.approx(mean), metric
    scores[label] = judged.metrics[task.HEADLINE]
  assert scores['gold'] > 0.9
  assert scores['empty'] < 0.1 and scores['prose'] < 0.1
  named = set(judged.metrics)
  if hasattr(task, 'judge_prompts'):
    named |= task.judge_prompts(['What is Blop?'], ['A fish.']).metrics.keys()
  assert task.LOWER_IS_BETTER <= named


@pytest.mark.parametrize('name', _DOMAINS)
def test_splits_share_no_prompt_and_forms_word_the_same(name):
  task = tasks.load(name)
  prompts = {}
  for split in ('train', 'validation', 'test'):
    for i, record in enumerate(_split(name, split)):
      messages = task.to_messages(record)
      assert all(isinstance(m, chat.Message) for m in messages)
      text = audit.normalise('\n'.join(m.content for m in messages[:-1]))
      assert prompts.setdefault(text, split) == split, record.where
      if i < 20:  # A form filled in from a record words the same prompt.
        form = task.to_form(record)
        assert set(form) <= set(task.FIELDS) and form[task.FIELDS[0]]
        filled = records_lib.Record(form, 'form')
        assert task.to_messages(filled)[:-1] == messages[:-1]
