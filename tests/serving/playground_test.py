"""The playground: its answers, their queue, and the page."""

import contextlib
import json
import re
import time
import types
import urllib.error
import urllib.request

import jax
import local_server as serving
import numpy as np
import pytest

from gemma_sft import sample
from gemma_sft import tasks
from gemma_sft import train
from gemma_sft.inputs import records as records_lib
from gemma_sft.run import restore
from gemma_sft.serving import playground

_SCRIPT = serving.SCRIPT
_PAIRS = [('Red?', _SCRIPT), ('Blue?', 'sky'), ('Blue sky?', 'yes'),
          ('Red sun?', 'no')]


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  """{'tuned', 'base'} of a run that answers 'Red?' with a script."""
  config, workdir = serving.memorise(
      tmp_path_factory.mktemp('run'), _PAIRS, steps=60, max_length=64,
      max_new_tokens=64)
  return playground.load_models(config, workdir, base_only=False, step=-1)


def _records(*rows):
  return [records_lib.Record(dict(row), f't:{i}') for i, row in enumerate(rows)]


@pytest.fixture
def play(served):
  return playground.Playground(
      served, _records(*({'prompt': p, 'completion': c} for p, c in _PAIRS)),
      _records({'prompt': 'Blue?', 'completion': 'sky'}))


def _client(play, answer=sample.answer):
  return serving.make_client(playground.make_app(play, answer))


@pytest.fixture
def client(play):
  return _client(play)


_SAMPLING = dict(temperature=0, top_k=0, top_p=1, repetition_penalty=1,
                 max_new_tokens=64, seed=0, stop=[])
_CHAT = [{'role': 'user', 'content': 'Red?'}]


def _question(prompt='Red?', **changes):
  sampling = {k: changes.pop(k, value) for k, value in _SAMPLING.items()}
  question = {} if 'messages' in changes else {'fields': {'prompt': prompt}}
  return {'model': 'tuned', 'sampling': sampling} | question | changes


def _ask(client, **changes):
  answer = client.post('/api/answer', json=_question(**changes))
  if answer.status_code != 200:
    return answer.status_code, answer.json()['error']
  return [json.loads(line) for line in answer.text.splitlines()]


def _answer(events):
  (text,) = [e['answer'] for e in events if 'answer' in e]
  return text


def test_the_answer_is_that_of_sample(client):
  events = _ask(client)
  assert _answer(events) == _SCRIPT
  assert ''.join(e['text'] for e in events if 'text' in e).strip() == _SCRIPT
  assert events[0]['prompt'] == _CHAT
  assert _SCRIPT not in _answer(_ask(client, model='base'))
  assert _answer(_ask(client, messages=_CHAT)) == _SCRIPT
  assert _answer(_ask(client, stop=['alert'])) == '<script>'


def test_which_prompt_a_model_reads(play, client):
  # A base that knows no turns reads a transcript.
  for base_prompt, role in (('text', 'transcript'), ('turns', 'user')):
    play.models['base'].config.eval.base_prompt = base_prompt
    prompts = [_ask(client, model=name, max_new_tokens=4)[0]['prompt']
               for name in ('tuned', 'base')]
    assert [p[-1]['role'] for p in prompts] == ['user', role]
  play.models['base'].config.eval.base_prompt = 'text'
  # Examples are shown before the question.
  few, rag = (_ask(client, prompt='Blue?', examples=kind)[0]['prompt']
              for kind in ('few:4', 'rag:4'))
  assert [m['role'] for m in few] == ['user', 'model'] * 4 + ['user']
  assert [m['content'] for m in rag[-3:]] == ['Blue?', 'sky', 'Blue?']


def test_setup_says_what_the_page_draws(client):
  setup = client.get('/api/setup').json()
  assert [m['name'] for m in setup['models']] == ['tuned', 'base']
  assert setup['sampling']['max_new_tokens'] == 64
  expected = {
      'task': 'chat', 'samples': [{'prompt': 'Blue?'}],
      'fields': [{'name': 'prompt', 'required': True, 'choices': []}],
      'examples': ['zero', 'few:4', 'rag:4']}
  assert {key: setup[key] for key in expected} == expected


def test_a_column_of_few_short_values_is_a_choice(served):
  rows = [{'title': f'Poem {i}', 'form': ('5x4', '7x4')[i % 2]}
          for i in range(8)]
  task = types.SimpleNamespace(
      FIELDS=('title', 'form'), __name__='tasks.poem',
      LOWER_IS_BETTER={'copied'}, to_form=lambda record: record.fields)
  one = types.SimpleNamespace(
      task=task, config=served['tuned'].config, description='')
  setup = playground.Playground(
      {'tuned': one}, _records(*rows), _records({'title': 'x'})).setup()
  assert [f['choices'] for f in setup['fields']] == [[], ['5x4', '7x4']]
  assert setup['lower_is_better'] == ['copied']  # Red below an answer, if yes.
  assert setup['samples'] == []  # The only one lacks the form.
  few = playground.Playground({'tuned': one}, [], []).setup()
  assert few['examples'] == ['zero'] and not few['fields'][1]['choices']


@pytest.mark.parametrize('changes, status, message', [
    (dict(prompt=' '), 400, 'prompt is empty'),
    (dict(prompt='long ' * 3000), 400, r'the prompt has \d+ tokens'),
    (dict(fields={'beauty': 'x'}), 400, "the form has a field 'beauty'"),
    (dict(fields={'prompt': 'x'}, messages=[]), 400, 'the question'),
    (dict(messages=[{'role': 'user', 'content': ' '}]), 400, '.*empty'),
    *((changes, 400, '.*role user') for changes in (
        dict(messages=[{'role': 'model', 'content': 'x'}]), dict(messages=[]),
        dict(messages=[], examples='rag:4'))),
    (dict(model='other'), 400, "no model 'other'"),
    (dict(top_p=0), 400, r'config.sampling.top_p is 0'),
    (dict(examples='few:9'), 422, 'examples: '),
    *(({name: value}, 422, f'sampling.{name}: ') for name, value in (
        ('temperature', -1), ('max_new_tokens', 10**9), ('seed', 2**40)))])
def test_a_wrong_question_is_one_message(client, changes, status, message):
  got = _ask(client, **changes)
  assert got[0] == status and re.match(message, got[1]), got
  assert 'Traceback' not in got[1] and '\n' not in got[1]


def _with_judge(play, judge):
  play._task = types.SimpleNamespace(
      FIELDS=play._task.FIELDS, to_messages=play._task.to_messages, judge=judge)
  return _client(play)


def test_the_verdict_stands_under_the_answer(play, capsys):
  def judge(records, completions, training):
    assert 'completion' not in records[0].fields and len(training) == 4
    return tasks.Judged({}, [{
        'length': len(completions[0]), 'fine': True, 'parts': ['no', 'list'],
        'why': ''}], 'a note')

  client = _with_judge(play, judge)
  assert _ask(client)[-1] == {
      'verdict': {'length': len(_SCRIPT), 'fine': True}, 'note': 'a note'}
  assert _ask(client, messages=_CHAT)[-1] == {'verdict': {}, 'note': ''}
  # A judge that needs a reference says nothing.
  events = _ask(_with_judge(
      play, lambda records, *_: records[0].fields['completion']))
  assert _answer(events) == _SCRIPT
  assert events[-1] == {'verdict': {}, 'note': ''}
  assert "KeyError: 'completion'" in capsys.readouterr().out


def test_a_failure_within_an_answer_is_reported_and_the_next_one_works(play):
  def answer(served, sampling, conversation, write, *_):
    if conversation[-1].content == 'Red?':
      write('Begun')
      raise RuntimeError('no memory')
    return 'fine'

  client = _client(play, answer)
  events = _ask(client)
  assert {'text': 'Begun'} in events
  assert events[-1] == {'error': 'no answer: RuntimeError: no memory'}
  assert _answer(_ask(client, prompt='Blue?')) == 'fine'


class _Slow:
  """Stands for `sample.answer`: writes a piece at a time until nobody reads."""

  running = most = ended = 0

  def __call__(self, served, sampling, conversation, write, *_):
    self.running += 1
    self.most = max(self.most, self.running)
    try:
      for i in range(600):
        write(f'{i} ')
        time.sleep(0.02)
      return 'all of it'
    finally:
      self.running -= 1
      self.ended += 1


def _start_answer(url):
  """Begins an answer; returns the response, which ends it when closed."""
  return urllib.request.urlopen(urllib.request.Request(
      f'{url}api/answer', json.dumps(_question()).encode(),
      {'Content-Type': 'application/json'}), timeout=20)


def test_a_closed_connection_stops_its_answer_and_the_next_begins(play):
  slow = _Slow()
  with serving.running(playground.make_app(play, slow)) as url:
    with _start_answer(url) as response:
      assert json.loads(response.readline())['prompt']
      assert json.loads(response.readline()) == {'started': True}
      assert json.loads(response.readline()) == {'text': '0 '}  # As it is made.
      queued = _start_answer(url)
      assert json.loads(queued.readline())['prompt']
      time.sleep(0.2)
      assert slow.most == 1  # One at a time.
    assert json.loads(queued.readline()) == {'started': True}
    assert (slow.ended, slow.most) == (1, 1)
    serving.wait(lambda: slow.running)
  serving.wait(lambda: slow.ended == 2)  # The end of the server stops it.
  queued.close()


def test_too_many_waiting_are_refused(play):
  with (serving.running(playground.make_app(play, _Slow())) as url,
        contextlib.ExitStack() as stack):
    for _ in range(8):
      stack.enter_context(_start_answer(url)).readline()
    with pytest.raises(urllib.error.HTTPError) as refused:
      _start_answer(url)
    assert refused.value.status == 400
    assert 'questions are waiting' in json.load(refused.value)['error']


def test_tuned_and_base_share_what_has_no_adapter(run_config, tmp_path):
  workdir = str(tmp_path / 'w')
  run_config.train.steps = 2
  train.main(run_config, workdir, False)
  both = playground.load_models(run_config, workdir, base_only=False, step=-1)
  alone = restore.load_weights(run_config, workdir, base=False, step=-1)
  jax.tree.map(
      np.testing.assert_array_equal, both['tuned'].params, alone.params)
  assert both['tuned'].description == alone.description
  assert both['base'].description == 'custom, untouched'
  tuned, base = (both[n].params['embedder']['input_embedding']
                 for n in ('tuned', 'base'))
  assert tuned is base
  assert any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(
      *(jax.tree.leaves(both[n].params) for n in ('tuned', 'base'))))
  only = playground.load_models(
      run_config, str(tmp_path / 'none'), base_only=True, step=0)
  assert list(only) == ['base']


@pytest.fixture(scope='module')
def chromium():
  with serving.launch() as browser:
    yield browser


def _browse(chromium, play, answer, size):
  return serving.browse(chromium, playground.make_app(play, answer), **size)


def test_the_playground_answers_side_by_side(chromium, play, tmp_path):
  with _browse(chromium, play, sample.answer, serving.DESKTOP) as page:
    page.click('text=Fill in an example')
    assert page.input_value('#field-prompt') == 'Blue?'
    page.fill('#field-prompt', 'Red?')
    page.click('#generate')
    page.wait_for_selector('#save:visible')
    tuned, base = page.locator('.answer .text:not(details *)').all_inner_texts()
    assert tuned == _SCRIPT and base != _SCRIPT
    assert page.locator('.answer script').count() == 0
    for kind in ('json', 'txt'):
      with page.expect_download() as download:
        page.click(f'#save-{kind}')
      download.value.save_as(tmp_path / kind)
      assert download.value.suggested_filename.endswith(f'.{kind}')
    saved = json.loads((tmp_path / 'json').read_text('utf-8'))
    assert saved['fields'] == {'prompt': 'Red?'}
    assert saved['sampling']['max_new_tokens'] == 64
    assert [a['model'] for a in saved['answers']] == ['tuned', 'base']
    assert saved['answers'][0]['text'] == _SCRIPT
    assert '## tuned (custom, tuned 60 updates' in (
        tmp_path / 'txt').read_text('utf-8')
    page.fill('#field-prompt', '   ')
    page.click('#generate')
    page.wait_for_selector('#error:visible')
    assert page.inner_text('#error').startswith('prompt is empty')
    assert page.locator('.answer').count() == 0


def test_the_chat_on_a_phone_keeps_each_models_conversation(chromium, play):
  asked = []

  def answer(served, sampling, conversation, write, *_):
    asked.append([(m.role, m.content) for m in conversation])
    write(f'{_SCRIPT} {len(asked)} {"z" * 200}')
    return f'{_SCRIPT} {len(asked)}'

  with _browse(chromium, play, answer, serving.PHONE) as page:
    page.tap('#tab-chat')
    page.tap('#parameters summary')
    page.fill('#system', 'Be brief.')
    for i, text in enumerate(('one', 'two')):
      page.fill('#message', text)
      page.tap('#send')
      page.wait_for_function(
          'n => document.querySelectorAll(".answer .foot").length === n && '
          '!document.getElementById("save").hidden', arg=2 * i + 2)
    assert serving.fits(page)
    assert page.locator('.answer script').count() == 0
    page.tap('#new')
    assert page.locator('.answer').count() == 0
  system = ('system', 'Be brief.')
  assert asked[2:] == [
      [system, ('user', 'one'), ('model', f'{_SCRIPT} {n}'), ('user', 'two')]
      for n in (1, 2)]


def test_the_stop_button(chromium, play):
  slow = _Slow()
  with _browse(chromium, play, slow, serving.DESKTOP) as page:
    page.fill('#field-prompt', 'Red?')
    page.keyboard.press('Control+Enter')
    page.wait_for_function(
        # A function: the page's policy lets no text be run.
        '() => document.querySelector(".answer .text")?.textContent'
        '.includes("3 ")')
    page.click('.stop:visible')
    page.wait_for_selector('#save:visible')
    assert page.locator('.foot').all_inner_texts() == ['stopped', 'stopped']
    assert page.inner_text('.answer .text').startswith('0 1 2 3')
    serving.wait(lambda: slow.ended == 1 and not slow.running)
    assert not page.is_visible('.stop')
