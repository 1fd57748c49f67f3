"""Answers on the command line: streaming, stop texts, the chat."""

import io
import sys
import types

import conftest
import jax
import local_server
import numpy as np
import pytest

from gemma_sft import chat
from gemma_sft import cli
from gemma_sft import errors
from gemma_sft import sample
from gemma_sft.generation import generate
from gemma_sft.run import restore


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Workdir of a run that answers 'Red?' with 'abc abc abc'."""
  pairs = [('Red?', 'abc abc abc'), ('Blue?', 'sky')]
  return local_server.memorise(
      tmp_path_factory.mktemp('run'), pairs, steps=40, max_length=48)[1]


def _sample(workdir, **changes):
  return sample.main(None, workdir, **dict(
      base=False, step=-1, prompt=None, system='') | changes)


def test_a_process_with_one_device_serves_what_eight_have_trained(trained):
  assert jax.device_count() == 8
  status, out, err = conftest.run_module(
      'sample', f'--workdir={trained}', '--prompt=Red?', '--prompt=Blue?',
      devices=1)
  assert status == 0, err
  assert out == '> Red?\nabc abc abc\n> Blue?\nsky\n'
  assert 'tuned 40 updates' in err


def test_flags_override_the_run(trained, capsys):
  def ask(**changes):
    _sample(trained, prompt=['Red?'], **changes)
    return capsys.readouterr()

  base = ask(base=True, max_new_tokens=8)
  assert 'abc' not in base.out and 'custom, untouched' in base.err
  assert ask(stop=[' abc a']).out == 'abc\n'
  assert len(ask(max_new_tokens=4).out.strip()) <= 4
  one, again, other = (
      ask(temperature=5.0, top_k=3, seed=seed, max_new_tokens=16).out
      for seed in (1, 1, 2))
  assert one == again != other
  # The tokenizer has fewer pieces than the model's 512 rows: no other id is
  # sampled.
  assert ask(temperature=50.0, max_new_tokens=64).out


@pytest.mark.parametrize('text, stops, cut', [
    ('one END two', ('END',), ('one ', True)),
    ('one two', ('END',), ('one two', False)),
    ('a## b', ('b', '##'), ('a', True)),  # The first in the text, not the list.
    ('abc', ('', 'c'), ('ab', True)),  # An empty stop text is none.
    ('', ('x',), ('', False)),
    ('END', ('END',), ('', True))])
def test_cut_at_stop(text, stops, cut):
  assert sample.cut_at_stop(text, stops) == cut


@pytest.mark.parametrize('pieces, stops, first, answer', (
    # A part of a stop text is never shown.
    (['Yes', ' #', '#', 'no', ' ##', '# INPUT', ' more'], ('## INPUT', '###'),
     'Yes', 'Yes ##no '),
    # What was held back comes at the end.
    (['a', '#'], ('## INPUT',), 'a', 'a#'),
    # Half a character is held back; a slice is one of the bytes of '☃'.
    (['a', slice(0, 2), slice(2, None), 'b'], (), 'a', 'a☃b')),
    ids=('stop text', 'held back', 'half a character'))
def test_streaming(monkeypatch, tokenizer, pieces, stops, first, answer):
  snowman = tokenizer.encode('☃')
  assert len(snowman) > 2  # Bytes, in this tokenizer.

  def fake_generate(*unused, is_done, **options):
    del unused, options
    so_far = []
    for piece in pieces:
      so_far += (snowman[piece] if isinstance(piece, slice)
                 else tokenizer.encode(piece))
      if is_done(0, so_far):
        break
    return [so_far]

  monkeypatch.setattr(generate, 'generate', fake_generate)
  served = types.SimpleNamespace(tokenizer=tokenizer, model=None, params=None)
  sampling = types.SimpleNamespace(
      stop=stops, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
      max_new_tokens=99, seed=0)
  written = []
  text = sample.answer(
      served, sampling, [chat.Message('user', 'Hi')], written.append)
  # Each piece continues the answer: what was shown is never taken back.
  assert text == answer and ''.join(written) == f'{answer}\n'
  assert written[0] == first  # It does stream.


@pytest.mark.parametrize('lines, asked, shown', (
    ('one\n\ntwo\n/new\nthree\n/system Be brief.\nfour\n/new\nfive\n/quit\n'
     'never\n', [
         [('user', 'one')],
         [('user', 'one'), ('model', 'answer 1'), ('user', 'two')],
         [('user', 'three')],
         [('system', 'Be brief.'), ('user', 'four')],
         [('system', 'Be brief.'), ('user', 'five')]], ['answer 5']),
    ('/help\n', [], ['/system TEXT', '/new', '/quit']),
    ('/hlep\n/systemic\nHi\n', [[('user', 'Hi')]], [
        'no command /hlep; /help', 'no command /systemic; /help'])),
    ids=('conversation', 'help and end of file', 'unknown commands'))
def test_chat(monkeypatch, capsys, lines, asked, shown):
  seen = []

  def reply(conversation):
    seen.append([(m.role, m.content) for m in conversation])
    print(f'answer {len(seen)}')
    return f'answer {len(seen)}'

  monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
  assert sample._chat(reply, '') == 0
  assert seen == asked
  out = capsys.readouterr().out
  assert all(text in out for text in shown)


def test_a_chat_without_a_terminal(trained, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('Red?\n/new\nBlue?\n'))
  assert _sample(trained) == 0
  out = capsys.readouterr().out
  assert 'abc abc abc' in out and 'sky' in out


@pytest.mark.parametrize('match, changes', (
    ('no config.json in', dict(workdir='none')),
    ('--prompt', dict(prompt=[''])),
    ('sampling.top_p is 0', dict(top_p=0.0)),
    ('one way of prompting', dict(baseline=('few:2', 'rag:2')))))
def test_what_makes_no_sense_is_refused(trained, match, changes):
  with pytest.raises(errors.UserError, match=match):
    _sample(**dict(workdir=trained, prompt=['Red?']) | changes)


def test_the_answer_is_that_of_greedy_generation(trained, capsys):
  # Left-padded prompt, chunks and streaming: the same as one prompt by hand.
  config = cli.load_run_config(trained)
  served = restore.load_weights(config, trained, base=False, step=-1)
  prompt = chat.render_prompt([chat.Message('user', 'Blue?')], served.tokenizer)
  tokens = generate.generate(
      served.model, served.params, [prompt],
      generate.Sampling(max_new_tokens=16), stop_ids=served.tokenizer.stop_ids,
      vocab_size=served.tokenizer.vocab_size)
  _sample(trained, prompt=['Blue?'])
  assert served.tokenizer.decode(tokens[0]) + '\n' == capsys.readouterr().out
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(served.params))


def test_examples_of_the_training_split_come_first(trained, monkeypatch):
  prompts = local_server.record_prompts(monkeypatch)
  for baseline in ((), ('few:2',), ('rag:2',)):
    _sample(trained, prompt=['Who is it?'], baseline=baseline)
  bare, few, rag = map(len, prompts)
  assert few > bare + 20 and rag > bare + 20
