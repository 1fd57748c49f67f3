"""Shared by the tests of served models: a run, a server, a browser."""

import contextlib
import json
import shutil
import threading
import time

import conftest
from fastapi import testclient
import pytest
import uvicorn

from gemma_sft import serve
from gemma_sft import train
from gemma_sft.generation import generate
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import rating_page

SCRIPT = '<script>alert(1)</script>'
RUNS = ('w/a', 'w/b')


def memorise(folder, pairs, *, steps, max_length, **sampling):
  """Trains a run on these pairs; returns (config, workdir)."""
  config = conftest.config.__wrapped__(folder)
  config.data.update(train=conftest.write_pairs(folder / 'pairs.txt', pairs),
                     validation='', max_length=max_length)
  config.lora.enabled = False  # All weights learn in fewer updates.
  config.optimizer.update(learning_rate=0.01, schedule='constant')
  config.train.steps = steps
  config.eval.update(every=100, judged=0, prompts=())
  config.sampling.update(temperature=0.0, repetition_penalty=1.0, **sampling)
  train.main(config, str(folder / 'w'), False)
  return config, str(folder / 'w')


def record_prompts(monkeypatch):
  """Returns a list that collects the prompts given to `generate`."""
  seen, generate_fn = [], generate.generate

  def record(model, params, prompts, *args, **kwargs):
    seen.extend(prompts)
    return generate_fn(model, params, prompts, *args, **kwargs)

  monkeypatch.setattr(generate, 'generate', record)
  return seen


def write_result(workdir, answers, *, name='tuned', prompts=True):
  """Writes an evaluation of {where: answer}; returns the workdir."""
  folder = workdir / 'evaluation'
  folder.mkdir(parents=True, exist_ok=True)
  rows = [{'where': where, 'answer': answer, 'verdict': {}}
          | ({'prompt': f'Ask {where}'} if prompts else {})
          for where, answer in answers.items()]
  (folder / f'test-{name}.json').write_text(json.dumps(
      {'name': name, 'scores': {}, 'answers': rows}))
  return str(workdir)


def make_pairs(n=6):
  """Returns pairs of a 'good i' and a 'bad i'."""
  return [pairs_lib.make_pair(f't:{i}', f'Ask {i}', f'good {i}', f'bad {i}')
          for i in range(n)]


def rating_app(store, pairs=None, **options):
  return rating_page.make_app(
      make_pairs() if pairs is None else pairs, RUNS, store, **options)


def make_client(app):
  return testclient.TestClient(app, base_url='http://127.0.0.1:80')


@contextlib.contextmanager
def running(app):
  """Yields the address of an app that is served by a thread."""
  with serve.listen('127.0.0.1', 0) as (sock, url, _):
    # log_config: to set up logging closes what pytest captures.
    server = uvicorn.Server(uvicorn.Config(
        app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [sock]})
    thread.start()
    try:
      yield url
    finally:
      server.should_exit = True
      thread.join(timeout=60)
      assert not thread.is_alive()


def wait(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


# In a browser ----------------------------------------------------------------

DESKTOP = dict(viewport=dict(width=1280, height=800))
PHONE = dict(viewport=dict(width=390, height=844), is_mobile=True,
             has_touch=True, color_scheme='dark')


@contextlib.contextmanager
def launch():
  """Yields the system's Chromium; skips the test where there is none."""
  sync_api = pytest.importorskip('playwright.sync_api')
  path = next(filter(None, map(shutil.which, (
      'chromium', 'chromium-browser', 'google-chrome'))), None)
  if path is None:
    pytest.skip('no chromium on the PATH')
  with sync_api.sync_playwright() as driver:
    # Its sandbox does not work for root.
    browser = driver.chromium.launch(
        executable_path=path, args=['--no-sandbox'])
    yield browser
    browser.close()


@contextlib.contextmanager
def browse(browser, app, **options):
  """Yields an app's page; fails for errors, dialogs and foreign requests."""
  with running(app) as url:
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)  # ms, on a busy machine.
    wrong = []
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('console', lambda message: (
        message.type == 'error' and 'status of 4' not in message.text
        and wrong.append(message.text)))
    page.on('dialog', lambda dialog: (wrong.append(dialog.message),
                                      dialog.dismiss()))
    page.on('request', lambda r: r.url.startswith((url, 'blob:', 'data:'))
            or wrong.append(r.url))
    page.goto(url)
    yield page
    assert not wrong
    context.close()


def fits(page):
  """Whether nothing extends beyond the page's right edge."""
  return page.evaluate('document.documentElement.scrollWidth <= innerWidth')
