"""Base against tuned: the table, the answers, the report."""

import json
import pathlib
import shutil

import conftest
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


def _evaluate(workdir, *, config=None, base=False, split='test', step=-1,
              limit=0, baseline=()):
  return evaluate.main(config, str(workdir), base=base, split=split, step=step,
                       limit=limit, baseline=baseline)


def _rows(table: str) -> dict[str, list[str]]:
  cells = [[c.strip() for c in line.strip('|').split('|')]
           for line in table.splitlines() if line.startswith('| ')]
  return {row[0]: row[1:] for row in cells}


def test_base_then_tuned_side_by_side(trained, tmp_path, capsys):
  config, workdir = trained
  # The base is scored before there is a run.
  fresh = tmp_path / 'w'
  assert _evaluate(fresh, config=config, base=True) == 0
  assert _rows(capsys.readouterr().out)['test split'] == ['base']
  shutil.copytree(workdir, fresh, dirs_exist_ok=True)
  assert _evaluate(fresh) == 0
  out = capsys.readouterr().out
  rows = _rows(out)
  assert rows['test split'] == ['base', 'tuned', 'gain over base']
  assert rows['records'] == ['3', '3', '']
  assert rows['weights'][0] == 'custom, untouched'
  assert rows['weights'][1].startswith('custom, tuned 2 updates in')
  results = {
      name: json.loads(
          (fresh / 'evaluation' / f'test-{name}.json').read_text('utf-8'))
      for name in ('base', 'tuned')}
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


def test_without_node_everything_else_goes_on(
    trained, tmp_path, capsys, monkeypatch):
  _, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  monkeypatch.setenv('PATH', str(tmp_path))
  assert _evaluate(workdir) == 0
  out = capsys.readouterr().out
  assert 'no Node.js on the PATH, so nothing was compiled' in out
  rows = _rows(out)
  assert 'loss' in rows and 'strict' not in rows
  result = json.loads(
      (workdir / 'evaluation' / 'test-tuned.json').read_text('utf-8'))
  assert result['judge_note'] and len(result['answers']) == 3
  assert pathlib.Path(workdir, 'report', 'training.png').stat().st_size > 5000


def test_limit_and_the_other_splits(trained, tmp_path, capsys):
  _, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  _evaluate(workdir, split='validation', limit=1)
  assert _rows(capsys.readouterr().out)['records'] == ['1']


def test_a_negative_limit_is_refused(trained, tmp_path):
  _, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  with pytest.raises(errors.UserError):
    _evaluate(workdir, limit=-1)


def test_a_missing_split_names_those_there_are(run_config, tmp_path):
  run_config.train.steps = 1
  train.main(run_config, str(tmp_path / 'w'), False)
  for split in ('test', 'tset'):
    with pytest.raises(errors.UserError, match=f'--split={split}') as error:
      _evaluate(tmp_path / 'w', split=split)
    assert "['train', 'validation']" in str(error.value)


def test_without_a_run(run_config, tmp_path):
  with pytest.raises(errors.UserError, match='no config.json in'):
    _evaluate(tmp_path / 'w')
  with pytest.raises(errors.UserError, match='no checkpoints in'):
    _evaluate(tmp_path / 'w', config=run_config, split='validation')
  with pytest.raises(errors.UserError, match='no checkpoint of step 7') as e:
    run_config.train.steps = 1
    train.main(run_config, str(tmp_path / 'w'), False)
    _evaluate(tmp_path / 'w', split='validation', step=7)
  assert 'one of [1]' in str(e.value)


def test_a_mistyped_workdir_is_not_made(run_config, tmp_path):
  with pytest.raises(errors.UserError):
    _evaluate(tmp_path / 'w', config=run_config, split='validation')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('changes', [
    {'lora.alpha': 640.0}, {'seed': 5}, {'lora.enabled': False},
    {'model.embed_dim': 64}], ids=lambda c: next(iter(c)))
def test_weights_of_another_config_are_refused(trained, tmp_path, changes):
  config, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=next(iter(changes))):
    _evaluate(workdir, config=config)


def test_prompting_beside_tuning(trained, tmp_path, capsys, monkeypatch):
  config, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  assert _evaluate(workdir, baseline=['zero', 'few:2', 'rag:1'], limit=2) == 0
  out = capsys.readouterr().out
  rows = _rows(out)
  assert rows['test split'][:4] == ['base', 'few:2', 'rag:1', 'tuned']
  # Examples in the prompt are judged; a loss is of the bare prompt.
  assert rows['loss'][1:3] == ['-', '-'] and rows['accuracy'][0] != '-'
  assert 'cannot be told apart' in out  # A model of noise.
  folder = workdir / 'evaluation'
  few = json.loads((folder / 'test-few-2.json').read_text('utf-8'))
  shown = [a['shown'] for a in few['answers']]
  assert len(shown[0]) == 2 and shown[0] == shown[1]
  assert all('train' in where for where in shown[0])
  assert few['answers'][0]['prompt'] == 'Write Hi in Blop.'
  assert few['answers'][0]['reference'] == _CODE
  assert (folder / 'eval.json').exists()
  assert (workdir / 'report' / 'report.html').exists()

  # Answers and losses are kept: nothing is decoded again, the judge is.
  def refuse(*_, **__):
    raise AssertionError('made again')

  monkeypatch.setattr(generate, '_generate_batch', refuse)
  monkeypatch.setattr(validation, 'evaluate_loss', refuse)
  before = folder.joinpath('test-rag-1.json').read_text('utf-8')
  assert _evaluate(workdir, baseline=['zero', 'few:2', 'rag:1'], limit=2) == 0
  after = folder.joinpath('test-rag-1.json').read_text('utf-8')
  assert json.loads(before)['answers'] == json.loads(after)['answers']
  assert _rows(capsys.readouterr().out) == rows


def test_examples_are_part_of_the_prompt(trained, tmp_path, monkeypatch):
  _, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  asked = []
  real = generate.generate

  def record(model, params, prompts, *args, **kwargs):
    asked.extend(map(len, prompts))
    return real(model, params, prompts, *args, **kwargs)

  monkeypatch.setattr(generate, 'generate', record)
  _evaluate(workdir, base=True, baseline=['few:2'], limit=1)
  result = json.loads((workdir / 'evaluation' / 'test-few-2.json').read_text(
      'utf-8'))
  [answer] = result['answers']
  assert len(answer['shown']) == 2
  config, _ = trained
  by_place = {r.where: chat_task.to_messages(r)
              for r in records.read(config.data.train)}
  # A token a byte, and seven or so around each turn.
  turns = [len(m.content) for i in answer['shown'] for m in by_place[i]]
  assert max(asked) > len(answer['prompt']) + sum(turns)


@pytest.mark.parametrize('changes, match', [
    (dict(baseline=['few:2'], split='train'), 'training split'),
    (dict(baseline=['fwe:2']), 'way of prompting'),
    (dict(baseline=['rag:400']), 'rag:400, with'),
    (dict(baseline=['zero'], gguf='x.gguf'), 'no such file|one of them')])
def test_baselines_that_make_no_sense(trained, tmp_path, changes, match):
  _, workdir = trained
  workdir = shutil.copytree(workdir, tmp_path / 'w')
  with pytest.raises(errors.UserError, match=match):
    evaluate.main(None, str(workdir), **(dict(
        base=False, split='test', step=-1, limit=0) | changes))
