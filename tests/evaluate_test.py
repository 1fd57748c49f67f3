"""Base against tuned: the table, the answers, the report."""

import contextlib
import json
import pathlib
import shutil
import types

import conftest
import local_server
import matplotlib.image
import pytest

from gemma_sft import errors
from gemma_sft import evaluate
from gemma_sft import train
from gemma_sft.evaluation import validation
from gemma_sft.generation import generate
from gemma_sft.inputs import records
from gemma_sft.tasks.chat import task as chat_task

_CODE = "def Hi() {\n  <p>'hi'</p>\n}"


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(config, workdir) of a run whose judge is the Blop compiler."""
  folder = tmp_path_factory.mktemp('run')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.task = 'blop'
  config.data.test = conftest.write_pairs(folder / 'test.txt', [
      ('Write Hi in Blop.', _CODE), ('What for?', 'For web pages.'),
      ('Write it anew.', _CODE)])
  config.eval.update(prompts=('Who?',), max_new_tokens=4)
  config.train.steps = 2
  train.main(config, str(folder / 'w'), False)
  return config, folder / 'w'


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of the run's workdir, to be evaluated."""
  return shutil.copytree(trained[1], tmp_path / 'w')


def _evaluate(workdir, config=None, **changes):
  return evaluate.main(config, str(workdir), **dict(
      base=False, split='test', step=-1, limit=0) | changes)


def _result(workdir, name, split='test'):
  return json.loads(
      (workdir / 'evaluation' / f'{split}-{name}.json').read_text('utf-8'))


def _rows(table: str) -> dict[str, list[str]]:
  cells = [[c.strip() for c in line.strip('|').split('|')]
           for line in table.splitlines() if line.startswith('| ')]
  return {row[0]: row[1:] for row in cells}


def test_base_then_tuned_side_by_side(trained, tmp_path, capsys):
  config, trained_workdir = trained
  # The base is scored before there is a run.
  fresh = tmp_path / 'w'
  assert _evaluate(fresh, config=config, base=True) == 0
  assert _rows(capsys.readouterr().out)['test split'] == ['base']
  shutil.copytree(trained_workdir, fresh, dirs_exist_ok=True)
  assert _evaluate(fresh) == 0
  out = capsys.readouterr().out
  rows = _rows(out)
  assert rows['test split'] == ['base', 'tuned', 'gain over base']
  assert rows['records'] == ['3', '3', '']
  assert rows['weights'][0] == 'custom, untouched'
  assert rows['weights'][1].startswith('custom, tuned 2 updates in')
  results = {name: _result(fresh, name) for name in ('base', 'tuned')}
  for i, name in enumerate(('base', 'tuned')):
    scores = results[name]['scores']
    assert float(rows['loss'][i]) == pytest.approx(scores['loss'], rel=1e-3)
    places = [a['where'] for a in results[name]['answers']]
    assert [p.rpartition(':')[2] for p in places] == ['1', '9', '15']
    assert results[name]['temperature'] == 0
    assert results[name]['samples'][0]['prompt'] == 'Who?'
  assert results['base']['scores']['loss'] != results['tuned']['scores']['loss']
  assert '> Who?' in out
  text = (fresh / 'report' / 'report.md').read_text('utf-8')
  assert '| tuned' in text and '**tuned**: Who?' in text
  image = matplotlib.image.imread(fresh / 'report' / 'training.png')
  assert image.shape[0] > 300 and image.shape[1] > 300
  assert image[..., :3].std() > 0.02  # Not one colour.


def test_without_node_everything_else_is_scored(
    workdir, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert _evaluate(workdir, split='validation', limit=1) == 0
  out = capsys.readouterr().out
  assert 'no Node.js on the PATH, so nothing was compiled' in out
  rows = _rows(out)
  assert 'loss' in rows and 'strict' not in rows and rows['records'] == ['1']
  result = _result(workdir, 'tuned', 'validation')
  assert result['judge_note'] and len(result['answers']) == 1
  assert pathlib.Path(workdir, 'report', 'training.png').stat().st_size > 5000


@pytest.mark.parametrize('changes, match', [
    (dict(limit=-1), '--limit=-1'),
    (dict(split='tset'), r"=tset(.|\n)*\['train', 'validation', 'test'\]"),
    (dict(step=7), r'no checkpoint of step 7(.|\n)*one of \[2\]'),
    (dict(baseline=['few:2'], split='train'), 'training split'),
    (dict(baseline=['fwe:2']), 'way of prompting'),
    (dict(baseline=['rag:400']), 'rag:400, with'),
    (dict(baseline=['zero'], gguf='x.gguf'), 'one of them at a time'),
    (dict(gguf='x.gguf'), 'x.gguf: no such file'),
    (dict(changes={'lora.alpha': 640.0}), 'lora.alpha'),
    (dict(changes={'seed': 5}), 'seed'),
    (dict(changes={'lora.enabled': False}), 'lora.enabled'),
    (dict(changes={'model.embed_dim': 64}), 'model.embed_dim'),
    (dict(changes={'data.test': ''}), r"test(.|\n)*\['train', 'validation'\]"),
], ids=str)
def test_what_makes_no_sense_is_refused(trained, workdir, changes, match):
  config = None
  if 'changes' in changes:
    config = trained[0].copy_and_resolve_references()
    config.update_from_flattened_dict(changes['changes'])
    changes = {}
  with pytest.raises(errors.UserError, match=match):
    _evaluate(workdir, config=config, **changes)


def test_without_a_run(run_config, tmp_path):
  with pytest.raises(errors.UserError, match='no config.json in'):
    _evaluate(tmp_path / 'w')
  with pytest.raises(errors.UserError, match='no checkpoints in'):
    _evaluate(tmp_path / 'w', config=run_config, split='validation')
  assert not (tmp_path / 'w').exists()  # A mistyped one is not made.


def test_prompting_beside_tuning(trained, workdir, capsys, monkeypatch):
  prompts = local_server.record_prompts(monkeypatch)
  assert _evaluate(workdir, baseline=['zero', 'few:2', 'rag:1'], limit=2) == 0
  out = capsys.readouterr().out
  rows = _rows(out)
  assert rows['test split'][:4] == ['base', 'few:2', 'rag:1', 'tuned']
  # Examples in the prompt are judged; a loss is of the bare prompt.
  assert rows['loss'][1:3] == ['-', '-'] and rows['accuracy'][0] != '-'
  assert 'cannot be told apart' in out  # A model of noise.
  few = _result(workdir, 'few-2')['answers']
  shown = few[0]['shown']
  assert len(shown) == 2 and shown == few[1]['shown']
  assert few[0]['prompt'] == 'Write Hi in Blop.'
  assert few[0]['reference'] == _CODE
  by_place = {r.where: chat_task.to_messages(r)
              for r in records.read(trained[0].data.train)}
  # A token a byte, and seven or so around each turn.
  turns = [len(m.content) for i in shown for m in by_place[i]]
  assert max(map(len, prompts)) > len(few[0]['prompt']) + sum(turns)
  assert (workdir / 'evaluation' / 'eval.json').exists()
  assert (workdir / 'report' / 'report.html').exists()

  # Answers and losses are cached: only the judge works again.
  def refuse(*_, **__):
    raise AssertionError('made again')

  monkeypatch.setattr(generate, '_generate_batch', refuse)
  monkeypatch.setattr(validation, 'evaluate_loss', refuse)
  before = _result(workdir, 'rag-1')
  assert _evaluate(workdir, baseline=['zero', 'few:2', 'rag:1'], limit=2) == 0
  assert before['answers'] == _result(workdir, 'rag-1')['answers']
  assert _rows(capsys.readouterr().out) == rows


def test_llama_cpp_is_not_asked_again(workdir, tmp_path, capsys, monkeypatch):
  gguf = tmp_path / 'model.gguf'
  gguf.write_bytes(b'GGUF')
  asked = []

  def chat(messages, temperature, **_):
    asked.append((messages[-1]['content'], temperature))
    if len(asked) == 3:
      raise ConnectionError
    return _CODE

  def start_server(*_, context_length, **__):
    assert context_length > 0
    return contextlib.nullcontext(types.SimpleNamespace(chat=chat))

  monkeypatch.setattr(evaluate.llama_runtime, 'find_server', lambda _: 'x')
  monkeypatch.setattr(evaluate.llama_runtime, 'Server', start_server)
  monkeypatch.setattr(evaluate, '_PARALLEL', 1)

  def run():
    return _evaluate(workdir, gguf=str(gguf))

  with pytest.raises(ConnectionError):
    run()
  first = asked.copy()
  # The free prompt is sampled as the model will be served.
  assert first[0] == ('Who?', 0.2) and first[1] == ('Write Hi in Blop.', 0.0)
  assert run() == 0
  assert set(asked[4:]).isdisjoint(first[:2])
  questions = [question for question, _ in asked]
  assert questions.count('Who?') == questions.count('Write Hi in Blop.') == 1
  assert _rows(capsys.readouterr().out)['test split'] == ['llama.cpp']
  n = len(asked)
  assert run() == 0 and len(asked) == n
  # Another file is another model.
  gguf.write_bytes(b'GGUF other')
  assert run() == 0 and len(asked) == n + 4
