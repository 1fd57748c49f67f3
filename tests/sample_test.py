"""Answers on the command line: streaming, stop texts, the chat."""

import io
import sys
import types

import conftest
import jax
import numpy as np
import pytest

from gemma_sft import chat
from gemma_sft import cli
from gemma_sft import errors
from gemma_sft import sample
from gemma_sft import train
from gemma_sft.generation import generate
from gemma_sft.run import restore


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Workdir of a run that answers 'Red?' with 'abc abc abc'."""
  folder = tmp_path_factory.mktemp('run')
  config = conftest.config.__wrapped__(folder)
  config.data.update(
      train=conftest.write_pairs(folder / 'four.txt', [
          ('Red?', 'abc abc abc'), ('Blue?', 'sky')]),
      validation='', max_length=48)
  config.lora.enabled = False  # All weights learn two answers in 40 updates.
  config.optimizer.update(learning_rate=0.01, schedule='constant')
  config.train.steps = 40
  config.eval.update(every=100, judged=0, prompts=())
  config.sampling.update(temperature=0.0, repetition_penalty=1.0)
  train.main(config, str(folder / 'w'), False)
  return str(folder / 'w')


def _sample(workdir, *, prompt=None, base=False, system='', **sampling):
  return sample.main(None, workdir, base=base, step=-1, prompt=prompt,
                     system=system, **sampling)


def test_a_memorised_answer_through_a_process(trained):
  status, out, err = conftest.run_module(
      'sample', f'--workdir={trained}', '--prompt=Red?', '--prompt=Blue?')
  assert status == 0, err
  assert out == '> Red?\nabc abc abc\n> Blue?\nsky\n'
  assert 'tuned 40 updates' in err


def test_one_device_serves_what_eight_have_trained(trained):
  assert jax.device_count() == 8
  status, out, err = conftest.run_module(
      'sample', f'--workdir={trained}', '--prompt=Red?', devices=1)
  assert status == 0, err
  assert out == 'abc abc abc\n'


def test_the_base_knows_nothing_of_it(trained, capsys):
  _sample(trained, prompt=['Red?'], base=True, max_new_tokens=8)
  captured = capsys.readouterr()
  assert 'abc' not in captured.out
  assert 'custom, untouched' in captured.err


def test_flags_override_the_runs_sampling(trained, capsys):
  _sample(trained, prompt=['Red?'], stop=[' abc a'])
  assert capsys.readouterr().out == 'abc\n'
  _sample(trained, prompt=['Red?'], max_new_tokens=4)
  assert len(capsys.readouterr().out.strip()) <= 4
  outs = []
  for seed in (1, 1, 2):
    _sample(trained, prompt=['Red?'], temperature=5.0, top_k=3, seed=seed,
            max_new_tokens=16)
    outs.append(capsys.readouterr().out)
  assert outs[0] == outs[1] != outs[2]
  # The tokenizer has fewer pieces than the model's 512 rows: no other id is
  # sampled.
  _sample(trained, prompt=['Red?'], temperature=50.0, max_new_tokens=64)
  assert capsys.readouterr().out


@pytest.mark.parametrize('text, stops, cut', [
    ('one END two', ('END',), ('one ', True)),
    ('one two', ('END',), ('one two', False)),
    ('a## b', ('b', '##'), ('a', True)),  # The first in the text, not the list.
    ('abc', ('', 'c'), ('ab', True)),  # An empty stop text is none.
    ('', ('x',), ('', False)),
    ('END', ('END',), ('', True)),
])
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
  assert text == answer and ''.join(written) == f'{answer}\n'
  assert written[0] == first  # It does stream.
  shown = ''
  for write in written[:-1]:
    shown += write
    assert answer.startswith(shown)


def _chat(monkeypatch, capsys, trained, lines):
  """Returns (stdout, the conversations that were answered)."""
  asked = []

  def answer(served, sampling, conversation, write, prompter, as_text):
    del served, sampling, prompter, as_text
    asked.append([(m.role, m.content) for m in conversation])
    write(f'answer {len(asked)}\n')
    return f'answer {len(asked)}'

  monkeypatch.setattr(sample, 'answer', answer)
  monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
  assert _sample(trained) == 0
  return capsys.readouterr().out, asked


def test_chat_keeps_the_conversation_until_new(monkeypatch, capsys, trained):
  out, asked = _chat(
      monkeypatch, capsys, trained,
      'one\n\ntwo\n/new\nthree\n/system Be brief.\nfour\n/new\nfive\n/quit\n'
      'never\n')
  assert asked == [
      [('user', 'one')],
      [('user', 'one'), ('model', 'answer 1'), ('user', 'two')],
      [('user', 'three')],
      [('system', 'Be brief.'), ('user', 'four')],
      [('system', 'Be brief.'), ('user', 'five')],
  ]
  assert 'answer 5' in out


def test_chat_help_and_end_of_file(monkeypatch, capsys, trained):
  out, asked = _chat(monkeypatch, capsys, trained, '/help\n')
  assert '/system TEXT' in out and '/new' in out and '/quit' in out
  assert not asked


def test_chat_names_an_unknown_command(monkeypatch, capsys, trained):
  out, asked = _chat(
      monkeypatch, capsys, trained, '/hlep\n/systemic\nHi\n')
  assert asked == [[('user', 'Hi')]]
  assert out.count('/help') == 2


def test_chat_through_a_pipe(trained):
  process = conftest.start(
      'sample', f'--workdir={trained}', stdin=conftest.subprocess.PIPE)
  status, out, err = conftest.finish(process, 'Red?\n/new\nBlue?\n')
  assert status == 0, err
  assert 'abc abc abc' in out and 'sky' in out


def test_what_makes_no_sense_is_refused(trained, tmp_path):
  with pytest.raises(errors.UserError, match='no config.json in'):
    _sample(str(tmp_path), prompt=['Hi'])
  for match, flags in (('--prompt', dict(prompt=[''])),
                       ('sampling.top_p is 0', dict(top_p=0.0)),
                       ('one way of prompting',
                        dict(baseline=('few:2', 'rag:2')))):
    with pytest.raises(errors.UserError, match=match):
      _sample(trained, **{'prompt': ['Red?']} | flags)


def test_the_answer_is_that_of_greedy_generation(trained, capsys):
  # Left-padded prompt, chunks and streaming: the same as one prompt by hand.
  config = cli.load_run_config(trained)
  served = restore.load_weights(config, trained, base=False, step=-1)
  prompt = chat.render_prompt(
      [chat.Message('user', 'Blue?')], served.tokenizer)
  tokens = generate.generate(
      served.model, served.params, [prompt],
      generate.Sampling(max_new_tokens=16), stop_ids=served.tokenizer.stop_ids,
      vocab_size=served.tokenizer.vocab_size)
  _sample(trained, prompt=['Blue?'])
  assert served.tokenizer.decode(tokens[0]) + '\n' == capsys.readouterr().out
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(served.params))


def test_examples_of_the_training_split_come_first(trained, monkeypatch):
  asked = []
  real = generate.generate

  def record(model, params, prompts, *args, **kwargs):
    asked.extend(map(len, prompts))
    return real(model, params, prompts, *args, **kwargs)

  monkeypatch.setattr(generate, 'generate', record)
  for baseline in ((), ('few:2',), ('rag:2',)):
    _sample(trained, prompt=['Who is it?'], baseline=baseline)
  bare, few, rag = asked
  assert few > bare + 20 and rag > bare + 20
