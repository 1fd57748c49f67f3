"""Rating: pairs of answers, the server, and the page itself."""

import json

import conftest
import local_server as serving
import pytest

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import ratings

_SCRIPT = serving.SCRIPT


@pytest.fixture
def store(tmp_path):
  return ratings.Store(str(tmp_path / 'ratings.sqlite'))


@pytest.fixture
def client(store):
  return serving.make_client(serving.rating_app(store))


def _read(*runs, split='test'):
  return pairs_lib.read(runs, split)


def test_pairs_are_of_the_same_record(tmp_path):
  a = serving.write_result(
      tmp_path / 'a', {'t:1': 'one', 't:2': 'two', 't:3': '3'})
  b = serving.write_result(
      tmp_path / 'b', {'t:2': 'zwei', 't:9': '9', 't:1': 'eins'})
  pairs = _read(a, b)
  assert {(p.place, p.prompt, p.a, p.b) for p in pairs} == {
      ('t:1', 'Ask t:1', 'one', 'eins'), ('t:2', 'Ask t:2', 'two', 'zwei')}
  # One order for all, which is not the file's; other answers, other items.
  assert [p.item for p in pairs] == sorted(p.item for p in pairs)
  serving.write_result(tmp_path / 'a', {'t:1': 'one anew', 't:2': 'two'})
  assert len({p.item for p in pairs} & {p.item for p in _read(a, b)}) == 1


def test_other_results_of_a_run(tmp_path):
  a, *_ = (serving.write_result(tmp_path / 'a', {'t:1': name}, name=name)
           for name in ('tuned', 'base', 'few:4'))
  for name in ('base', 'few:4'):
    (pair,) = _read(a, f'{a}:{name}')
    assert (pair.a, pair.b) == ('tuned', name)
  assert pairs_lib.labels((a, f'{a}:base')) == ('a', 'a:base')
  assert pairs_lib.labels(('x/a', 'y/a')) == ('x/a', 'y/a')
  with pytest.raises(errors.UserError, match="no answers of 'llama'") as error:
    _read(a, f'{a}:llama')
  assert 'base, few:4, tuned' in str(error.value)
  with pytest.raises(errors.UserError, match='--split=train --base|train'):
    _read(a, f'{a}:base', split='train')
  b = serving.write_result(tmp_path / 'b', {'other:1': 'x'})
  with pytest.raises(errors.UserError, match='none of the same records'):
    _read(a, b)


def test_prompts_that_were_not_stored_come_from_the_data(config, tmp_path):
  config.data.test = conftest.write_pairs(
      tmp_path / 'test.txt', [('Who?', 'I.'), ('Why?', 'So.')])
  answers = {f'{config.data.test}:{line}': 'x' for line in (1, 7)}
  a = serving.write_result(tmp_path / 'a', answers, prompts=False)
  (tmp_path / 'a' / 'config.json').write_text(config_lib.to_json(config))
  b = serving.write_result(tmp_path / 'b', answers, prompts=False)
  prompts = {p.place.rpartition(':')[2]: p.prompt for p in _read(a, b)}
  assert prompts == {'1': 'Who?', '7': 'Why?'}


def test_the_order_is_random_and_repeatable():
  first, again, other = (
      [pairs_lib.shown_first(name, str(i)) for i in range(1000)]
      for name in ('Ana', 'Ana', 'Bo'))
  assert first == again
  # Four standard errors of 500: 63.
  assert abs(first.count('a') - 500) < 63
  assert 400 < sum(x == y for x, y in zip(first, other)) < 600


def _next(client, rater='Ana'):
  return client.get('/api/next', params={'rater': rater}).json()


def _vote(client, state, choice, **marks):
  done = client.post('/api/rate', json={
      'rater': 'Ana', 'item': state['pair']['item'], 'choice': choice, **marks})
  assert done.status_code == 200, done.text
  return done.json()


def test_a_vote_is_mapped_back_to_the_run(store):
  client = serving.make_client(
      serving.rating_app(store, serving.make_pairs(40)))
  state = _next(client, ' Ana  ')
  for i in range(40):
    assert state['done'] == i and state['total'] == 40
    good = state['pair']['first'].startswith('good')
    place = 'first' if good else 'second'
    state = _vote(client, state, place, **{place: {'style': 5}})
  assert state['pair'] is None
  stored = store.ratings()
  assert {(r.rater, r.choice, r.shown_first) for r in stored} == {
      ('Ana', 'a', 'a'), ('Ana', 'a', 'b')}
  assert all(r.marks == {('a', 'style'): 5} for r in stored)
  results = client.get('/api/results').json()
  assert results['win_rate'] == 1 and results['runs'] == ['a', 'b']


def test_raters_resume_and_undo(store, client):
  text = client.get('/api/next', params={'rater': 'Ana'}).text
  # The page does not learn which run is which.
  assert 'w/a' not in text and 't:0' not in text
  state = json.loads(text)
  assert set(state['pair']) == {'item', 'prompt', 'first', 'second'}
  first = state['pair']['item']
  state = _vote(client, state, 'tie', second={'meaning': 2})
  # Another process on the same file; another rater begins at the beginning.
  client = serving.make_client(serving.rating_app(ratings.Store(store.path)))
  assert _next(client) == state
  assert state['done'] == 1 and state['pair']['item'] != first
  other = _next(client, 'Bo')
  assert other['done'] == 0 and other['pair']['item'] == first
  back, nothing = (
      client.post('/api/undo', json={'rater': 'Ana'}).json() for _ in range(2))
  assert back['done'] == 0 and back['pair']['item'] == first
  assert back['pair']['before'] == {
      'choice': 'tie', 'first': {}, 'second': {'meaning': 2}}
  assert nothing['done'] == 0 and 'before' not in nothing['pair']
  # A key hit twice is one vote.
  state = _next(client)
  assert _vote(client, state, 'first') == _vote(client, state, 'second')
  assert len(store.ratings()) == 1


@pytest.mark.parametrize('change, status, message', [
    ({'item': 'unknown'}, 400, 'this pair'),
    ({'rater': ' '}, 400, 'your name'),
    ({'rater': 'x' * 41}, 400, 'your name'),
    ({'rater': 'a\x00b'}, 400, 'your name'),
    ({'choice': 'a'}, 422, 'choice: '),
    ({'first': {'style': 6}}, 422, 'first.style: '),
    ({'first': {'style': True}}, 422, 'first.style: '),
    ({'first': {'beauty': 3}}, 422, 'first.beauty'),
    ({'shown_first': 'a'}, 422, 'shown_first: ')])
def test_wrong_votes_are_refused(store, client, change, status, message):
  answer = client.post('/api/rate', json={
      'rater': 'Ana', 'item': _next(client)['pair']['item'],
      'choice': 'tie'} | change)
  assert answer.status_code == status
  assert answer.json()['error'].startswith(message)
  assert store.ratings() == []


@pytest.fixture(scope='module')
def chromium():
  with serving.launch() as browser:
    yield browser


def _sign_in(page, name):
  page.fill('#name', name)
  page.click('text=Begin')
  page.wait_for_selector('#task:visible')


def _done(page, text):
  page.wait_for_function(
      't => document.getElementById("progress-text").textContent === t',
      arg=text)


def test_rating_by_keys(chromium, store):
  app = serving.rating_app(store, serving.make_pairs(5))
  with serving.browse(chromium, app, **serving.DESKTOP) as page:
    _sign_in(page, 'Ana')
    order = []
    for i, key in enumerate(('1', 'ArrowRight', '0', 'ArrowLeft')):
      order.append(page.inner_text('#first .text'))
      if key == '0':
        page.keyboard.press('s')
        assert page.locator('.mark.armed').count() == 1
        for mark in ('4', 'Shift+F', '1'):
          page.keyboard.press(mark)
      page.keyboard.press(key)
      _done(page, f'{i + 1} of 5')
    runs = ['ab' if text.startswith('good') else 'ba' for text in order]
    stored, (first, second) = store.ratings(), runs[2]
    assert [r.choice for r in stored] == [
        runs[0][0], runs[1][1], 'tie', runs[3][0]]
    assert stored[2].shown_first == first
    assert stored[2].marks == {(first, 'style'): 4, (second, 'fluency'): 1}
    # Undone twice, the tie comes back with its marks.
    for i in (3, 2):
      page.keyboard.press('u')
      _done(page, f'{i} of 5')
    assert page.locator('#vote-tie.before').count() == 1
    assert page.locator('[aria-pressed=true]').all_inner_texts() == ['4', '1']
    assert len(store.ratings()) == 2
    page.reload()  # The name is remembered, and where one was.
    _done(page, '2 of 5')
    for i in (3, 4, 5):
      page.keyboard.press('2')
      _done(page, f'{i} of 5')
    page.click('text=Results')
    page.wait_for_selector('#win:visible')
    assert 'win rate of a over b' in page.inner_text('.headline')
    assert page.inner_text('#raters') == 'Ana\t5 of 5'


def test_rating_by_touch_on_a_phone(chromium, store):
  pairs = [pairs_lib.make_pair('t:1', f'{_SCRIPT} {"x" * 300}', _SCRIPT,
                               f'<img src=x onerror=alert(2)>{"y" * 300}'),
           pairs_lib.make_pair('t:2', 'p', '', '  kept \n  lines')]
  app = serving.rating_app(store, pairs)
  with serving.browse(chromium, app, **serving.PHONE) as page:
    _sign_in(page, _SCRIPT)
    for i in range(2):
      assert serving.fits(page)
      for text in page.locator('#task .text').all():
        assert text.evaluate('e => e.children.length') == 0
      if _SCRIPT in page.inner_text('#prompt'):
        assert _SCRIPT in page.locator('.answer .text').all_inner_texts()
      page.tap('#second [aria-label="meaning 3"]')
      assert page.evaluate(
          '[...document.querySelectorAll("#task button")].every('
          'b => b.offsetHeight >= 44 && b.offsetWidth >= 40)')
      page.tap('#vote-tie')
      if i == 0:
        _done(page, '1 of 2')
    page.wait_for_selector('#end:visible')
    assert page.inner_text('#who') == f'{_SCRIPT} (change)'
    assert all(set(r.marks.values()) == {3} for r in store.ratings())
    page.tap('text=Results')
    page.wait_for_selector('#win:visible')
    assert serving.fits(page) and _SCRIPT in page.inner_text('#raters')


def test_the_page_says_that_the_server_has_stopped(chromium, store):
  page = chromium.new_page()
  with serving.running(serving.rating_app(store)) as url:
    page.goto(url)
    _sign_in(page, 'Ana')
  page.keyboard.press('1')
  page.wait_for_selector('#error:visible')
  assert 'has it been stopped' in page.inner_text('#error')
  assert page.is_visible('#task') and store.ratings() == []
  page.close()
